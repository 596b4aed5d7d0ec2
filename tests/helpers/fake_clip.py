# SPDX-License-Identifier: Apache-2.0
"""An encoder that costs nothing, so that tests of features are about files."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vtclip.clip import Clip, resolve_templates


class FakeClip(Clip):
    """The interface of Clip over a fixed random projection of 8 x 8 pixels."""

    def __init__(self, *, seed: int = 0, poison: bool = False) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.name = "fake"
        self.device = torch.device("cpu")
        self.width = 16
        self.weight = torch.randn(192, 16, generator=generator)
        self.poison = poison
        self.config = {"model_cfg": {"seed": 0}, "preprocess_cfg": {"size": 8}, "tokenizer": None}
        self.preprocess_cfg = {"size": 8, "mean": [0.5] * 3, "std": [0.5] * 3}
        self.weights_digest = f"weights {seed}"
        self.logit_scale = math.exp(2)
        self.spatial_options = {"raw": 12}
        self.default_spatial = "raw"
        self.images_encoded = 0

    def __repr__(self) -> str:
        return "FakeClip()"

    def preprocess(self, image: Any) -> Tensor:
        pixels = np.asarray(image.resize((8, 8)), dtype=np.float32) / 127.5 - 1
        return torch.from_numpy(pixels).permute(2, 0, 1)

    def encode_image(self, pixels: Tensor, spatial: str | None = None) -> tuple[Tensor, Any]:
        self.images_encoded += len(pixels)
        image = pixels.flatten(1) @ self.weight
        if self.poison:
            image[0, 0] = math.nan
        return image, pixels.reshape(len(pixels), 16, 12) if spatial else None

    def encode_text_views(self, names: Any, templates: Any = None) -> Tensor:
        def row(length: int) -> Tensor:
            return torch.randn(16, generator=torch.Generator().manual_seed(length))

        lines = resolve_templates(templates)
        rows = [torch.stack([row(len(name) + 31 * m) for m in range(len(lines))]) for name in names]
        return torch.nn.functional.normalize(torch.stack(rows), dim=-1)
