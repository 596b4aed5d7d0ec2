# SPDX-License-Identifier: Apache-2.0
"""Multi-Modal Adapter: image and class texts attend to each other."""

from __future__ import annotations

from vtclip.config import FitConfig


def get_config(shots: int) -> FitConfig:
    """AdamW, batch 32, one epoch of linear warm-up, then half a cosine; published ratio of 0.2.

    Chosen on satellite photos of 19 classes (ViT-B/32, RN50), on images that neither train nor
    test, mean over 1, 4 and 16 shots: 91.3 %; with 20 epochs 87.8, 100 epochs 90.5, a rate of 1e-3
    over 100 epochs 91.1, 1e-2 85.4, SGD less.

    Expected: 89.3 / 95.2 / 98.0 % from 81.6 % zero-shot with 1 / 4 / 16 shots, mean of seeds 1-3,
        on 500 satellite photos of 19 classes through ViT-B/32.
    Cost: 1 / 1 / 6 s on one CPU core.
    Command: vtclip fit SOURCE --method mm-adapter --shots 16
    """
    del shots
    return FitConfig(epochs=50, optimizer="adamw", lr=3e-3, warmup="linear")
