# SPDX-License-Identifier: Apache-2.0
"""CALIP: parameter-free attention between image positions and class texts."""

from __future__ import annotations

from vtclip.heads.config import FitConfig


def get_config(shots: int) -> FitConfig:
    """No training: min(shots, 4) validation images per class choose two weights.

    Without validation images the weights are 0 and 0.1: by `benchmarks/choose_defaults.py` +0.3
    points over zero-shot on product photos that were not tested on.

    Expected: 90.1 / 90.1 / 90.0 % from 90.1 % zero-shot with 1 / 4 / 16 shots, mean of seeds 1-3,
        on 754 product photos of 18 classes through a CLIP with 256 tokens of width 128.
    Cost: 0.1 s on one CPU core.
    Command: vtclip fit SOURCE --method calip --shots 16
    """
    del shots
    return FitConfig(epochs=0)
