# SPDX-License-Identifier: Apache-2.0
"""Captions for drawn scenes, and which caption is true of which scene.

A caption names one or two items by some of their attributes. Its claim is a row of attribute ids
per named item, -1 where the caption leaves the attribute out; a caption is true of a scene when
every named item has a matching item there. The contrastive loss takes every true pair of a batch
as a positive, not only the pair that was drawn together.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vtclip.demo.scenes import COLOUR_NAMES, PLACES, SHAPES, SIZES, TEXTURES, Item, Scene

Ints = NDArray[np.int64]

NUM_ATTRIBUTES = 6  # shape, texture, colour, size, place, backdrop
MAX_ITEMS = 3
MAX_NAMED = 2
_MISSING = -2  # an attribute value no caption can claim

_LEADS = (
    "a photo of a {}", "a picture of a {}", "a drawing of a {}", "an image of a {}", "{}", "a {}",
    "this is a {}", "there is a {}",
)  # fmt: skip
_PAIR_LEADS = (
    "a scene with a {} and a {}", "a photo of a {} and a {}", "a {} and a {}", "a {} with a {}",
)  # fmt: skip
_PLACE_PHRASES = (
    ("at the top", "in the upper part"),
    ("at the bottom", "in the lower part"),
    ("on the left", "at the left side"),
    ("on the right", "at the right side"),
    ("in the center", "in the middle"),
)
# Words that a user is likely to put around a class name; they get an id but little training.
_EXTRA = "the of in on with small big large object shape pattern texture colour color background"


def caption_words() -> list[str]:
    """Every word of the grammar, and a few that users may add."""
    texts = [*_LEADS, *_PAIR_LEADS, *(phrase for pair in _PLACE_PHRASES for phrase in pair)]
    names = [*SHAPES, *TEXTURES, *COLOUR_NAMES, *SIZES, *PLACES]
    words = " ".join([*texts, *names, _EXTRA, "background"]).replace("{}", " ").split()
    return sorted(set(words))


def scene_attributes(scene: Scene) -> Ints:
    """Attribute ids of a scene's items, [MAX_ITEMS, NUM_ATTRIBUTES]."""
    out = np.full((MAX_ITEMS, NUM_ATTRIBUTES), _MISSING, np.int64)
    for row, item in enumerate(scene.items[:MAX_ITEMS]):
        values = (item.shape, item.texture, item.colour, item.size, item.place, scene.backdrop)
        out[row] = [_MISSING if value < 0 else value for value in values]
    return out


def describe(item: Item, rng: np.random.Generator) -> tuple[str, list[int]]:
    """A noun phrase for one item and what it claims; the shape is always named."""
    texture = item.texture if rng.random() < (0.9 if item.texture else 0.35) else -1
    colour = item.colour if rng.random() < 0.45 else -1
    size = item.size if rng.random() < 0.2 else -1
    words = [SIZES[size]] if size >= 0 else []
    adjectives = [TEXTURES[texture]] if texture >= 0 else []
    if colour >= 0:
        adjectives.insert(int(rng.integers(len(adjectives) + 1)), COLOUR_NAMES[colour])
    words += [*adjectives, SHAPES[item.shape]]
    return " ".join(words), [item.shape, texture, colour, size, -1, -1]


def caption(scene: Scene, rng: np.random.Generator) -> tuple[str, Ints]:
    """A caption of `scene` and its claim [MAX_NAMED, NUM_ATTRIBUTES]."""
    claim = np.full((MAX_NAMED, NUM_ATTRIBUTES), -1, np.int64)
    order = rng.permutation(len(scene.items))
    first, claim[0] = describe(scene.items[order[0]], rng)
    if len(order) > 1 and rng.random() < 0.4:
        second, claim[1] = describe(scene.items[order[1]], rng)
        return _PAIR_LEADS[rng.integers(len(_PAIR_LEADS))].format(first, second), claim
    text = _LEADS[rng.integers(len(_LEADS))].format(first)
    place = scene.items[order[0]].place
    if place >= 0 and rng.random() < 0.2:
        text += " " + _PLACE_PHRASES[place][rng.integers(2)]
        claim[0, 4] = place
    elif scene.backdrop >= 0 and rng.random() < 0.2:
        text += f" on a {COLOUR_NAMES[scene.backdrop]} background"
        claim[0, 5] = scene.backdrop
    return text, claim


def true_pairs(attributes: Ints, claims: Ints) -> NDArray[np.bool_]:
    """Which claim holds of which scene: [B, MAX_ITEMS, A], [n, MAX_NAMED, A] -> [B, n]."""
    items = attributes[:, None, None]  # [B, 1, 1, MAX_ITEMS, A]
    named = claims[None, :, :, None]  # [1, n, MAX_NAMED, 1, A]
    matches = ((named < 0) | (named == items)).all(-1)  # [B, n, MAX_NAMED, MAX_ITEMS]
    true: NDArray[np.bool_] = matches.any(-1).all(-1)
    return true
