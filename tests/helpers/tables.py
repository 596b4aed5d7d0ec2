# SPDX-License-Identifier: Apache-2.0
"""A small table of features on which a head has something to learn."""

from __future__ import annotations

import numpy as np
import torch
from torch.nn import functional as F

ANIMALS = ["ant", "bee", "cat", "dog"]


def animal_features(lean: float = 0.9) -> dict[str, np.ndarray]:
    """Global features that lean towards the next class; one of the nine tokens tells the class."""
    K, C, L, per_class = 4, 16, 9, 24
    generator = torch.Generator().manual_seed(7)
    text = F.normalize(torch.randn(K, C, generator=generator), dim=-1)
    label = torch.arange(K).repeat_interleave(per_class)
    noise = torch.randn(len(label), C, generator=generator) * 0.15
    image = text[label] + lean * text[(label + 1) % K] + noise
    spatial = torch.randn(len(label), L, C, generator=generator) * 0.2
    spatial[torch.arange(len(label)), torch.arange(len(label)) % L] += 2 * text[label]
    return {
        "image": image.numpy(),
        "label": label.numpy(),
        "text": text.numpy(),
        "classname": np.array(ANIMALS),
        "spatial": spatial.numpy(),
        "temperature": np.float32(np.log(20.0)),
    }
