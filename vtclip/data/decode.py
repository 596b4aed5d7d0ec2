# SPDX-License-Identifier: Apache-2.0
"""Image files to RGB. Decoding rules, the same for training, evaluation and prediction:

- The formats of vtclip.data.formats, recognised by content; nothing that can start another program.
  The first frame of an animation or of a file of pages.
- EXIF orientation is applied. Transparency is blended with white. CMYK, palette, grey and 1-bit
  become RGB. 16-bit values are scaled from the range that the file declares or evidently has
  (vtclip.data.bit_range). Floats and 32-bit integers have no known range and are refused.
- At most 89,478,485 pixels, 1 GiB and an aspect of 100:1 (a resize of the short edge to 224
  then stays below 6 million pixels). PNG and WebP files must be complete. What else can cost more
  than it weighs is bounded in vtclip.data.image_cost.

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
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vtclip.data.bit_range import (
    BAND,
    GREY,
    colour_values,
    declared_bits,
    has_16_bits,
    range_bits,
    to_8_bits,
)
from vtclip.data.formats import formats, formats_of, signature
from vtclip.data.image_cost import too_costly, unpacked_too_much
from vtclip.files import printable

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 89_478_485  # from here on Pillow warns of decompression bombs
MAX_ASPECT = 100
MAX_BYTES = 2**30
ORIENTATION = 0x0112  # tag of EXIF
PNG_END = b"IEND\xaeB`\x82"
# formats with frames or pages; MPO is left out, as it holds previews and gain maps of one photo
FRAMES_KNOWN = frozenset(("PNG", "WEBP", "AVIF"))  # when the file is opened
FRAMES_SOUGHT = frozenset(("GIF", "TIFF", "HEIF", "DCX"))


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


class Decoded(NamedTuple):
    """An RGB image, and what decoding did to it: of `notes`, see `note_line`."""

    image: Image
    notes: tuple[str, ...] = ()


def decode(data: bytes, path: str | Path) -> Image:
    """`data` as an RGB image; `path` is for messages, and its extension for formats of its own."""
    return decode_noted(data, path).image


def decode_noted(data: bytes, path: str | Path) -> Decoded:
    """`decode`, with notes of what an image lost or how it was scaled."""
    from PIL import Image as pillow
    from PIL import UnidentifiedImageError

    try:
        cost = too_costly(data)
        if cost is not None:
            raise ImageError(path, f"too costly to decode: {cost}")
        image = pillow.open(io.BytesIO(data), formats=formats_of(os.fspath(path)))
        _check_size(image, path)
        _check_complete(data, image.format, path)
        image.load()
        _check_size(image, path)  # an icon's own header may say something else than its table
        rgb, notes = _to_rgb(image, data, path)
        if rgb is image and image.format in FRAMES_SOUGHT:
            rgb = image.copy()  # seeking takes its pixels
        return Decoded(rgb, notes + (("frames",) if _has_frames(image) else ()))
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(path, _unknown(data)) from None
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning):
        raise ImageError(path, f"more than {MAX_PIXELS} pixels") from None
    except MemoryError:
        raise ImageError(path, "not enough memory to decode it") from None
    except Exception as error:  # decoders raise many kinds for damaged data
        reason = " ".join(str(error).split()) or type(error).__name__
        cost = unpacked_too_much(reason)
        fault = f"damaged: {reason[:160]}" if cost is None else f"too costly to decode: {cost}"
        raise ImageError(path, fault) from None


def note_line(note: str, count: int) -> str:
    """One line about `count` images with the same of `decode_noted`'s notes."""
    images = "1 image" if count == 1 else f"{count} images"
    one = count == 1
    if note == "frames":
        return f"{images} {'has' if one else 'have'} several frames or pages; the first is used"
    bits = int(note.removeprefix("bits "))
    return (
        f"{images} of {bits}-bit range in {'a 16-bit file' if one else '16-bit files'} "
        f"{'is' if one else 'are'} scaled by {2**bits - 1}"
    )


def decoding_trait(data: bytes) -> str | None:
    """What the pixels of a file depend on beside its bytes: features of it are of no other kind.

    "16-bit": the rule for ranges below 16 bits. A format's name: whether its optional library is
    there. None for all others, so that features from before these rules stay valid.
    """
    kind = signature(data)
    if kind in ("AVIF", "HEIF"):
        return f"{kind} {'read' if kind in formats().by_content else 'unread'}"
    return "16-bit" if kind in ("PNG", "TIFF") and has_16_bits(data) else None


def pixel_digest(image: Image) -> str:
    """sha256 of an RGB image's size and pixels: the same however they were encoded."""
    total = hashlib.sha256(f"RGB {image.width} x {image.height}\n".encode())
    total.update(image.tobytes())
    return total.hexdigest()


