# SPDX-License-Identifier: Apache-2.0
"""Formats by content and extension: what is read, what is counted, and what needs a library."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, features

from vtclip.data import formats as module
from vtclip.data.decode import ImageError, decode, decode_noted, decoding_trait, open_image
from vtclip.data.folders import scan_folder, walk_images
from vtclip.data.formats import BY_CONTENT, BY_EXTENSION, formats, is_image_name, signature

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)
LOSSLESS = {
    "PPM": "ppm", "TGA": "tga", "PCX": "pcx", "DIB": "dib", "SGI": "sgi", "QOI": "qoi",
    "JPEG2000": "jp2", "ICO": "ico", "BMP": "bmp", "DDS": "dds",
}  # fmt: skip
HEIF_INSTALLED = importlib.util.find_spec("pillow_heif") is not None


def encoded(kind: str, image: Image.Image | None = None, **options: Any) -> bytes:
    buffer = io.BytesIO()
    (image or Image.fromarray(PIXELS)).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def without_heif(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if pillow-heif were not installed."""
    kept = {name: Image.OPEN.pop(name) for name in ("HEIF",) if name in Image.OPEN}
    monkeypatch.setattr(module, "_register_heif", lambda: None)
    module._formats.cache_clear()
    yield
    Image.OPEN.update(kept)
    module._formats.cache_clear()


@pytest.mark.parametrize("kind", LOSSLESS)
def test_formats_of_pillow_keep_every_pixel(tmp_path: Path, kind: str) -> None:
    options: dict[str, Any] = {"sizes": [(40, 20)]} if kind == "ICO" else {}
    path = tmp_path / f"x.{LOSSLESS[kind].upper()}"
    path.write_bytes(encoded(kind, **options))
    assert is_image_name(path.name)
    np.testing.assert_array_equal(np.asarray(open_image(path)), PIXELS)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow is built without AVIF")
def test_avif_comes_close() -> None:
    smooth = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    got = np.asarray(decode(encoded("AVIF", smooth), "x.avif")).astype(int)
    assert np.abs(got - np.asarray(smooth, dtype=int)).mean() < 4


@pytest.mark.skipif(not HEIF_INSTALLED, reason="the extra heic is not installed")
def test_heic_is_read_where_its_library_is(tmp_path: Path) -> None:
    formats()  # registers the library
    smooth = Image.linear_gradient("L").resize((64, 64)).convert("RGB")
    data = encoded("HEIF", smooth)
    got = np.asarray(decode(data, "x.HEIC")).astype(int)
    assert np.abs(got - np.asarray(smooth, dtype=int)).mean() < 4
    assert decoding_trait(data) == "HEIF read"
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "IMG_1.HEIC").write_bytes(data)
    assert scan_folder(tmp_path).names == ["cat/IMG_1.HEIC"]


def test_heic_without_its_library_is_counted(tmp_path: Path, without_heif: None) -> None:
    heic = b"\0\0\0\x18ftypheic"
    for name in ("apple/a.png", "apple/1.HEIC", "apple/2.heic", "pear/3.heif", "pear/b.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded("PNG") if name.endswith("png") else heic)
    (tmp_path / "pear" / "phone.jpg").write_bytes(heic)
    (tmp_path / "pear" / "phone").write_bytes(heic)
    folder = scan_folder(tmp_path)
    assert folder.names == ["apple/a.png", "pear/b.png", "pear/phone.jpg"]
    assert [name for name, _ in folder.skipped] == [
        "apple/1.HEIC", "apple/2.heic", "pear/3.heif", "pear/phone"
    ]  # fmt: skip
    hint = "pip install 'vtclip[heic]'"
    assert folder.remarks == [
        f"2 .heic files in 1 folder of {tmp_path} are not read: {hint}",
        f"1 .heif file in 1 folder of {tmp_path} is not read: {hint}",
        f"1 file without an extension in 1 folder of {tmp_path} is not read: {hint}",
    ]
    with pytest.raises(ImageError, match="HEIF is not read: pip install"):
        open_image(tmp_path / "pear" / "phone.jpg")
    assert decoding_trait(heic) == "HEIF unread"
    (tmp_path / "apple" / "a.png").unlink()
    match = r"no images: apple \(2 files are skipped: .heic is not read: pip install 'vtclip"
    with pytest.raises(ValueError, match=match):
        scan_folder(tmp_path)


def test_images_without_a_known_extension_are_read(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    for name in ("plain", "photo.jpg_large", "x.42"):
        (tmp_path / "cat" / name).write_bytes(encoded("PNG"))
    for name in ("README", "a.txt", "b.txt", "c.xyz"):
        (tmp_path / "cat" / name).write_text("some words")
    (tmp_path / "cat" / "d.CR2").write_bytes(b"raw")
    folder = scan_folder(tmp_path)
    assert folder.names == ["cat/photo.jpg_large", "cat/plain", "cat/x.42"]
    assert folder.passed == {".txt": 2, ".xyz": 1, "no extension": 1}
    assert folder.skipped == [
        ("cat/d.CR2", ".cr2 is not read: camera raw; convert them to JPEG or TIFF")
    ]
    assert len(walk_images(tmp_path)[0]) == 3


def test_nothing_that_starts_a_program_or_is_told_from_noise() -> None:
    known = {*BY_CONTENT, *BY_EXTENSION}
    assert not known & {"EPS", "WMF", "PDF", "MPEG", "GRIB", "BUFR", "HDF5", "SPIDER", "FITS"}
    assert not set(formats().by_content) & set(BY_EXTENSION)
    for ending in (".eps", ".ps", ".pdf", ".wmf", ".svg", ".mpg"):
        assert not is_image_name(f"x{ending}")


@pytest.mark.parametrize("kind", ["TGA", "PCX"])
def test_formats_with_a_weak_signature_need_their_extension(kind: str) -> None:
    data = encoded(kind)
    assert decode(data, f"x.{kind.lower()}").size == (40, 20)
    with pytest.raises(ImageError, match="not an image of a known format"):
        decode(data, "x.jpg")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP", "JPEG2000", "QOI"])
def test_signatures(kind: str) -> None:
    assert signature(encoded(kind)[:16]) == kind
    assert signature(b"BMW is a car, not a picture") is None


def test_frames_are_noted() -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    for kind in ("GIF", "PNG", "TIFF", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(kind, frames[0], save_all=True, append_images=frames[1:], **options)
        image, notes = decode_noted(data, "x")
        assert notes == ("frames",)
        assert image.getpixel((0, 0)) == (255, 0, 0)
        assert decode_noted(encoded(kind, frames[0]), "x").notes == ()
