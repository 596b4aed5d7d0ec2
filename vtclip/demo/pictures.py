# SPDX-License-Identifier: Apache-2.0
"""The demonstration's pictures, drawn with Pillow alone: heat maps with boxes, shots curve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vtclip.demo.scenes import SIDE, Box, Pixels
from vtclip.runs.heat_map import heat_map, overlay

ZOOM = 4  # printed pixels per pixel of a scene
LINE = 18
INK, GREY, BLUE, BOX = (20, 20, 20), (140, 140, 140), (30, 90, 200), (60, 255, 60)


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size=size)


def _boxed(picture: Image.Image, box: Box) -> Image.Image:
    large = picture.resize((SIDE * ZOOM, SIDE * ZOOM), Image.Resampling.NEAREST)
    x0, y0, x1, y1 = (edge * ZOOM for edge in box)
    ImageDraw.Draw(large).rectangle((x0, y0, x1 - 1, y1 - 1), outline=BOX, width=2)
    return large


def heat_panel(pixels: Tensor, weights: Tensor, box: Box, lines: Sequence[str]) -> Image.Image:
    """The scene, and next to it the attention [L] over it; the box on both, `lines` below.

    pixels: uint8 [64, 64, 3].
    """
    scene = Image.fromarray(pixels.numpy(), mode="RGB")
    heat = overlay(scene, heat_map(weights, SIDE, SIDE))
    width = 2 * SIDE * ZOOM + 4
    panel = Image.new("RGB", (width, SIDE * ZOOM + LINE * len(lines) + 6), "white")
    panel.paste(_boxed(scene, box), (0, 0))
    panel.paste(_boxed(heat, box), (SIDE * ZOOM + 4, 0))
    draw = ImageDraw.Draw(panel)
    for row, line in enumerate(lines):
        draw.text((4, SIDE * ZOOM + 2 + LINE * row), line, fill=INK, font=_font(14))
    return panel


def sheet(panels: Sequence[Image.Image], columns: int) -> Image.Image:
    """Panels of one size in rows of `columns`."""
    width, height = panels[0].width + 8, panels[0].height + 8
    canvas = Image.new("RGB", (width * columns, height * math.ceil(len(panels) / columns)), "white")
    for index, panel in enumerate(panels):
        canvas.paste(panel, (width * (index % columns), height * (index // columns)))
    return canvas


def shots_curve(zero_shot: float, adapted: Mapping[int, Sequence[float]]) -> Image.Image:
    """Accuracy against shots: mean over seeds as a line, each seed as a dot, zero-shot dashed."""
    width, height, left, right, top, bottom = 640, 420, 70, 20, 40, 60
    values = [zero_shot, *(value for seeds in adapted.values() for value in seeds)]
    low = max(0.0, math.floor(min(values) * 20 - 0.5) / 20)
    high = min(1.0, math.ceil(max(values) * 20 + 0.5) / 20)
    shots = sorted(adapted)
    first, last = math.log2(shots[0]), math.log2(shots[-1])
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)

    def x_of(count: int) -> float:
        share = (math.log2(count) - first) / (last - first) if last > first else 0.5
        return left + 30 + share * (width - left - right - 60)

    def y_of(value: float) -> float:
        return height - bottom - (value - low) / (high - low) * (height - top - bottom)

    steps = round((high - low) * 20)
    for step in range(steps + 1):
        value = low + step / 20
        draw.line((left, y_of(value), width - right, y_of(value)), fill=(230, 230, 230))
        label = f"{100 * value:.0f} %"
        draw.text((left - 8, y_of(value)), label, fill=INK, font=_font(13), anchor="rm")
    for start in range(left, width - right, 14):
        draw.line((start, y_of(zero_shot), start + 8, y_of(zero_shot)), fill=GREY, width=2)
    place = (width - right, y_of(zero_shot) - 4)
    draw.text(place, "zero-shot", fill=GREY, font=_font(13), anchor="rs")
    means = {count: sum(adapted[count]) / len(adapted[count]) for count in shots}
    draw.line([(x_of(c), y_of(means[c])) for c in shots], fill=BLUE, width=3)
    for count in shots:
        x = x_of(count)
        for value in adapted[count]:
            draw.ellipse((x - 2, y_of(value) - 2, x + 2, y_of(value) + 2), fill=GREY)
        y = y_of(means[count])
        draw.ellipse((x - 5, y - 5, x + 5, y + 5), fill=BLUE)
        draw.text((x, height - bottom + 8), str(count), fill=INK, font=_font(13), anchor="ma")
    draw.rectangle((left, top, width - right, height - bottom), outline=INK)
    centre = (left + width - right) / 2
    draw.text((centre, height - 28), "images per class", fill=INK, font=_font(14), anchor="ma")
    title = "Accuracy on the shifted scenes: VT-CLIP (blue), each seed (dots)"
    draw.text((centre, 12), title, fill=INK, font=_font(15), anchor="ma")
    return canvas


def from_pixels(pixels: Pixels) -> Tensor:
    """A uint8 array [64, 64, 3] as a tensor that owns its memory."""
    return torch.from_numpy(pixels.copy())
