# SPDX-License-Identifier: Apache-2.0
"""VT-CLIP: class texts attend to the spatial features of each image."""

from __future__ import annotations

from vtclip.config import FitConfig

EPOCHS = {1: 50, 2: 100, 4: 100, 8: 200, 16: 200}


def get_config(shots: int) -> FitConfig:
    """SGD with momentum 0.9 and a cosine schedule after one constant epoch; epochs grow with shots.

    Command: vtclip fit SOURCE --method vtclip --shots 16
    """
    # between the named shot counts, the epochs of the next smaller one
    epochs = EPOCHS[max((known for known in EPOCHS if known <= shots), default=1)]
    return FitConfig(epochs=epochs)
