# SPDX-License-Identifier: Apache-2.0
"""One page on why a class and not another: the image, what weighs most for and against, the sum."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath

from PIL import Image, ImageDraw, ImageOps

from vtclip.files import printable, several
from vtclip.runs.lettering import INK, RIGHT, RULE, SOFT, WRONG, class_shown, font_of, plain_letters
from vtclip.runs.training_images import TrainingImages
from vtclip.runs.why import IMAGE, Row, Why

MOST = 3  # pictures for, and pictures against
LEFT, THUMB, GAP, MARGIN = 300, 168, 14, 18
CAPTION = 64  # height of three lines under a picture
LINE = 26  # height of a line of the sum
EMPTY = (240, 240, 240)
WORDS = {"prompts": "the prompts", "shared": "what any image gets"}


def draw_page(
    picture: Image.Image, why: Why, images: TrainingImages, heat: Image.Image | None = None
) -> Image.Image:
    """The page in RGB: on the left `picture` and `heat`, a heat map of the class, if there is one;
    on the right up to three rows for and three against, with the pictures that can be opened, and
    bars of everything that the log-odds are the sum of.
    """
    label, other = _class(why.label, 34), _class(why.other, 34)
    width = 2 * MARGIN + LEFT + 2 * GAP + MOST * (THUMB + GAP)
    bars = _bars(why)
    right = 2 * (30 + THUMB + CAPTION) + 34 + len(bars) * LINE
    left = 2 * LEFT + 60 if heat is not None else LEFT + 30
    notes = [line for note in why.notes for line in _wrapped(_ascii(note), width - 2 * MARGIN)]
    top = 78 + 18 * len(notes)
    canvas = Image.new("RGB", (width, top + max(left, right) + MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    title = f"{label} {100 * why.probability:.1f} %"
    draw.text((MARGIN, 14), title, fill=INK, font=font_of(24))
    odds = f"log-odds over {other} ({100 * why.other_probability:.1f} %): {why.log_odds:+.2f} nats"
    draw.text((MARGIN, 46), odds, fill=SOFT, font=font_of(16))
    for number, line in enumerate(notes):
        draw.text((MARGIN, 70 + 18 * number), line, fill=SOFT, font=font_of(13))
    _place(canvas, picture, (MARGIN, top), LEFT)
    if heat is not None:
        y = top + LEFT + 10
        draw.text((MARGIN, y), f"where {label} looks, by vtclip", fill=INK, font=font_of(15))
        _place(canvas, heat, (MARGIN, y + 24), LEFT)
    x, y = MARGIN + LEFT + 2 * GAP, top
    for colour, words, sign in ((RIGHT, f"for {label}", 1), (WRONG, f"for {other}", -1)):
        draw.text((x, y), words, fill=colour, font=font_of(17))
        rows = _shown(why, sign)
        for place, row in enumerate(rows):
            _thumbnail(canvas, row, images, (x + place * (THUMB + GAP), y + 26), colour)
        if not rows:
            draw.text((x, y + 30), "no training image", fill=SOFT, font=font_of(14))
        y += 30 + THUMB + CAPTION
    _draw_bars(canvas, bars, (x, y), width - MARGIN - x)
    return canvas


def _shown(why: Why, sign: int) -> list[Row]:
    """The rows with pictures, for (1) or against (-1)."""
    return [row for row in why.rows if row.nats * sign > 0][:MOST]


def _thumbnail(
    canvas: Image.Image,
    row: Row,
    images: TrainingImages,
    at: tuple[int, int],
    colour: tuple[int, int, int],
) -> None:
    """One row: its picture, or its name where there is none, over what it adds."""
    draw, (x, y) = ImageDraw.Draw(canvas), at
    picture = images.open(row.number) if row.kind == IMAGE else None
    small = font_of(13)
    if picture is not None:
        _place(canvas, picture, at, THUMB)
    else:
        draw.rectangle((x, y, x + THUMB - 1, y + THUMB - 1), fill=EMPTY)
        words = "no picture" if row.kind == IMAGE else "its prompts"
        middle = (x + THUMB / 2, y + THUMB / 2)
        draw.text(middle, words, fill=SOFT, font=small, anchor="mm")
    below = y + THUMB + 4
    draw.text((x, below), f"{row.nats:+.2f}", fill=colour, font=font_of(17))
    cosine = f"cosine {row.cosine:.2f}"
    draw.text((x + THUMB, below + 2), cosine, fill=SOFT, font=small, anchor="ra")
    draw.text((x, below + 21), _fitting(_class(row.label, 40), small), fill=INK, font=small)
    name = PurePosixPath(row.name).name if images.names is not None else f"no. {row.number + 1}"
    if row.kind == IMAGE:
        draw.text((x, below + 38), _fitting(_ascii(name), small), fill=SOFT, font=small)


def _place(canvas: Image.Image, picture: Image.Image, at: tuple[int, int], side: int) -> None:
    """`picture` as large as it can be in the middle of a square; small ones keep their pixels."""
    method = Image.Resampling.NEAREST if max(picture.size) < side // 2 else None
    fitted = ImageOps.contain(
        picture.convert("RGB"), (side, side), method or Image.Resampling.BICUBIC
    )
    square = Image.new("RGB", (side, side), EMPTY)
    square.paste(fitted, ((side - fitted.width) // 2, (side - fitted.height) // 2))
    canvas.paste(square, at)


def _bars(why: Why) -> list[tuple[str, float]]:
    """The lines of the sum: what there is besides rows, those with a picture, others."""
    lines = [(WORDS.get(name, name), nats) for name, nats in why.terms.items()]
    others, rest = why.rest_images + why.rest_texts + len(why.rows), why.rest
    rest += sum(row.nats for row in why.rows)
    for words, sign in (("for", 1), ("against", -1)):
        nats = [row.nats for row in _shown(why, sign)]
        others, rest = others - len(nats), rest - sum(nats)
        if nats:
            lines.append((f"the {len(nats)} {words}", sum(nats)))
    if others:
        lines.append((several(others, "other"), rest))
    return [*lines, ("sum", why.log_odds)]


def _draw_bars(
    canvas: Image.Image, bars: Sequence[tuple[str, float]], at: tuple[int, int], width: int
) -> None:
    draw, (x, y), font = ImageDraw.Draw(canvas), at, font_of(14)
    draw.text((x, y), "log-odds, in nats", fill=INK, font=font_of(15))
    y += 26
    start, room = x + 170, width - 170 - 64
    low = min(0.0, *(nats for _, nats in bars))
    high = max(0.0, *(nats for _, nats in bars))
    scale = room / max(high - low, 1e-9)
    zero = start - low * scale
    end = y + len(bars) * LINE
    draw.line((zero, y, zero, end - 6), fill=RULE, width=1)
    for words, nats in bars:
        draw.text(
            (x, y + LINE / 2 - 3), _fitting(words, font, 160), fill=INK, font=font, anchor="lm"
        )
        tip = zero + nats * scale
        fill = RIGHT if nats > 0 else WRONG
        draw.rectangle((min(zero, tip), y + 2, max(zero, tip), y + LINE - 9), fill=fill)
        value = (x + width, y + LINE / 2 - 3)
        draw.text(value, f"{nats:+.2f}", fill=INK, font=font, anchor="rm")
        y += LINE


def _class(name: str, letters: int) -> str:
    return class_shown(0, name, letters).removeprefix("0: ")


def _ascii(name: str) -> str:
    """`name` in letters that the font has; what it has not is "?"."""
    text = printable(name)
    if text.isascii():
        return text
    return "".join(plain_letters(letter) or "?" for letter in text)


def _wrapped(text: str, width: int) -> list[str]:
    """`text` in lines of at most that many pixels, but for words that are longer."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if lines[-1] and font_of(13).getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _fitting(text: str, font: object, width: int = THUMB) -> str:
    """`text`, without its beginning where it is too wide."""
    length = font.getlength  # type: ignore[attr-defined]
    if length(text) <= width:
        return text
    while text and length("..." + text) > width:
        text = text[1:]
    return "..." + text
