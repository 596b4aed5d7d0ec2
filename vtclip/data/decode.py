# SPDX-License-Identifier: Apache-2.0
"""Image files to RGB. Decoding rules, the same for training, evaluation and prediction:

- JPEG, PNG, WebP, BMP, GIF, TIFF and MPO, recognised by content and not by extension; nothing that
  can start another program. The first frame of an animation or of a file of pages.
- EXIF orientation is applied. Transparency is blended with white. CMYK, palette, grey and 1-bit
  become RGB. 16-bit grey is scaled by 1/257. Floats and 32-bit integers have no known range and
  are refused.
- At most 89,478,485 pixels, 1 GiB and an aspect of 100:1 (a resize of the short edge to 224
  then stays below 6 million pixels). PNG and WebP files must be complete.

A file that cannot be read is an `ImageError` with its path and reason. It is never replaced by
black pixels or by its neighbour.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
import struct
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vtclip.files import printable

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # Pillow opens MPO as JPEG
MAX_PIXELS = 89_478_485  # from here on Pillow warns of decompression bombs
MAX_ASPECT = 100
MAX_BYTES = 2**30
PNG_END = b"IEND\xaeB`\x82"


class ImageError(ValueError):
    """A file that is not a readable image; `path` and `reason` say which and why."""

    def __init__(self, path: str | Path, reason: str) -> None:
        self.path = str(path)
        self.reason = reason
        super().__init__(f"{printable(self.path)}: {reason}")

    def __reduce__(self) -> tuple[type[ImageError], tuple[str, str]]:
        return type(self), (self.path, self.reason)


def open_image(path: str | Path) -> Image:
    """The file as an RGB image, or ImageError."""
    return decode(read_file(path), path)


def read_file(path: str | Path) -> bytes:
    """The bytes of a regular file; a pipe or device is refused without being opened."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "a pipe, socket or device"
            raise ImageError(path, f"not a regular file but {kind}")
        if status.st_size == 0:
            raise ImageError(path, "the file is empty")
        if status.st_size > MAX_BYTES:
            raise ImageError(path, f"{status.st_size} bytes, the limit is {MAX_BYTES}")
        return Path(path).read_bytes()
    except FileNotFoundError:
        link = os.path.islink(path)
        raise ImageError(path, "a link to nothing" if link else "no such file") from None
    except OSError as error:
        raise ImageError(path, error.strerror or type(error).__name__) from None


def decode(data: bytes, path: str | Path) -> Image:
    """`data` as an RGB image; `path` is for messages only."""
    from PIL import Image as pillow
    from PIL import UnidentifiedImageError

    try:
        image = pillow.open(io.BytesIO(data), formats=FORMATS)
        _check_size(image, path)
        _check_complete(data, image.format, path)
        image.load()
        return _to_rgb(_upright(image), path)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(path, f"not an image of a known format ({', '.join(FORMATS)})") from None
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning):
        raise ImageError(path, f"more than {MAX_PIXELS} pixels") from None
    except MemoryError:
        raise ImageError(path, "not enough memory to decode it") from None
    except Exception as error:  # decoders raise many kinds for damaged data
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageError(path, f"damaged: {reason[:160]}") from None


def as_rgb(image: Image) -> Image:
    """A PIL image as `decode` would return it: upright, on white, RGB; or ImageError."""
    path = getattr(image, "filename", "") or "a PIL image"
    _check_size(image, path)
    return _to_rgb(_upright(image), path)


def _check_size(image: Image, path: str | Path) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise ImageError(path, f"no pixels: {width} x {height}")
    if width * height > MAX_PIXELS:
        raise ImageError(path, f"{width} x {height} is more than {MAX_PIXELS} pixels")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageError(path, f"{width} x {height} is longer than {MAX_ASPECT}:1")


def _check_complete(data: bytes, kind: str | None, path: str | Path) -> None:
    """PNG and WebP decoders accept a file whose end is missing; JPEG, BMP and TIFF do not."""
    if kind == "PNG" and PNG_END not in data[-4096:] and PNG_END not in data:
        raise ImageError(path, "damaged: the end of the PNG file is missing")
    if kind == "WEBP" and struct.unpack_from("<I", data, 4)[0] + 8 > len(data):
        raise ImageError(path, "damaged: the end of the WebP file is missing")


def _upright(image: Image) -> Image:
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # unreadable EXIF holds no orientation, so the pixels stay as they are
        return image


def _to_rgb(image: Image, path: str | Path) -> Image:
    from PIL import Image as pillow

    mode = image.mode
    if mode in ("I;16", "I;16L", "I;16B", "I;16N") or (mode == "I" and image.format == "PNG"):
        values = np.asarray(image).astype(np.float64)
        return pillow.fromarray(np.rint(values / 257).clip(0, 255).astype(np.uint8)).convert("RGB")
    if mode in ("F", "I"):
        kind = "floating-point" if mode == "F" else "32-bit integer"
        raise ImageError(path, f"{kind} pixels have no known range; convert them to 8 or 16 bit")
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        if mode in ("La", "RGBa"):
            image = image.convert("RGBA" if mode == "RGBa" else "LA")
        white = pillow.new("RGBA", image.size, (255, 255, 255, 255))
        return pillow.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image if mode == "RGB" else image.convert("RGB")


def content_digest(data: bytes) -> str:
    """sha256 of a file's bytes."""
    return hashlib.sha256(data).hexdigest()
