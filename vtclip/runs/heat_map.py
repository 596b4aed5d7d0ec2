# SPDX-License-Identifier: Apache-2.0
"""Where in the image a class looks: its cross-attention weights as a heat map over the picture."""

from __future__ import annotations

import math

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from torch.nn import functional as F

SIDE = 320  # pixels of each panel


def heat_map(weights: Tensor, height: int, width: int) -> Tensor:
    """Weights [L] of a square grid of tokens -> [height, width] in 0..1, bilinear."""
    g = math.isqrt(len(weights))
    if g * g != len(weights):
        raise ValueError(f"heat_map: weights must be a square grid, got {len(weights)} tokens")
    grid = weights.detach().float().reshape(1, 1, g, g)
    heat = F.interpolate(grid, size=(height, width), mode="bilinear", align_corners=False)[0, 0]
    low, high = heat.amin(), heat.amax()
    return (heat - low) / (high - low) if high > low else torch.zeros_like(heat)


def overlay(image: Image.Image, heat: Tensor, strength: float = 0.55) -> Image.Image:
    """Colour `heat` [h, w] (dark blue, red, yellow) and blend it over `image` of the same size."""
    grey = Image.fromarray((heat * 255).round().to(torch.uint8).numpy(), mode="L")
    colour = ImageOps.colorize(grey, black="midnightblue", mid="crimson", white="yellow")
    return Image.blend(image.convert("RGB"), colour, strength)


def to_image(pixels: Tensor, mean: list[float], std: list[float]) -> Image.Image:
    """A preprocessed tensor [3, h, w] back to the picture the model saw."""
    centre, spread = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]
    visible = (pixels.cpu() * spread + centre).clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(visible.permute(1, 2, 0).contiguous().numpy(), mode="RGB")


def under_attention(model_view: Image.Image, weights: Tensor) -> Image.Image:
    """What the model saw, SIDE x SIDE, under the map of weights [L]."""
    model_view = model_view.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return overlay(model_view, heat_map(weights, SIDE, SIDE))


def side_by_side(
    original: Image.Image, model_view: Image.Image, weights: Tensor, caption: str
) -> Image.Image:
    """The original, and what the model saw under the map of weights [L], over one line of text."""
    original = ImageOps.contain(original.convert("RGB"), (2 * SIDE, SIDE))
    right = under_attention(model_view, weights)
    canvas = Image.new("RGB", (original.width + SIDE + 8, SIDE + 32), "white")
    canvas.paste(original, (0, (SIDE - original.height) // 2))
    canvas.paste(right, (original.width + 8, 0))
    font = ImageFont.load_default(size=18)
    ImageDraw.Draw(canvas).text((6, SIDE + 5), caption, fill="black", font=font)
    return canvas
