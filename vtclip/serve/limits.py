# SPDX-License-Identifier: Apache-2.0
"""What one request may cost, and the refusal of what costs more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

API_VERSION = 1
AT_ONCE = 4  # requests that are decoded at once, at most; fewer on fewer cores
OPEN = 16  # requests with a body that are read, wait or are computed


@dataclass(frozen=True)
class Limits:
    """max_upload: bytes of a body. max_images: images of a request. max_pixels: of one image.
    timeout: seconds from the first byte of a request to its answer.
    """

    max_upload: int = 32 * 2**20
    max_images: int = 100
    max_pixels: int = 50_000_000
    timeout: float = 30.0


@dataclass
class Refusal(Exception):
    """A request that is not answered: HTTP status, one line, further headers."""

    status: int
    line: str
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.line


def busy(line: str) -> Refusal:
    return Refusal(503, line, {"Retry-After": "1"})


def too_late(timeout: float) -> Refusal:
    return Refusal(504, f"the answer took more than {timeout:g} s, the limit")
