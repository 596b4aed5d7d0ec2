# SPDX-License-Identifier: Apache-2.0
"""Perceptual hashes of pictures, by ImageHash's phash where the extra "duplicates" is installed."""

from __future__ import annotations

import functools
import importlib.util
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

LEAST_CONTRAST = 16  # of 255: below it, bits are noise
SIDE = 64
_lock = threading.Lock()


def perceptual_digest(image: Image) -> str | None:
    """64 bits of an RGB image as 16 hex digits; None for a flat one, or without ImageHash.

    Copies that were encoded or scaled anew differ in few bits. A large image is first reduced by a
    whole number, to SIDE pixels or more, which costs a tenth of the time.
    """
    phash = _phash()
    if phash is None:
        return None
    grey = image.reduce(max(1, min(image.size) // SIDE)).convert("L")
    if int(np.ptp(np.asarray(grey))) < LEAST_CONTRAST:
        return None
    return str(phash(grey))


def _phash() -> Callable[[Any], Any] | None:
    with _lock:
        return _found()


@functools.lru_cache(maxsize=1)
def _found() -> Callable[[Any], Any] | None:
    if importlib.util.find_spec("imagehash") is None:
        return None
    import imagehash

    phash: Callable[[Any], Any] = imagehash.phash
    return phash
