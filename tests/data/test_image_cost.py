# SPDX-License-Identifier: Apache-2.0
"""Small files that would hold a thread or its memory: refused with limit and figure, or cheap."""

from __future__ import annotations

import io
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from commands import environment
from PIL import Image

from vtclip.data import image_cost
from vtclip.data.decode import ImageError, decode
from vtclip.data.hashing import ExtractionReport
from vtclip.data.image_cost import too_costly


def encoded(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    (image or Image.new("RGB", (16, 16))).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def progressive(scans: int, side: int = 16) -> bytes:
    """A progressive JPEG whose last scan comes again and again."""
    data = encoded("JPEG", Image.new("L", (side, side), 9), progressive=True)
    last, end = data.rindex(b"\xff\xda"), len(data) - 2
    return data[:end] + data[last:end] * (scans - data.count(b"\xff\xda")) + data[end:]


def with_segments(*segments: bytes) -> bytes:
    data = encoded("JPEG")
    return data[:2] + b"".join(segments) + data[2:]


def with_chunks(*chunks: bytes) -> bytes:
    data = encoded("PNG")
    return data[:33] + b"".join(chunks) + data[33:]


def png_of_16_bits(side: int, top: int) -> bytes:
    """Colours of 16 bits, black but for one value of `top`."""
    packer = zlib.compressobj(1)
    rows = packer.compress(b"\0" + struct.pack(">H", top) + b"\0" * (6 * side - 2))
    for _ in range(side - 1):
        rows += packer.compress(b"\0" * (6 * side + 1))
    header = struct.pack(">IIBBBBB", side, side, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", rows + packer.flush()) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


BOMB = zlib.compress(b"\0" * 2_000_000)
COSTLY = {
    "scans": (lambda: progressive(101), "101 scans, the limit at its size is 100"),
    "many scans": (lambda: progressive(2000), "2000 scans, the limit at its size is 100"),
    "bits of EXIF": (
        lambda: with_segments(*[segment(0xE1, b"Exif\0\0x")] * 65),
        "more than 64 segments of EXIF data",
    ),
    "segments": (
        lambda: with_segments(*[segment(0xEA, b"")] * 65_600),
        "more than 65536 segments",
    ),
    "fill bytes": (lambda: with_segments(b"\xff" * 70_000), "more than 65536 segments"),
    "rubbish": (
        lambda: with_segments(segment(0xEA, b""), b"\0" * 70_000),
        "more than 65536 segments",
    ),
    "chunks": (lambda: with_chunks(*[chunk(b"abCd", b"")] * 65_600), "more than 65536 chunks"),
    "text": (
        lambda: with_chunks(chunk(b"zTXt", b"k\0\0" + BOMB)),
        "a text or colour profile of more than 1048576 bytes unpacked",
    ),
    "profile": (
        lambda: with_chunks(chunk(b"iCCP", b"k\0\0" + BOMB)),
        "a text or colour profile of more than 1048576 bytes unpacked",
    ),
    "texts": (
        lambda: with_chunks(*[chunk(b"zTXt", b"k\0\0" + zlib.compress(b"\0" * 1_000_000))] * 70),
        "bytes or more unpacked, the limit is 67108864",
    ),
}


@pytest.mark.parametrize("name", COSTLY)
def test_a_costly_file_is_refused_with_limit_and_figure(name):
    make, reason = COSTLY[name]
    data = make()
    start = time.process_time()
    with pytest.raises(ImageError) as caught:
        decode(data, "x")
    assert caught.value.reason.startswith("too costly to decode: ")
    assert reason in caught.value.reason
    assert time.process_time() - start < 5
    (line,) = ExtractionReport(skipped=[["x", caught.value.reason]]).lines()[-1:]
    assert reason in line


@pytest.mark.parametrize(
    "data",
    [
        progressive(100),
        encoded("JPEG", progressive=True),
        # a scan's marker in other data is none
        with_segments(segment(0xE2, b"\xff\xda" * 30_000)),
        with_segments(segment(0xE2, b"\xff\xda" * 30_000)) + progressive(200),
        with_segments(*[segment(0xE1, b"Exif\0\0MM\0*\0\0\0\x08\0\0")] * 3),
        with_chunks(chunk(b"zTXt", b"k\0\0" + zlib.compress(b"\0" * 1_000_000))),
        *(encoded(kind) for kind in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP")),
    ],
)
def test_a_usual_file_is_decoded(data):
    assert too_costly(data) is None
    assert decode(data, "x").size == (16, 16)


def test_long_files_have_many_chunks(monkeypatch):
    monkeypatch.setattr(image_cost, "MAX_PARTS", 10)
    assert too_costly(with_chunks(*[chunk(b"abCd", b"x" * 1500)] * 20)) is None
    assert too_costly(with_chunks(*[chunk(b"abCd", b"x" * 100)] * 20)) is not None


def test_large_files_have_fewer_scans(monkeypatch):
    assert too_costly(progressive(60, 32)) is None
    monkeypatch.setattr(image_cost, "MAX_SCANNED", 50 * 32 * 32)
    assert too_costly(progressive(60, 32)) == "60 scans, the limit at its size is 50"


def test_cut_files_end_the_walk():
    for data in (progressive(200), with_chunks(chunk(b"zTXt", b"k\0\0" + BOMB))):
        for end in range(0, len(data), max(1, len(data) // 300)):
            too_costly(data[:end])


PEAK = """
import resource, sys
from PIL import Image
import torchvision.io
from vtclip.data.decode import decode
data = open(sys.argv[1], "rb").read()
decode(open(sys.argv[2], "rb").read(), "x")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
decode(data, "x")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts KiB as Linux does")
@pytest.mark.parametrize(
    ("name", "per_pixel"), [("rgb", 6), ("rgb16", 20), ("grey16", 12), ("rgba", 12)]
)
def test_decoding_takes_few_bytes_per_pixel(tmp_path: Path, name, per_pixel):
    """Of 9 million pixels; in float64 16-bit colours took 60, and transparency 20."""
    side = 3000
    grey = np.zeros((side, side), np.uint16)
    grey[0, 0] = 1000
    data = {
        "rgb": lambda: encoded("PNG", Image.new("RGB", (side, side))),
        "rgba": lambda: encoded("PNG", Image.new("RGBA", (side, side))),
        "grey16": lambda: encoded("PNG", Image.fromarray(grey)),
        "rgb16": lambda: png_of_16_bits(side, 1000),
    }[name]()
    (tmp_path / "large").write_bytes(data)
    (tmp_path / "small").write_bytes(png_of_16_bits(8, 1000))
    words = [sys.executable, "-c", PEAK, str(tmp_path / "large"), str(tmp_path / "small")]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < per_pixel * side**2 + 2**24
