# SPDX-License-Identifier: Apache-2.0
"""CoOp: learned context vectors through the frozen text encoder."""

from __future__ import annotations

from vtclip.heads.config import FitConfig


def get_config(shots: int) -> FitConfig:
    """The published schedule: SGD at 2e-3, batch 32, one epoch of warm-up, 50, 100 or 200 epochs.

    ImageNet is trained for 50 whatever the shots: `--epochs 50`. arXiv 2109.01134, section 4.1.

    Expected: 52.0 / 53.8 / 55.4 % from 50.0 % zero-shot with 1 / 4 / 16 shots, mean of seeds 1-3,
        on the 576 test images of the demo's 24 classes. --context-init "a photo of a" gives 50.1 /
        50.1 / 53.9 %, --class-specific 44.7 / 39.7 / 42.0 %.
    Cost: 2 / 2 / 10 s of one CPU core; all class texts are encoded anew in every step.
    Command: vtclip demo && vtclip fit vtclip-demo/images --method coop --shots 16
    """
    epochs = 50 if shots <= 1 else 100 if shots <= 4 else 200
    return FitConfig(epochs=epochs)
