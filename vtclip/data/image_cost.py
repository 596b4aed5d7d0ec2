# SPDX-License-Identifier: Apache-2.0
"""Files that would cost far more time or memory than they weigh, found before they are decoded.

Pixels, bytes and aspect are bounded where a file is opened (vtclip.data.decode). What is bounded
here costs a decoder by the piece, however small the piece is: a scan of a JPEG file goes over all
of its coefficients, and Pillow walks segments and chunks one by one, copying EXIF data of several
segments once for each.
"""

from __future__ import annotations

import re

from vtclip.data.formats import signature

MAX_SCANS = 100  # of a JPEG file, as in libtiff; encoders write ten, exhaustive ones some thirty
MAX_SCANNED = 2**31  # pixels times scans, a few seconds
MAX_PARTS = 65_536  # segments of a JPEG file, chunks of a PNG file
PART_BYTES = 1024  # beyond MAX_PARTS the parts of a PNG file are as long on average
MAX_EXIF_PARTS = 64  # segments of EXIF data, of 64 KiB each; cameras write one
MAX_UNPACKED = 2**20  # bytes of one compressed text or profile in a PNG file, Pillow's own limit
MAX_TEXT = 2**26  # of all of them

_SCAN_MARKER = re.compile(rb"\xff([\x02-\xcf\xd8-\xfe])")  # no stuffing, no restart
START, END, SCAN, EXIF = 0xD8, 0xD9, 0xDA, 0xE1
FRAMES = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
ALONE = (0x00, 0x01, *range(0xD0, 0xD9))  # markers without a length


def too_costly(data: bytes) -> str | None:
    """Why a file of these bytes is not decoded, with the limit and the figure; None where it is."""
    kind = signature(data)
    if kind == "JPEG":
        return _jpeg(data)
    return _png(data) if kind == "PNG" else None


def unpacked_too_much(reason: str) -> str | None:
    """What an error of Pillow's says of a PNG file's texts and profiles, with limit and figure."""
    if "MAX_TEXT_CHUNK" in reason:
        return f"a text or colour profile of more than {MAX_UNPACKED} bytes unpacked, the limit"
    total = re.search(r"(\d+)>MAX_TEXT_MEMORY", reason)
    return f"texts of {total[1]} bytes or more unpacked, the limit is {MAX_TEXT}" if total else None


def _jpeg(data: bytes) -> str | None:
    """Segments up to the first scan, then scans up to the end of the first image."""
    at, parts, exif, size, pixels = 2, 0, 0, len(data), 1
    while at + 4 <= size:
        parts += 1
        marker = data[at + 1]
        if data[at] != 0xFF or marker in (0xFF, *ALONE):  # Pillow passes over it, byte by byte
            at += 1
        elif marker == END:
            return None
        elif marker == SCAN:
            return _scans(data, at, min(MAX_SCANS, MAX_SCANNED // pixels))
        else:
            if marker in FRAMES:
                height, width = (int.from_bytes(data[at + n : at + n + 2], "big") for n in (5, 7))
                pixels = max(pixels, height * width)
            exif += marker == EXIF and data.startswith(b"Exif\0\0", at + 4)
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if exif > MAX_EXIF_PARTS:
            return f"more than {MAX_EXIF_PARTS} segments of EXIF data, the limit"
        if parts > MAX_PARTS:
            return f"more than {MAX_PARTS} segments, or bytes between them, the limit"
    return None


def _scans(data: bytes, at: int, limit: int) -> str | None:
    """The scans from the one at `at` on; in coded data 0xFF is followed by 0 or a restart."""
    if data.count(b"\xff\xda", at) <= limit:
        return None
    scans = parts = 0
    while (found := _SCAN_MARKER.search(data, at)) is not None and found[1][0] != END:
        at = found.start() + 2
        parts += 1
        scans += found[1][0] == SCAN
        if found[1][0] != START:
            at += int.from_bytes(data[at : at + 2], "big")
        if parts > MAX_PARTS:
            return f"more than {MAX_PARTS} segments between its scans, the limit"
    return f"{scans} scans, the limit at its size is {limit}" if scans > limit else None


def _png(data: bytes) -> str | None:
    at, parts = 8, 0
    while at + 12 <= len(data):
        at += 12 + int.from_bytes(data[at : at + 4], "big")
        parts += 1
        if parts > MAX_PARTS and parts * PART_BYTES > at:
            return (
                f"more than {MAX_PARTS} chunks, the limit for chunks below {PART_BYTES} bytes "
                "on average"
            )
    return None
