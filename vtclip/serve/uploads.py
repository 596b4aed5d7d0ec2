# SPDX-License-Identifier: Apache-2.0
"""The body of a request, bounded while it is read, and the images in it.

A body is held in memory and never on disk: its names are for messages alone.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from vtclip.files import printable, several
from vtclip.serve.limits import Limits, Refusal

FIELD = "images"  # of the form
PIECE = 2**16  # bytes that are parsed between two looks at the clock
NAME_LENGTH = 255


@dataclass(frozen=True)
class Upload:
    """An image as it came: what the client calls it, and its bytes."""

    name: str
    data: bytes


@dataclass
class Part:
    headers: dict[bytes, bytes] = field(default_factory=dict)
    name: str = ""
    data: bytearray = field(default_factory=bytearray)


def boundary_of(headers: Mapping[str, str]) -> bytes:
    """What separates the parts, by the headers of a request; a Refusal of any other kind."""
    kind, options = parse_options_header(headers.get("content-type", ""))
    if kind != b"multipart/form-data" or not options.get(b"boundary"):
        line = f"images are sent as multipart/form-data, in fields called {FIELD!r}"
        raise Refusal(415, line)
    return bytes(options[b"boundary"])


def check_length(headers: Mapping[str, str], limits: Limits) -> None:
    """Refuse a body whose header says already that it is too long."""
    length = headers.get("content-length", "")
    if length.isdecimal() and int(length) > limits.max_upload:
        raise _too_long(limits)


async def read_body(stream: AsyncIterator[bytes], limits: Limits) -> bytearray:
    """The whole body; a Refusal as soon as more bytes came than are allowed, announced or not."""
    body = bytearray()
    async for piece in stream:
        if len(body) + len(piece) > limits.max_upload:
            raise _too_long(limits)
        body += piece
    return body


def images_of(
    body: bytearray, boundary: bytes, limits: Limits, check: Callable[[], None]
) -> list[Upload]:
    """The images of a body. check: called now and then, raises where time is up."""
    form = _Form(limits)
    try:
        parser = MultipartParser(boundary, form.callbacks())
        for start in range(0, len(body), PIECE):
            check()
            parser.write(bytes(body[start : start + PIECE]))
        parser.finalize()
    except FormParserError as error:
        reason = printable(" ".join(str(error).split()))[:160]
        raise Refusal(400, f"the body is not multipart/form-data: {reason}") from None
    if not form.complete:
        raise Refusal(400, "the body is not multipart/form-data: its end is missing")
    if not form.found:
        raise Refusal(422, f"no images: send at least one file in a field called {FIELD!r}")
    return form.found


class _Form:
    """Collects the parts of a form; fields of other names are refused."""

    def __init__(self, limits: Limits) -> None:
        self.found: list[Upload] = []
        self.complete = False
        self._limits = limits
        self._part = Part()
        self._header, self._value = bytearray(), bytearray()

    def callbacks(self) -> Any:
        names = ["part_begin", "part_data", "part_end", "header_field", "header_value"]
        names += ["header_end", "headers_finished", "end"]
        return {f"on_{name}": getattr(self, f"_{name}") for name in names}

    def _part_begin(self) -> None:
        self._part = Part()

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        self._part.headers[bytes(self._header).lower()] = bytes(self._value)
        self._header, self._value = bytearray(), bytearray()

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._part.headers.get(b"content-disposition", b""))
        field_name = _text(options.get(b"name", b""))
        if field_name != FIELD:
            shown = printable(field_name[:NAME_LENGTH])
            raise Refusal(422, f"unknown field {shown!r}: images are in fields called {FIELD!r}")
        number = len(self.found) + 1
        self._part.name = _text(options.get(b"filename", b"")) or f"image {number}"
        if number > self._limits.max_images:
            most = several(self._limits.max_images, "image")
            raise Refusal(413, f"more than {most} in one request, the limit")

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        self._part.data += data[start:end]

    def _part_end(self) -> None:
        self.found.append(Upload(self._part.name, bytes(self._part.data)))
        self._part = Part()

    def _end(self) -> None:
        self.complete = True


def _text(name: bytes) -> str:
    """A name of at most NAME_LENGTH letters; bytes that are no UTF-8 as in file names."""
    return name.decode("utf-8", "surrogateescape")[:NAME_LENGTH]


def _too_long(limits: Limits) -> Refusal:
    return Refusal(413, f"the body has more than {limits.max_upload} bytes, the limit")
