# SPDX-License-Identifier: Apache-2.0
"""Drawn 64 x 64 scenes with captions: the world of the demonstration.

A scene is a background, one target and further items. Each item is a shape (a signed distance in
unit coordinates) filled with a texture of two tones. Two domains are drawn by the same code:

- the training domain: calm backgrounds, saturated named colours, crisp textures, little noise;
- the shifted domain: cluttered backgrounds, washed-out palettes, distorted textures, hard light,
  thin lines in front, strong noise. Its classes are `CLASS_NAMES`, texture x shape.

Everything is a function of the generator handed in: equal seeds draw equal pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]
Pixels = NDArray[np.uint8]
Box = tuple[int, int, int, int]

SIDE = 64
SHAPES = (
    "circle", "square", "triangle", "star", "cross", "ring", "heart", "moon",
    "diamond", "hourglass",
)  # fmt: skip
TEXTURES = ("plain", "striped", "dotted", "checked")
SIZES = ("small", "large")
PLACES = ("top", "bottom", "left", "right", "center")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "green": (46, 160, 67),
    "blue": (38, 84, 214),
    "yellow": (240, 210, 40),
    "orange": (242, 132, 30),
    "purple": (128, 48, 168),
    "pink": (244, 130, 180),
    "brown": (120, 74, 36),
    "white": (242, 242, 242),
    "black": (22, 22, 22),
    "gray": (128, 128, 128),
    "cyan": (40, 200, 210),
}
COLOUR_NAMES = tuple(COLOURS)
CLASS_NAMES = [f"{texture} {shape}" for shape in SHAPES[:8] for texture in TEXTURES[1:]]

_GRID = np.arange(SIDE, dtype=np.float32) + np.float32(0.5)


@dataclass(frozen=True)
class Item:
    """One object: indices into the name tables, geometry in pixels, two tones in 0..255."""

    shape: int
    texture: int
    colour: int  # index into COLOUR_NAMES, -1 for a colour without a name
    centre: tuple[float, float]  # x, y
    radius: float
    angle: float
    tone: tuple[float, float, float]
    second: tuple[float, float, float]
    period: float  # of the texture, pixels
    slant: float  # direction of the texture, radians
    phase: float
    wave: float = 0.0  # bending of the texture, share of its period

    @property
    def size(self) -> int:
        """0 small, 1 large, -1 between the two."""
        return 0 if self.radius < 10.0 else 1 if self.radius > 13.5 else -1

    @property
    def place(self) -> int:
        """Index into PLACES, -1 if no single word describes it."""
        x, y = (self.centre[0] - SIDE / 2) / SIDE, (self.centre[1] - SIDE / 2) / SIDE
        if max(abs(x), abs(y)) < 0.1:
            return 4
        if abs(abs(x) - abs(y)) < 0.08:
            return -1
        if abs(y) > abs(x):
            return 0 if y < 0 else 1
        return 2 if x < 0 else 3


@dataclass(frozen=True)
class Scene:
    """What is drawn; item 0 is the target. Backgrounds are two tones joined along `slope`."""

    items: tuple[Item, ...]
    background: tuple[tuple[float, float, float], tuple[float, float, float]]
    backdrop: int = -1  # index into COLOUR_NAMES, -1 without a name
    slope: float = 0.0
    light: tuple[float, float] = (0.0, 0.0)  # strength, direction
    noise: float = 4.0  # standard deviation, 0..255
    clutter: int = 0  # number of blobs behind and lines around
    lines: int = 0  # thin lines in front
    tint: tuple[float, float, float] = (1.0, 1.0, 1.0)
    haze: float = 0.0  # share of mid-grey mixed into everything


def _polar_star(u: Floats, v: Floats) -> Floats:
    angle = np.arctan2(u, -v)
    fold = np.abs(np.mod(angle / (2 * np.pi / 5) + 0.5, 1.0) - 0.5) * 2  # 0 on a tip, 1 in a notch
    return np.hypot(u, v) - (1.05 - 0.62 * fold)


def _heart(u: Floats, v: Floats) -> Floats:
    x, y = u * 1.12, -v * 1.12 + 0.22
    side = np.abs(x)
    lobes = np.hypot(side - 0.46, y - 0.42) - 0.52
    wedge = np.maximum(side * 0.79 - (y + 0.95) * 0.61, y - 0.3)
    heart: Floats = np.minimum(lobes, wedge)
    return heart


def _cross(u: Floats, v: Floats) -> Floats:
    a, b = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(a - 0.32, b - 0.98), np.maximum(b - 0.32, a - 0.98))


def _hourglass(u: Floats, v: Floats) -> Floats:
    return np.maximum(np.abs(u) - np.abs(v) * 0.9 - 0.08, np.abs(v) - 0.86) * 0.8


# Negative inside; unit radius; only the sign and the slope near zero matter.
_DISTANCE: tuple[Callable[[Floats, Floats], Floats], ...] = (
    lambda u, v: np.hypot(u, v) - 0.9,
    lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.8,
    lambda u, v: np.maximum(np.abs(u) * 0.87 - (v + 1.0) * 0.5, v - 0.68),
    _polar_star,
    _cross,
    lambda u, v: np.abs(np.hypot(u, v) - 0.7) - 0.26,
    _heart,
    lambda u, v: np.maximum(np.hypot(u, v) - 0.95, 0.72 - np.hypot(u - 0.5, v)),
    lambda u, v: (np.abs(u) / 0.6 + np.abs(v) - 1.0) * 0.6,
    _hourglass,
)


def _window(centre: float, reach: float) -> slice:
    return slice(max(0, int(centre - reach)), max(0, min(SIDE, int(centre + reach) + 2)))


def _coverage(item: Item) -> tuple[slice, slice, Floats, Floats, Floats]:
    """Rows, columns, coverage 0..1 [h, w] and the pixel offsets (x, y) from the centre."""
    rows = _window(item.centre[1], item.radius * 1.15)
    cols = _window(item.centre[0], item.radius * 1.15)
    x = (_GRID[cols] - np.float32(item.centre[0]))[None, :]
    y = (_GRID[rows] - np.float32(item.centre[1]))[:, None]
    c, s = np.float32(np.cos(item.angle)), np.float32(np.sin(item.angle))
    u, v = (c * x + s * y) / item.radius, (c * y - s * x) / item.radius
    inside = np.clip(0.5 - _DISTANCE[item.shape](u, v) * item.radius, 0.0, 1.0)
    return rows, cols, inside.astype(np.float32), x, y


def _second_tone(item: Item, x: Floats, y: Floats) -> Floats | float:
    """Share 0..1 of the second tone at each pixel, [h, w]."""
    if item.texture == 0:
        return 0.0
    c, s = np.cos(item.slant), np.sin(item.slant)
    a, b = (c * x + s * y) / item.period + item.phase, (c * y - s * x) / item.period + item.phase
    if item.wave:
        a = a + item.wave * np.sin(2.1 * b)
    if item.texture == 1:
        field = np.sin(2 * np.pi * a) * 2.5
    elif item.texture == 2:
        # dots: distance to the nearest point of the lattice, radius 0.3 of its period
        da, db = np.mod(a, 1.0) - 0.5, np.mod(b, 1.0) - 0.5
        field = (0.32 - np.hypot(da, db)) * item.period * 2.0
    else:
        field = np.sin(np.pi * a) * np.sin(np.pi * b) * 4.0
    share: Floats = np.clip(0.5 + field, 0.0, 1.0).astype(np.float32)
    return share


def item_mask(item: Item) -> Floats:
    """Coverage of one item over the whole image, [64, 64] in 0..1."""
    rows, cols, inside, _, _ = _coverage(item)
    mask = np.zeros((SIDE, SIDE), np.float32)
    mask[rows, cols] = inside
    return mask


def item_box(item: Item) -> Box:
    """The smallest half-open box (x0, y0, x1, y1) around every pixel the item touches."""
    rows, cols, inside, _, _ = _coverage(item)
    down = np.flatnonzero(inside.max(axis=1, initial=0) > 0) + rows.start
    right = np.flatnonzero(inside.max(axis=0, initial=0) > 0) + cols.start
    if not (len(down) and len(right)):
        return (0, 0, 0, 0)
    return int(right[0]), int(down[0]), int(right[-1]) + 1, int(down[-1]) + 1


def _paint(image: Floats, item: Item) -> None:
    rows, cols, inside, x, y = _coverage(item)
    share = _second_tone(item, x, y)
    first = np.asarray(item.tone, np.float32)
    delta = np.asarray(item.second, np.float32) - first
    tone = first + np.asarray(share, np.float32)[..., None] * delta
    patch = image[rows, cols]
    patch += inside[..., None] * (tone - patch)


def _clutter(image: Floats, count: int, rng: np.random.Generator) -> None:
    """Soft blobs and streaks: structure without a name."""
    for _ in range(count):
        cx, cy = rng.uniform(0, SIDE, 2)
        long, short = rng.uniform(6, 26), rng.uniform(1.5, 6)
        angle = rng.uniform(0, np.pi)
        c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        x, y = (_GRID - np.float32(cx))[None, :], (_GRID - np.float32(cy))[:, None]
        u, v = (c * x + s * y) / np.float32(long), (c * y - s * x) / np.float32(short)
        weight = 0.6 / (1.0 + (u * u + v * v) ** 2)
        tone = rng.uniform(50, 205, 3).astype(np.float32)
        image += weight[..., None] * (tone - image)


def _lines(image: Floats, count: int, rng: np.random.Generator) -> None:
    for _ in range(count):
        cx, cy = rng.uniform(8, SIDE - 8, 2)
        angle = rng.uniform(0, np.pi)
        c, s = np.float32(np.cos(angle)), np.float32(np.sin(angle))
        offset = c * (_GRID - np.float32(cy))[:, None] - s * (_GRID - np.float32(cx))[None, :]
        weight = 0.7 * np.clip(1.1 - np.abs(offset), 0.0, 1.0)
        tone = rng.uniform(40, 215, 3).astype(np.float32)
        image += weight[..., None] * (tone - image)


def render_scene(scene: Scene, rng: np.random.Generator) -> tuple[Pixels, Box]:
    """Draws `scene`; the generator decides only clutter, lines and noise.

    Returns the pixels [64, 64, 3] and the half-open box (x0, y0, x1, y1) of item 0.
    """
    c, s = np.float32(np.cos(scene.slope)), np.float32(np.sin(scene.slope))
    ramp = (c * _GRID[None, :] + s * _GRID[:, None]) / SIDE
    first, last = (np.asarray(tone, np.float32) for tone in scene.background)
    image = first + np.clip(ramp, 0.0, 1.0)[..., None] * (last - first)
    _clutter(image, scene.clutter, rng)
    for item in reversed(scene.items):
        _paint(image, item)
    _lines(image, scene.lines, rng)
    strength, direction = scene.light
    if strength:
        c, s = np.float32(np.cos(direction)), np.float32(np.sin(direction))
        side = (c * (_GRID[None, :] - 32) + s * (_GRID[:, None] - 32)) / 32
        image *= (1.0 + strength * side)[..., None]
    image *= np.asarray(scene.tint, np.float32)
    image += np.float32(scene.haze) * (128 - image)
    image += np.float32(scene.noise) * rng.standard_normal(image.shape, np.float32)
    pixels = np.clip(image, 0, 255).astype(np.uint8)
    return pixels, item_box(scene.items[0])


def _tone(rng: np.random.Generator, colour: int, jitter: float) -> tuple[float, float, float]:
    base = np.asarray(COLOURS[COLOUR_NAMES[colour]]) + rng.normal(0, jitter, 3)
    r, g, b = np.clip(base, 5, 250).tolist()
    return r, g, b


def _contrast(
    rng: np.random.Generator, tone: tuple[float, float, float], gap: float
) -> tuple[float, float, float]:
    """A second tone: lighter or darker than the first by at least `gap` in brightness."""
    base = np.asarray(tone)
    bright = float(base.mean())
    lighter = bright < 90 or (bright < 165 and rng.random() < 0.5)
    goal = 255.0 if lighter else 0.0
    room = abs(goal - bright)
    share = np.clip(rng.uniform(gap, gap * 1.6) / max(room, 1.0), 0.0, 1.0)
    r, g, b = (base + share * (goal - base)).tolist()
    return r, g, b


def _free_place(
    rng: np.random.Generator, radius: float, taken: list[Item]
) -> tuple[float, float] | None:
    for _ in range(12):
        x, y = rng.uniform(radius, SIDE - radius, 2).tolist()
        if all(
            np.hypot(x - o.centre[0], y - o.centre[1]) > 0.9 * (radius + o.radius) for o in taken
        ):
            return x, y
    return None


def training_scene(rng: np.random.Generator) -> Scene:
    """One to three items of any kind, named colours, calm background."""
    backdrop = int(rng.integers(len(COLOUR_NAMES)))
    items: list[Item] = []
    for _ in range(int(rng.choice([1, 2, 3], p=[0.4, 0.4, 0.2]))):
        radius = float(rng.uniform(8.0, 18.0 if not items else 14.0))
        centre = _free_place(rng, radius, items)
        if centre is None:
            break
        colour = int(rng.integers(len(COLOUR_NAMES) - 1))
        colour += colour >= backdrop  # never the colour of the background
        tone = _tone(rng, colour, 10.0)
        items.append(
            Item(
                shape=int(rng.integers(len(SHAPES))),
                texture=int(rng.integers(len(TEXTURES))),
                colour=colour,
                centre=centre,
                radius=radius,
                angle=float(rng.uniform(-0.35, 0.35)),
                tone=tone,
                second=_contrast(rng, tone, 80.0),
                period=float(rng.uniform(4.5, 7.0)),
                slant=float(rng.uniform(0, np.pi)),
                phase=float(rng.random()),
            )
        )
    base = _tone(rng, backdrop, 12.0)
    step = rng.normal(0, 12, 3)
    far = np.clip(np.asarray(base) + step, 0, 255).tolist()
    return Scene(
        items=tuple(items),
        background=(base, (far[0], far[1], far[2])),
        backdrop=backdrop,
        slope=float(rng.uniform(0, np.pi / 2)),
        light=(float(rng.uniform(0, 0.15)), float(rng.uniform(0, 2 * np.pi))),
        noise=float(rng.uniform(1, 9)),
        clutter=int(rng.random() < 0.3) * int(rng.integers(1, 3)),
    )


def shifted_scene(label: int, rng: np.random.Generator) -> Scene:
    """One item of class `label` among small plain ones, in the shifted domain."""
    shape, texture = divmod(label, len(TEXTURES) - 1)
    palette = rng.uniform(70, 200, (4, 3)) + rng.normal(0, 35, (4, 1))
    palette = np.clip(palette, 20, 235)

    def tone(row: int) -> tuple[float, float, float]:
        r, g, b = palette[row].tolist()
        return r, g, b

    radius = float(rng.uniform(9.0, 14.0))
    target = Item(
        shape=shape,
        texture=texture + 1,
        colour=-1,
        centre=(0.0, 0.0),
        radius=radius,
        angle=float(rng.uniform(-0.5, 0.5)),
        tone=tone(0),
        second=_contrast(rng, tone(0), 70.0),
        period=float(rng.uniform(3.6, 6.0)),
        slant=float(rng.uniform(0, np.pi)),
        phase=float(rng.random()),
        wave=float(rng.uniform(0.0, 0.25)),
    )
    spot = _free_place(rng, radius, [])
    items = [replace(target, centre=spot or (32.0, 32.0))]
    for _ in range(int(rng.integers(2, 5))):
        reach = float(rng.uniform(4.0, 8.0))
        centre = _free_place(rng, reach, items)
        if centre is None:
            continue
        colour = tone(int(rng.integers(1, 3)))
        other = replace(target, shape=int(rng.integers(len(SHAPES))), texture=0, radius=reach)
        items.append(replace(other, centre=centre, angle=float(rng.uniform(0, 6.28)), tone=colour))
    warm = rng.normal(0, 0.1)
    return Scene(
        items=tuple(items),
        background=(tone(2), tone(3)),
        slope=float(rng.uniform(0, np.pi / 2)),
        light=(float(rng.uniform(0.2, 0.45)), float(rng.uniform(0, 2 * np.pi))),
        noise=float(rng.uniform(6, 11)),
        clutter=int(rng.integers(1, 5)),
        lines=int(rng.integers(0, 3)),
        tint=(1.0 + warm, 1.0, 1.0 - warm),
        haze=float(rng.uniform(0.0, 0.2)),
    )


def demo_set(
    n_per_class: int, seed: int
) -> tuple[Pixels, NDArray[np.int64], NDArray[np.int64], list[str]]:
    """The shifted domain: images [N, 64, 64, 3], labels [N], boxes [N, 4] and class names.

    Images are ordered by class; image i of a class is the same for every `n_per_class` > i.
    """
    total = n_per_class * len(CLASS_NAMES)
    images = np.empty((total, SIDE, SIDE, 3), np.uint8)
    boxes = np.empty((total, 4), np.int64)
    labels = np.repeat(np.arange(len(CLASS_NAMES), dtype=np.int64), n_per_class)
    for row, label in enumerate(labels.tolist()):
        rng = np.random.default_rng((seed, label, row - label * n_per_class))
        images[row], boxes[row] = render_scene(shifted_scene(label, rng), rng)
    return images, labels, boxes, list(CLASS_NAMES)