def as_rgb(image: Image) -> Image:
    """A PIL image as `decode` would return it: upright, on white, RGB; or ImageError."""
    path = getattr(image, "filename", "") or "a PIL image"
    _check_size(image, path)
    return _to_rgb(image, b"", path)[0]


def _unknown(data: bytes) -> str:
    from vtclip.data.formats import HINTS

    kind = signature(data)
    if kind is None:
        return "not an image of a known format"
    if kind not in formats().by_content:
        return f"{kind} is not read: {HINTS[kind]}"
    return f"damaged: it begins like {kind}, but is not an image of a known format"


def _has_frames(image: Image) -> bool:
    """Whether there is a second frame; it is looked for, not decoded."""
    if image.format in FRAMES_KNOWN:
        return bool(getattr(image, "is_animated", False))
    if image.format not in FRAMES_SOUGHT:
        return False
    try:
        image.seek(1)
    except Exception:  # EOFError where there is none, many kinds where it is damaged
        return False
    return True


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
        if image.getexif().get(ORIENTATION) not in range(2, 9):
            return image  # Pillow would copy it
        return ImageOps.exif_transpose(image)
    except Exception:  # unreadable EXIF holds no orientation, so the pixels stay as they are
        return image


def _to_rgb(image: Image, data: bytes, path: str | Path) -> tuple[Image, tuple[str, ...]]:
    """The upright RGB image and its notes. `data`: the file's bytes, where they are at hand."""
    from PIL import Image as pillow

    bits = 16
    if image.mode in GREY or (image.mode == "I" and image.format in ("PNG", "PPM")):
        declared = declared_bits(image, data)
        values = np.asarray(_upright(image))
        bits = range_bits(values, declared)
        image = pillow.fromarray(to_8_bits(values, bits))
    else:
        if has_16_bits(data) and image.mode in ("RGB", "RGBA", "LA"):
            image, bits = _colour_16(image, data, path)
        image = _upright(image)
    return _flat(image, path), () if bits == 16 else (f"bits {bits}",)


def _flat(image: Image, path: str | Path) -> Image:

    mode = image.mode
    if mode in ("F", "I"):
        kind = "floating-point" if mode == "F" else "32-bit integer"
        raise ImageError(path, f"{kind} pixels have no known range; convert them to 8 or 16 bit")
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        if mode in ("La", "RGBa"):
            image = image.convert("RGBA" if mode == "RGBa" else "LA")
        return _on_white(image)
    return image if mode == "RGB" else image.convert("RGB")


def _on_white(image: Image) -> Image:
    """A band of rows at a time: four copies of the whole image would lie side by side."""
    from PIL import Image as pillow

    flat = pillow.new("RGB", image.size)
    rows = max(1, BAND // image.width)
    for top in range(0, image.height, rows):
        box = (0, top, image.width, min(image.height, top + rows))
        part = image.crop(box).convert("RGBA")
        white = pillow.new("RGBA", part.size, (255, 255, 255, 255))
        flat.paste(pillow.alpha_composite(white, part).convert("RGB"), box)
    return flat


def _colour_16(image: Image, data: bytes, path: str | Path) -> tuple[Image, int]:
    """An image of 16 bits per channel, of which Pillow has the upper 8, scaled from its range."""
    from PIL import Image as pillow

    bands = image.getbands()
    colours = len(bands) - image.mode.endswith("A")
    top = max(high for _, high in image.getextrema()[:colours])  # type: ignore[misc]
    if top >= 64:  # the upper byte holds 6 of 14 bits
        return image, 16
    declared = declared_bits(image, data)
    values = colour_values(data) if image.format == "PNG" else None
    if values is not None and values.shape == (image.height, image.width, len(bands)):
        bits = range_bits(values[..., :colours], declared)
        if bits == 16:
            return image, 16
        pixels = (values[..., colours:] >> 8).astype(np.uint8)  # alpha, or nothing
        pixels = np.concatenate([to_8_bits(values[..., :colours], bits), pixels], axis=2)
    else:
        pixels = np.asarray(image).copy()
        upper = pixels[..., :colours]
        bits = range_bits(np.array([[top * 256 + 255]], np.uint16), declared)
        if bits < 12:
            raise ImageError(path, f"16-bit colours below {2**bits} are not read; convert to 8 bit")
        upper[...] = to_8_bits(upper, bits - 8)
    if bits == 16:
        return image, 16
    del values
    scaled = pillow.fromarray(pixels, image.mode) if colours == 1 else pillow.fromarray(pixels)
    scaled.info = dict(image.info)  # with the orientation
    return scaled, bits


def content_digest(data: bytes) -> str:
    """sha256 of a file's bytes."""
    return hashlib.sha256(data).hexdigest()
