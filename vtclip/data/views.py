# SPDX-License-Identifier: Apache-2.0
"""Many views of one image: the model's own crop, then random crops and flips.

View 0 is the evaluation transform (resize, centre crop). View v >= 1 is a random resized crop
(area 0.08-1, ratio 3/4-4/3), flipped in half of the cases and drawn from a generator seeded by
(seed, name, v) alone: neither the other images nor the number of views change it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtclip.data.decode import decode
from vtclip.data.image_files import ImageFiles
from vtclip.data.threads import ahead, decode_pool, num_cores

if TYPE_CHECKING:
    from PIL.Image import Image

    from vtclip.clip import Clip

MAX_AHEAD = 16  # images whose views wait in memory


def view_generator(seed: int, name: str, view: int) -> torch.Generator:
    """The generator of one view of the image called `name`."""
    key = b"\0".join((b"view", str(seed).encode(), name.encode("utf-8", "surrogateescape")))
    digest = hashlib.sha256(key + b"\0" + str(view).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def image_views(clip: Clip, image: Image, count: int, *, seed: int, name: str) -> Tensor:
    """`count` views of an RGB image -> [count, 3, H, W] float32, the original one first."""
    if count < 1:
        raise ValueError(f"views must be at least 1, got {count}")
    drawn = (clip.augment(image, view_generator(seed, name, view)) for view in range(1, count))
    return torch.stack([clip.preprocess(image), *drawn])


def folder_views(
    clip: Clip, images: str | Path | ImageFiles, names: Sequence[str], count: int, *, seed: int
) -> Iterator[Tensor]:
    """The views of every one of `names` of `images` (a folder, too), decoded ahead in threads."""
    found = images if isinstance(images, ImageFiles) else ImageFiles.below(images)

    def load(name: str) -> Tensor:
        image = decode(found.read(name), found.path(name))
        return image_views(clip, image, count, seed=seed, name=name)

    with decode_pool() as pool:
        yield from ahead(pool, load, names, min(MAX_AHEAD, num_cores()))
