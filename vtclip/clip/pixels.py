# SPDX-License-Identifier: Apache-2.0
"""RGB pixels to normalised floats, through a table of the 256 values of each channel."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


def normalized(image: Image, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(value / 255 - mean) / std of an RGB image, [3, H, W] float32, bit-equal to torchvision's.

    It runs in one thread, whatever torch is set to: decoding threads that each started a team of
    threads would take the cores from the encoder.
    """
    pixels = np.asarray(image)
    table = _table(tuple(mean), tuple(std))
    out = np.empty((3, *pixels.shape[:2]), np.float32)
    for channel in range(3):
        np.take(table[channel], pixels[:, :, channel], out=out[channel], mode="clip")
    return torch.from_numpy(out)


@functools.cache
def _table(mean: tuple[float, ...], std: tuple[float, ...]) -> NDArray[np.float32]:
    """[3, 256], computed by torchvision itself from an image that holds every value."""
    from torchvision.transforms import functional as vision

    every = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    pixels: Tensor = vision.normalize(vision.to_tensor(every), list(mean), list(std))
    return np.array(pixels[:, 0].numpy(), np.float32)
