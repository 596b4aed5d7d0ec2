# SPDX-License-Identifier: Apache-2.0
"""Images of 16 bits per channel whose values fill 8, 10, 12 or 14 of them: which range they have.

Cameras and microscopes of 10, 12 or 14 bits write such files; scaled by 65535 they would be nearly
black. The range of a file comes from this file alone, so that no other file changes its pixels:

1. the declared one: TIFF's BitsPerSample or MaxSampleValue, PNG's sBIT, a netpbm file's maximum
   (which Pillow applies itself, as it does for JPEG 2000);
2. else the evident one: the fewest of 8, 10, 12, 14 and 16 bits that hold the largest value.

An image that fills less than a quarter of its true range is therefore brightened, which the counts
that extraction reports make known. Not so one whose values are 8-bit ones repeated in both bytes
(multiples of 257), and one whose declared bits are the upper ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

BAND = 2**20  # values that are computed with at once
Array = np.ndarray[Any, Any]
BITS = (8, 10, 12, 14, 16)
GREY = ("I;16", "I;16L", "I;16B", "I;16N")
BITS_PER_SAMPLE, MAX_SAMPLE_VALUE = 258, 281  # tags of TIFF


def range_bits(values: Array, declared: int | None = None) -> int:
    """The bits (8 to 16) whose range `values`, integers in 0..65535, have."""
    top = int(values.max(initial=0))
    if top == 0:
        return 16
    if declared is not None and top < 2**declared:
        upper = 2 ** (16 - declared)  # PNG asks for values that are scaled up to 16 bits
        return 16 if upper > 1 and top >= upper and _multiples(values, upper) else declared
    if top < 2**14 and _multiples(values, 257):
        return 16
    return next(bits for bits in BITS if top < 2**bits)


def _multiples(values: Array, factor: int) -> bool:
    return not any((part % factor).any() for part in bands(values))


def bands(values: Array) -> Iterator[Array]:
    """Rows of an image at a time, so that arithmetic takes little memory beside the image."""
    rows = max(1, BAND // max(1, values[:1].size))
    return (values[start : start + rows] for start in range(0, len(values), rows))


def to_8_bits(values: Array, bits: int) -> Array:
    """`values` of a range of so many bits as uint8, rounded; none lies half way between two."""
    top = np.uint32(2**bits - 1)
    scaled = np.empty(values.shape, np.uint8)
    for part, into in zip(bands(values), bands(scaled), strict=True):
        into[...] = np.minimum((part.astype(np.uint32) * 255 + top // 2) // top, 255)
    return scaled


def has_16_bits(data: bytes) -> bool:
    """Whether it is a PNG or TIFF file of 16 bits per channel, by its header."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return data[24:25] == b"\x10"
    if not data.startswith((b"II*\0", b"MM\0*")):
        return False
    import io

    from PIL import Image as pillow

    try:
        with pillow.open(io.BytesIO(data), formats=("TIFF",)) as image:
            return max(_tiff_bits(image), default=8) > 8
    except Exception:  # decoding says what is wrong with it
        return False


def declared_bits(image: Image, data: bytes) -> int | None:
    """The bits that a file of 16-bit pixels says its values have."""
    if image.format == "TIFF":
        top = image.tag_v2.get(MAX_SAMPLE_VALUE)  # type: ignore[attr-defined]
        top = top[0] if isinstance(top, tuple) else top
        stored = max(_tiff_bits(image), default=16)
        if stored >= 16 and isinstance(top, int) and 0 < top < 65535:
            return next(bits for bits in BITS if top < 2**bits)
        return stored if 8 < stored < 16 else None
    if image.format == "PNG":
        return _significant_bits(data)
    return 16 if image.format in ("PPM", "JPEG2000") else None


def _tiff_bits(image: Image) -> tuple[int, ...]:
    bits = image.tag_v2.get(BITS_PER_SAMPLE, ())  # type: ignore[attr-defined]
    return tuple(bits) if isinstance(bits, tuple) else (int(bits),)


def _significant_bits(data: bytes) -> int | None:
    """The largest of PNG's significant bits per channel, from its chunk sBIT."""
    at = 8
    while at + 8 <= len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if kind == b"sBIT" and 0 < size <= 4:
            bits = max(data[at + 8 : at + 8 + size], default=16)
            return bits if 8 <= bits < 16 else None
        if kind in (b"IDAT", b"IEND"):
            return None
        at += 12 + size
    return None


def colour_values(data: bytes) -> Array | None:
    """[H, W, channels] uint16 of a PNG file in colour, of which Pillow keeps the upper 8 bits."""
    import torch

    try:
        from torchvision.io import ImageReadMode, decode_image

        read = decode_image(
            torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.UNCHANGED
        )
    except (ImportError, RuntimeError):
        return None
    values: Array = read.permute(1, 2, 0).numpy()
    if values.shape[2] == 2:  # Pillow opens grey with transparency as RGBA
        values = values[..., [0, 0, 0, 1]]
    return values if values.dtype == np.uint16 else None
