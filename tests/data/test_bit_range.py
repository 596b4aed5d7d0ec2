# SPDX-License-Identifier: Apache-2.0
"""16-bit files of 8, 10, 12 and 14 bits: the declared range, the evident one, and what is black."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtclip.data.decode import ImageError, as_rgb, decode_noted, decoding_trait, note_line


def png(values: np.ndarray[Any, Any], significant: int | None = None) -> bytes:
    """A PNG file of 16 bits per channel from [H, W] or [H, W, channels]."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)

    channels = 1 if values.ndim == 2 else values.shape[2]
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, colour, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    bits = b"" if significant is None else chunk(b"sBIT", bytes([significant] * channels))
    parts = (
        chunk(b"IHDR", header) + bits + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    )
    return b"\x89PNG\r\n\x1a\n" + parts


def tiff(values: np.ndarray[Any, Any], **tags: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "TIFF", **tags)
    return buffer.getvalue()


def ramp(bits: int) -> np.ndarray[Any, Any]:
    return np.linspace(0, 2**bits - 1, 64).round().astype(np.uint16).reshape(4, 16)


def grey(data: bytes) -> tuple[list[int], tuple[str, ...]]:
    image, notes = decode_noted(data, "x")
    pixels = np.asarray(image)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0].reshape(-1).tolist(), notes


@pytest.mark.parametrize("write", [png, tiff])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_the_evident_range_is_scaled_to_all_of_8_bits(write: Any, bits: int) -> None:
    values = ramp(bits)
    pixels, notes = grey(write(values))
    assert pixels == np.rint(values / (2**bits - 1) * 255).reshape(-1).tolist()
    assert notes == (() if bits == 16 else (f"bits {bits}",))


def test_values_of_8_bits_in_both_bytes_are_not_brightened() -> None:
    dark = np.arange(64, dtype=np.uint16).reshape(4, 16) // 2 * 257
    pixels, notes = grey(png(dark))
    assert (max(pixels), notes) == (31, ())


def test_black_stays_black() -> None:
    assert grey(png(np.zeros((2, 2), np.uint16))) == ([0] * 4, ())


def test_declared_bits_win_over_the_evident_ones() -> None:
    dark = ramp(10)  # of 12-bit pixels
    assert max(grey(png(dark))[0]) == 255
    pixels, notes = grey(png(dark, significant=12))
    assert (max(pixels), notes) == (64, ("bits 12",))
    pixels, notes = grey(tiff(dark, tiffinfo={281: 4095}))
    assert (max(pixels), notes) == (64, ("bits 12",))
    # the standard's way: 12 bits are the upper ones
    pixels, notes = grey(png(np.arange(16, dtype=np.uint16).reshape(4, 4) * 16, significant=12))
    assert (max(pixels), notes) == (1, ())


def test_netpbm_declares_its_range() -> None:
    values = ramp(10)
    data = b"P5 16 4 4095\n" + values.astype(">u2").tobytes()
    pixels, notes = grey(data)
    assert (max(pixels), notes) == (64, ())


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_colours_of_12_bits_keep_their_precision(channels: int) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (6, 5, channels)).astype(np.uint16)
    if channels != 3:
        values[..., -1] = 65535
    image, notes = decode_noted(png(values), "x")
    colours = values[..., :3] if channels > 2 else values[..., [0, 0, 0]]
    np.testing.assert_array_equal(np.asarray(image), np.rint(colours / 4095 * 255))
    assert notes == ("bits 12",)


def test_full_colours_are_as_pillow_has_them() -> None:
    values = np.random.default_rng(0).integers(0, 65536, (6, 5, 3)).astype(np.uint16)
    image, notes = decode_noted(png(values), "x")
    np.testing.assert_array_equal(np.asarray(image), values >> 8)
    assert notes == ()


def test_orientation_holds_for_16_bits() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    values = ramp(12)
    image, _ = decode_noted(tiff(values, exif=exif), "x")
    expected = np.rot90(np.rint(values / 4095 * 255), -1)
    np.testing.assert_array_equal(np.asarray(image)[..., 0], expected)


def test_pil_images_are_treated_alike() -> None:
    values = ramp(12)
    opened = Image.open(io.BytesIO(png(values)))
    np.testing.assert_array_equal(as_rgb(opened), decode_noted(png(values), "x").image)
    with pytest.raises(ImageError, match="32-bit integer pixels"):
        as_rgb(Image.fromarray(np.ones((4, 4), np.int32)))


def test_traits_and_lines() -> None:
    assert decoding_trait(png(ramp(12))) == decoding_trait(tiff(ramp(12))) == "16-bit"
    assert decoding_trait(tiff(ramp(8).astype(np.uint8))) is None
    assert decoding_trait(b"\x89PNG\r\n\x1a\n") is None
    assert note_line("bits 10", 3) == (
        "3 images of 10-bit range in 16-bit files are scaled by 1023"
    )
    assert note_line("frames", 1) == "1 image has several frames or pages; the first is used"
