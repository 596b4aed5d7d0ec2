# SPDX-License-Identifier: Apache-2.0
"""CoOp: learned context vectors through the frozen text encoder."""

from __future__ import annotations

from vtclip.config import FitConfig


def get_config(shots: int) -> FitConfig:
    """The published schedule: SGD at 2e-3, batch 32, one epoch of warm-up, 50, 100 or 200 epochs.

    ImageNet is trained for 50 whatever the shots: `--epochs 50`. arXiv 2109.01134, section 4.1.
    """
    epochs = 50 if shots <= 1 else 100 if shots <= 4 else 200
    return FitConfig(epochs=epochs)
