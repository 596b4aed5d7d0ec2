# SPDX-License-Identifier: Apache-2.0
"""What `Classifier` takes for an image: a path, bytes, a file, a PIL image, an array, a tensor."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from PIL import Image
from torch import Tensor

from vtclip.data.decode import MAX_BYTES, ImageError, as_rgb, decode, open_image

Picture = str | Path | bytes | IO[bytes] | Image.Image | np.ndarray[Any, Any] | Tensor
"""One image: a path; the bytes of a file, or a file open for reading bytes; a PIL image; an array
[H, W, 3] uint8, RGB; or a tensor [3, H, W] that went through the model's own preprocessing."""
KINDS = "a path, bytes, a binary file, a PIL image, a uint8 array or a tensor"
RAW = (bytes, bytearray, memoryview)


def as_pictures(images: Picture | Iterable[Picture]) -> tuple[Iterable[Picture], bool]:
    """The images one by one, and whether `images` is a single one.

    A tensor [B, 3, H, W] and an array [B, H, W, 3] are B images.
    """
    single = isinstance(images, (str, os.PathLike, Image.Image, *RAW)) or hasattr(images, "read")
    if isinstance(images, Tensor):
        if images.ndim not in (3, 4):
            wish = "[3, H, W] or [B, 3, H, W]"
            raise ValueError(f"predict: a tensor must be {wish}, got {list(images.shape)}")
        single = images.ndim == 3
    elif isinstance(images, np.ndarray):
        if images.ndim != 4:
            check_array(images)
        single = images.ndim == 3
    elif not single and not isinstance(images, Iterable):
        raise TypeError(
            f"predict: images must be {KINDS}, or several of them, got {type(images).__name__}"
        )
    return ([cast("Picture", images)] if single else cast("Iterable[Picture]", images)), single


def check_array(pixels: np.ndarray[Any, Any]) -> None:
    if pixels.ndim != 3 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8:
        raise ValueError(
            "predict: an array must be [H, W, 3] or [B, H, W, 3] uint8 in RGB, "
            f"got {pixels.dtype} {list(pixels.shape)}"
        )


def in_memory(picture: object) -> object:
    """An open file as its bytes, a PIL image that was only opened with its pixels.

    Both are read here, in the thread of the caller: no two threads may read one file at once.
    """
    if isinstance(picture, Image.Image):
        try:
            picture.load()
        except Exception as error:  # decoders raise many kinds for damaged data
            name = getattr(picture, "filename", "") or "a PIL image"
            return ImageError(name, f"damaged: {' '.join(str(error).split())[:160]}")
    elif hasattr(picture, "read"):
        return _contents(picture)
    return picture


class Contents:
    """The bytes of an image, and what they are called in messages."""

    def __init__(self, data: bytes, name: str) -> None:
        self.data, self.name = data, name


def _contents(file: Any) -> Contents | ImageError:
    name = getattr(file, "name", None)
    name = name if isinstance(name, str) else "an open file"
    try:
        data = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: the file is closed
        return ImageError(name, f"cannot be read: {' '.join(str(error).split())[:160]}")
    if isinstance(data, str):
        raise TypeError(f"predict: the file {name!a} must be opened for bytes ('rb'), not for text")
    return Contents(bytes(data), name)


def rgb_of(picture: object) -> Image.Image | ImageError:
    """Any kind of image but a tensor as an RGB PIL image; a TypeError for what is none."""
    if isinstance(picture, ImageError):
        return picture
    if isinstance(picture, RAW):
        picture = Contents(bytes(picture), "bytes")
    try:
        if isinstance(picture, Contents):
            if not picture.data:
                raise ImageError(picture.name, "the file is empty")
            if len(picture.data) > MAX_BYTES:
                raise ImageError(picture.name, f"more than {MAX_BYTES} bytes")
            return decode(picture.data, picture.name)
        if isinstance(picture, np.ndarray):
            check_array(picture)
            return as_rgb(Image.fromarray(np.ascontiguousarray(picture)))
        if isinstance(picture, Image.Image):
            return as_rgb(picture)
        if isinstance(picture, (str, Path)):
            return open_image(picture)
    except ImageError as error:
        return error
    raise TypeError(f"predict: an image must be {KINDS}, got {type(picture).__name__}")
