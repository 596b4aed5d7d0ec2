# SPDX-License-Identifier: Apache-2.0
"""Proto-CLIP without training: image prototypes beside the class texts."""

from __future__ import annotations

from vtclip.heads.config import FitConfig


def get_config(shots: int) -> FitConfig:
    """No training: class means; alpha and beta by validation.

    Expected: 89.1 / 94.9 / 96.1 % from 81.6 % zero-shot with 1 / 4 / 16 shots, mean of seeds 1-3,
        on 500 satellite photos of 19 classes through ViT-B/32; 83.6 / 89.1 / 93.6 from 71.6 % RN50.
    Cost: 0.2 s for 16 shots of 100 classes of width 512 on two CPU cores.
    Command: vtclip fit SOURCE --method proto-clip --shots 16
    """
    del shots
    return FitConfig(epochs=0)
