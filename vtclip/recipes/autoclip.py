# SPDX-License-Identifier: Apache-2.0
"""AutoCLIP: every image weighs the templates of the class texts."""

from __future__ import annotations

from vtclip.heads.config import FitConfig


def get_config(shots: int) -> FitConfig:
    """No training, so `shots` does not matter; the published entropy share of 0.85.

    Expected: 79.4 % beside 81.6 % zero-shot on 500 satellite photos of 19 classes through ViT-B/32
        with 106 templates, 71.4 beside 71.6 % through RN50: no gain there. With one template it is
        zero-shot.
    Cost: one matrix product per image and template.
    Command: vtclip fit SOURCE --method autoclip --templates imagenet80 --test-fraction 1
    """
    del shots
    return FitConfig(epochs=0)
