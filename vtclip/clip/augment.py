# SPDX-License-Identifier: Apache-2.0
"""Random crops and flips that depend on an image's content and the pass number only."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtclip.clip.pixels import normalized

if TYPE_CHECKING:
    from PIL.Image import Image

LEAST_AREA = 0.08
AUGMENTATION = {
    "crop_area": [LEAST_AREA, 1.0],
    "crop_ratio": [0.75, 4 / 3],
    "flip": 0.5,
    "version": 1,
}


def pass_generator(digest: str, augment_pass: int) -> torch.Generator:
    """The generator of one image (by content digest) in one pass."""
    seed = hashlib.sha256(f"{digest} pass {augment_pass}".encode()).digest()[:8]
    return torch.Generator().manual_seed(int.from_bytes(seed, "little") >> 1)


def random_view(
    image: Image,
    size: int | Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    generator: torch.Generator,
    least_area: float = LEAST_AREA,
) -> Tensor:
    """Random resized crop (bicubic), horizontal flip and normalisation, [3, H, W] float32."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as vision

    out = [size, size] if isinstance(size, int) else list(size)
    top, left, height, width = crop_box(image.width, image.height, generator, least_area)
    image = vision.resized_crop(image, top, left, height, width, out, InterpolationMode.BICUBIC)
    if float(torch.rand((), generator=generator)) < 0.5:
        image = vision.hflip(image)
    return normalized(image.convert("RGB"), mean, std)


def crop_box(
    width: int, height: int, generator: torch.Generator, least_area: float = LEAST_AREA
) -> tuple[int, int, int, int]:
    """(top, left, height, width) of a random crop of at least `least_area` of the image.

    Where ten draws do not fit into the image, the largest central crop.
    """
    low, high = math.log(3 / 4), math.log(4 / 3)
    for _ in range(10):
        draw = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        area = width * height * (least_area + (1 - least_area) * draw[0])
        ratio = math.exp(low + (high - low) * draw[1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(draw[2] * (height - h + 1)), int(draw[3] * (width - w + 1)), h, w
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    w, h = max(w, 1), max(h, 1)
    return (height - h) // 2, (width - w) // 2, h, w
