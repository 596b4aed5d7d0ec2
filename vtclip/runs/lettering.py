# SPDX-License-Identifier: Apache-2.0
"""Letters and colours of the pictures that a run draws with Pillow."""

from __future__ import annotations

import functools
import unicodedata
from typing import TYPE_CHECKING, TypeAlias

from vtclip.files import printable

if TYPE_CHECKING:
    from PIL import ImageFont

    Font: TypeAlias = ImageFont.FreeTypeFont

INK, SOFT, RULE = (25, 25, 25), (110, 110, 110), (222, 222, 222)
RIGHT, WRONG = (42, 120, 214), (222, 82, 30)  # full strength of what is for something, and against
LETTERS = 26  # of a class name


@functools.cache
def font_of(size: int) -> Font:
    """Pillow's own font; ImportError of a Pillow without it."""
    from PIL import ImageFont

    font = ImageFont.load_default(size=size)
    if not isinstance(font, ImageFont.FreeTypeFont):
        raise ImportError("this Pillow was built without FreeType")
    return font


def class_shown(k: int, name: str, letters: int = LETTERS) -> str:
    """`name` of class number k in at most that many letters.

    Pillow's own font has ASCII letters only: another name is written without its accents, behind
    the number of its class.
    """
    text = printable(name)
    if not text.isascii():
        plain = plain_letters(text)
        text = f"{k}: {plain}" if plain.strip() else f"class {k}"
    return text if len(text) <= letters else text[: letters - 3] + "..."


def plain_letters(text: str) -> str:
    """`text` without accents and without letters that the font does not have."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii")
