# SPDX-License-Identifier: Apache-2.0
"""Drawn scenes: equal seeds, true boxes, true captions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from vtclip.demo import captions, scenes


def test_equal_seeds_draw_equal_pixels():
    first, second, other = (scenes.demo_set(2, seed) for seed in (5, 5, 6))
    for mine, yours in zip(first[:3], second[:3], strict=True):
        np.testing.assert_array_equal(mine, yours)
    assert (first[0] != other[0]).mean() > 0.5
    np.testing.assert_array_equal(first[1], other[1])


def test_training_scenes_depend_on_the_generator_alone():
    pictures = []
    for seed in (3, 3, 4):
        rng = np.random.default_rng(seed)
        pictures.append(scenes.render_scene(scenes.training_scene(rng), rng)[0])
    np.testing.assert_array_equal(pictures[0], pictures[1])
    assert (pictures[0] != pictures[2]).any()


def test_more_images_per_class_keep_the_first_ones():
    few, many = scenes.demo_set(1, 2), scenes.demo_set(3, 2)
    np.testing.assert_array_equal(few[0], many[0][::3])
    np.testing.assert_array_equal(few[2], many[2][::3])


def test_demo_set_shape():
    images, labels, boxes, names = scenes.demo_set(2, 1)
    assert images.shape == (2 * len(names), 64, 64, 3)
    assert images.dtype == np.uint8
    assert len(names) == len(set(names)) == 24
    assert np.bincount(labels).tolist() == [2] * 24
    assert (boxes[:, 0] < boxes[:, 2]).all()
    assert (boxes[:, 1] < boxes[:, 3]).all()
    assert boxes.min() >= 0
    assert boxes.max() <= 64


@pytest.mark.parametrize("label", range(0, 24, 5))
def test_box_holds_every_pixel_that_the_target_changes(label):
    scene = scenes.shifted_scene(label, np.random.default_rng(label))
    with_target, (x0, y0, x1, y1) = scenes.render_scene(scene, np.random.default_rng(0))
    elsewhere = replace(scene.items[0], centre=(-100.0, -100.0))
    without, empty = scenes.render_scene(
        replace(scene, items=(elsewhere, *scene.items[1:])), np.random.default_rng(0)
    )
    changed = (with_target != without).any(-1)
    inside = np.zeros_like(changed)
    inside[y0:y1, x0:x1] = True
    assert not changed[~inside].any()
    # the tightest box around what changed leaves out edges too faint to see
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    tight = np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
    assert np.abs(tight - (x0, y0, x1, y1)).max() <= 2
    assert empty == (0, 0, 0, 0)


@pytest.mark.parametrize("shape", range(len(scenes.SHAPES)))
def test_every_shape_fills_its_window(shape):
    scene = scenes.shifted_scene(0, np.random.default_rng(1))
    item = replace(scene.items[0], shape=shape, centre=(32.0, 32.0), radius=16.0, angle=0.0)
    mask = scenes.item_mask(item)
    assert 0.1 < mask.sum() / (32 * 32) < 1.0
    x0, y0, x1, y1 = scenes.item_box(item)
    assert 16 <= x1 - x0 <= 36
    assert 24 <= y1 - y0 <= 36


def test_captions_are_true_of_their_scene():
    rng = np.random.default_rng(0)
    drawn = [scenes.training_scene(rng) for _ in range(64)]
    captioned = [captions.caption(scene, rng) for scene in drawn]
    attributes = np.stack([captions.scene_attributes(scene) for scene in drawn])
    true = captions.true_pairs(attributes, np.stack([claim for _, claim in captioned]))
    assert true.diagonal().all()
    assert true.mean() < 0.2  # captions distinguish scenes


def test_true_pairs_by_words():
    """A caption of one full phrase is true of exactly the scenes with such an item."""
    rng = np.random.default_rng(1)
    drawn = [scenes.training_scene(rng) for _ in range(200)]
    attributes = np.stack([captions.scene_attributes(scene) for scene in drawn])
    claim = np.full((1, captions.MAX_NAMED, captions.NUM_ATTRIBUTES), -1)
    claim[0, 0, :2] = scenes.SHAPES.index("star"), scenes.TEXTURES.index("dotted")
    wanted = [any(i.shape == 3 and i.texture == 2 for i in scene.items) for scene in drawn]
    assert captions.true_pairs(attributes, claim)[:, 0].tolist() == wanted
    assert 0 < sum(wanted) < 200


def test_the_grammar_stays_inside_its_words():
    rng = np.random.default_rng(2)
    words = set(captions.caption_words())
    for _ in range(300):
        text, _ = captions.caption(scenes.training_scene(rng), rng)
        assert set(text.split()) <= words
    assert {word for name in scenes.CLASS_NAMES for word in name.split()} <= words
