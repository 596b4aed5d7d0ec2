# SPDX-License-Identifier: Apache-2.0
"""The picture of a confusion matrix, drawn with Pillow: every cell, or the worst pairs of many."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from vtclip.files import several
from vtclip.runs.lettering import INK, RIGHT, RULE, SOFT, WRONG, class_shown, font_of

if TYPE_CHECKING:
    from PIL import Image

    from vtclip.runs.lettering import Font

MOST_CLASSES = 50  # that are drawn as a matrix
MOST_PAIRS = 30
FOOT = "blue: right, orange: wrong; stronger: a larger share of the row"


def draw_confusion(counts: Tensor, class_names: Sequence[str]) -> bytes:
    """A PNG of counts [K, K], row = true class, column = prediction.

    Up to 50 classes the matrix, each row in shares of its images; of more the pairs that are
    confused most, as bars.
    """
    names = [class_shown(k, name) for k, name in enumerate(class_names)]
    total, right = int(counts.sum()), int(counts.diagonal().sum())
    title = f"{right} of {several(total, 'test image')} right ({100 * right / max(1, total):.1f} %)"
    draw = _matrix if len(names) <= MOST_CLASSES else _pairs
    data = io.BytesIO()
    draw(counts, names, title).quantize(256).save(data, "PNG")
    return data.getvalue()


def confused_pairs(counts: Tensor, most: int) -> list[tuple[int, int, int]]:
    """(true class, prediction, count) of the largest counts off the diagonal, largest first."""
    off = counts.clone()
    off.fill_diagonal_(0)
    order = off.flatten().argsort(descending=True, stable=True)[:most]
    K = len(counts)
    cells = [(int(place) // K, int(place) % K, int(off.flatten()[place])) for place in order]
    return [cell for cell in cells if cell[2] > 0]


def _matrix(counts: Tensor, names: Sequence[str], title: str) -> Image.Image:
    from PIL import Image, ImageDraw

    K = len(names)
    cell = 46 if K <= 8 else 32 if K <= 20 else 22 if K <= 35 else 19
    size = max(10, min(15, cell - 8))
    font, small = font_of(size), font_of(max(9, min(14, cell // 2 - 1)))
    wide = max(round(font.getlength(name)) for name in names) + 10
    top, left, side = wide + 74, wide + 30, K * cell
    heading, below = "predicted class", "true class"
    texts = round(font_of(16).getlength(title)), round(font_of(12).getlength(FOOT))
    width = max(left + side + 16, *(text + 24 for text in texts))
    canvas = Image.new("RGB", (width, top + side + 34), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((12, 10), title, fill=INK, font=font_of(16))
    draw.text((left + side / 2, 40), heading, fill=SOFT, font=font_of(13), anchor="ma")
    _upwards(canvas, (8, top + side // 2), below, font_of(13), SOFT, centred=True)
    sums = counts.sum(dim=1).tolist()
    for true, row in enumerate(counts.tolist()):
        y = top + true * cell
        draw.text((left - 6, y + cell / 2), names[true], fill=INK, font=font, anchor="rm")
        _upwards(canvas, (left + true * cell + cell // 2, top - 6), names[true], font, INK)
        for other, count in enumerate(row):
            x = left + other * cell
            share = count / sums[true] if sums[true] else 0.0
            fill = _shade(RIGHT if other == true else WRONG, share) if count else "white"
            draw.rectangle((x, y, x + cell, y + cell), fill=fill, outline=RULE)
            if count:
                ink = "white" if share > 0.45 else INK
                place = (x + cell / 2 + 0.5, y + cell / 2)
                draw.text(place, _short(count, cell), fill=ink, font=small, anchor="mm")
    draw.text((12, top + side + 10), FOOT, fill=SOFT, font=font_of(12))
    return canvas


def _pairs(counts: Tensor, names: Sequence[str], title: str) -> Image.Image:
    from PIL import Image, ImageDraw

    pairs = confused_pairs(counts, MOST_PAIRS)
    sums = counts.sum(dim=1).tolist()
    font, line, bar = font_of(14), 24, 220
    labels = [f"{names[true]} as {names[other]}" for true, other, _ in pairs]
    left = max((round(font.getlength(label)) for label in labels), default=0) + 22
    width = max(left + bar + 150, round(font_of(16).getlength(title)) + 24)
    canvas = Image.new("RGB", (width, 74 + line * max(1, len(pairs))), "white")
    draw = ImageDraw.Draw(canvas)
    draw.text((12, 10), title, fill=INK, font=font_of(16))
    heading = f"{len(names)} classes; those confused most, true class as prediction"
    draw.text((12, 36), heading if pairs else "no image was wrong", fill=SOFT, font=font_of(13))
    largest = max((count for *_, count in pairs), default=1)
    for place, ((true, _, count), label) in enumerate(zip(pairs, labels, strict=True)):
        y = 64 + place * line
        draw.text((left - 8, y + line / 2), label, fill=INK, font=font, anchor="rm")
        end = left + max(2, round(bar * count / largest))
        draw.rectangle((left, y + 4, end, y + line - 5), fill=WRONG)
        note = f"{count} of {sums[true]}"
        draw.text((end + 7, y + line / 2), note, fill=SOFT, font=font_of(13), anchor="lm")
    return canvas


def _upwards(
    canvas: Image.Image,
    at: tuple[int, int],
    text: str,
    font: Font,
    colour: tuple[int, int, int],
    centred: bool = False,
) -> None:
    """`text` turned upwards; it ends (or, centred, lies) at (x, y) = `at`, x being its middle."""
    from PIL import Image, ImageDraw

    width, height = round(font.getlength(text)) + 2, round(font.size) + 6
    strip = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(strip).text((0, height / 2), text, fill=colour, font=font, anchor="lm")
    turned = strip.rotate(90, expand=True)
    x, y = at
    place = (x, y - width // 2) if centred else (x - height // 2, y - width)
    canvas.paste(turned, place)


def _shade(colour: tuple[int, int, int], share: float) -> tuple[int, int, int]:
    """`colour` on white, at a strength that still shows one image of many."""
    strength = 0.12 + 0.88 * share**0.7
    red, green, blue = (round(255 + strength * (value - 255)) for value in colour)
    return red, green, blue


def _short(count: int, cell: int) -> str:
    """`count` in at most 3 digits, or 4 where the cell has room for them."""
    return str(count) if count < (10_000 if cell > 30 else 1000) else f"{count / 1000:.0f}k"
