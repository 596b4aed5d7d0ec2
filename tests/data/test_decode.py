# SPDX-License-Identifier: Apache-2.0
"""Decoding: every bad file has a reason, every good one has its pixels."""

from __future__ import annotations

import io
import os
import random
import socket
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vtclip.data.decode import ImageError, decode, open_image

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)


def encoded(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image or Image.fromarray(PIXELS)).save(buffer, kind, **options)
    return buffer.getvalue()


def rgb(data: bytes) -> np.ndarray[Any, Any]:
    image = decode(data, "x")
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("kind", ["PNG", "BMP", "TIFF"])
def test_lossless_formats_keep_every_pixel(kind: str) -> None:
    np.testing.assert_array_equal(rgb(encoded(kind)), PIXELS)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF", "MPO"])
def test_lossy_formats_come_close(kind: str) -> None:
    smooth = Image.linear_gradient("L").resize((40, 20)).convert("RGB")
    got = rgb(encoded(kind, smooth)).astype(int)
    assert np.abs(got - np.asarray(smooth, dtype=int)).mean() < 4


def test_content_decides_and_not_the_extension(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(encoded("PNG"))
    np.testing.assert_array_equal(np.asarray(open_image(path)), PIXELS)


def test_16_bit_grey_is_scaled() -> None:
    values = np.array([[0, 257, 25700, 65535]], dtype=np.uint16)
    got = rgb(encoded("PNG", Image.fromarray(values)))
    assert got[0, :, 0].tolist() == [0, 1, 100, 255]
    assert rgb(encoded("TIFF", Image.fromarray(values)))[0, :, 2].tolist() == [0, 1, 100, 255]


@pytest.mark.parametrize(
    ("dtype", "reason"),
    [(np.float32, "floating-point pixels"), (np.int32, "32-bit integer pixels")],
)
def test_pixels_without_a_known_range_are_refused(dtype: type, reason: str) -> None:
    with pytest.raises(ImageError, match=reason):
        decode(encoded("TIFF", Image.fromarray(np.ones((4, 4), dtype))), "x.tif")


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_goes_over_white(mode: str) -> None:
    image = Image.new(mode, (2, 1), (0,) * len(mode))
    image.putpixel((1, 0), (10,) * (len(mode) - 1) + (255,))
    assert rgb(encoded("PNG", image))[0].tolist() == [[255] * 3, [10] * 3]


def test_palette_with_transparency_goes_over_white() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([9, 9, 9, 50, 60, 70] + [0] * 762)
    image.putpixel((1, 0), 1)
    got = rgb(encoded("PNG", image, transparency=0))
    assert got[0].tolist() == [[255] * 3, [50, 60, 70]]


def test_half_transparent_is_mixed() -> None:
    got = rgb(encoded("PNG", Image.new("RGBA", (1, 1), (0, 0, 0, 128))))
    assert abs(int(got[0, 0, 0]) - 127) <= 1


@pytest.mark.parametrize("mode", ["L", "1", "CMYK", "P"])
def test_other_modes_become_rgb(mode: str) -> None:
    image = Image.fromarray(PIXELS).convert(mode)
    kind = "JPEG" if mode == "CMYK" else "PNG"
    expected = np.asarray(image.convert("RGB"), dtype=int)
    # JPEG at its default quality moves random pixels a lot; the mean must stay
    got = rgb(encoded(kind, image)).astype(int)
    assert abs(got.mean() - expected.mean()) < (10 if kind == "JPEG" else 1e-9)


def test_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = rgb(encoded("PNG", exif=exif))
    np.testing.assert_array_equal(turned, np.rot90(PIXELS, -1))


def test_broken_exif_does_not_matter() -> None:
    data = encoded("JPEG", exif=b"Exif\0\0" + b"\xff" * 40)
    assert rgb(data).shape == PIXELS.shape


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    for kind in ("GIF", "PNG", "TIFF", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(kind, frames[0], save_all=True, append_images=frames[1:], **options)
        assert rgb(data)[0, 0].tolist() == [255, 0, 0], kind


def jpeg_cut(keep: float) -> bytes:
    data = encoded("JPEG", Image.fromarray(np.tile(PIXELS, (8, 8, 1))))
    return data[: int(len(data) * keep)]


def png_bomb() -> bytes:
    """A PNG of 30,000 x 30,000 pixels in its header alone."""
    header = (30000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    chunk = b"IHDR" + header
    return (b"\x89PNG\r\n\x1a\n" + len(header).to_bytes(4, "big") + chunk
            + zlib.crc32(chunk).to_bytes(4, "big") + b"\0\0\0\0IEND\xaeB`\x82")  # fmt: skip


BAD = {
    "empty": (b"", "the file is empty"),
    "one byte": (b"\xff", "not an image of a known format"),
    "html": (b"<!DOCTYPE html><html>404</html>", "not an image of a known format"),
    "text": (b"hello " * 100, "not an image of a known format"),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image of a known format"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image of a known"),
    "jpeg half": (jpeg_cut(0.5), "damaged: .*truncated"),
    "jpeg end": (encoded("JPEG")[:-2], "damaged: .*truncated"),
    "png end": (encoded("PNG")[:-20], "damaged: the end of the PNG file is missing"),
    "png middle": (encoded("PNG")[:400], "damaged"),
    "webp end": (encoded("WEBP")[:-20], "damaged"),
    "bmp end": (encoded("BMP")[:-20], "damaged"),
    "gif half": (encoded("GIF")[:60], "damaged|not an image"),
    "tiff half": (encoded("TIFF")[:500], "damaged|not an image"),
    "bomb": (png_bomb(), r"more than 89478485 pixels"),
    "long": (encoded("PNG", Image.new("RGB", (20000, 1))), "20000 x 1 is longer than 100:1"),
    "tall": (encoded("PNG", Image.new("RGB", (1, 20000))), "1 x 20000 is longer than 100:1"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BAD)
def test_bad_file_gives_path_and_reason(tmp_path: Path, name: str) -> None:
    data, reason = BAD[name]
    path = tmp_path / "x.jpg"
    path.write_bytes(data)
    with pytest.raises(ImageError, match=reason) as caught:
        open_image(path)
    assert caught.value.path == str(path)
    assert str(caught.value) == f"{path}: {caught.value.reason}"
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
def test_damaged_bytes_give_an_image_or_an_image_error(kind: str) -> None:
    data = encoded(kind)
    draw = random.Random(1)
    outcomes = set()
    for _ in range(60):
        broken = bytearray(data)
        for _ in range(draw.randint(1, 8)):
            broken[draw.randrange(len(broken))] = draw.randrange(256)
        cut = bytes(broken[: draw.randrange(1, len(broken) + 1)])
        try:
            outcomes.add(decode(cut, "x").mode)
        except ImageError as error:
            outcomes.add("error" if error.reason else "no reason")
    assert "error" in outcomes
    assert outcomes <= {"RGB", "error"}


def test_one_pixel_is_an_image() -> None:
    assert rgb(encoded("PNG", Image.new("RGB", (1, 1), "red"))).tolist() == [[[255, 0, 0]]]


def test_things_that_are_no_files_do_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "dangling.jpg").symlink_to(tmp_path / "nothing")
    (tmp_path / "loop.jpg").symlink_to(tmp_path / "loop.jpg")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / "socket.jpg"))
    reasons = {
        "pipe.jpg": "pipe, socket or device", "socket.jpg": "pipe, socket or device",
        "folder.jpg": "a folder", "dangling.jpg": "a link to nothing", "gone.jpg": "no such file",
        "loop.jpg": "symbolic links",
    }  # fmt: skip
    for name, reason in reasons.items():
        with pytest.raises(ImageError, match=reason):
            open_image(tmp_path / name)
    server.close()
