# SPDX-License-Identifier: Apache-2.0
"""The bundled CLIP: what the files are, and what the model can do."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch.nn import functional as F

from vtclip.clip import load_clip
from vtclip.clip.word_tokenizer import build_vocab
from vtclip.demo import scenes
from vtclip.demo.captions import caption_words
from vtclip.demo.train import ASSETS, model_config, normalise

WEIGHTS = ASSETS / "open_clip_model.safetensors"
WEIGHTS_SHA256 = "bb0d81656aca6b3bed0afe633576c62ae8b9f3658d2cf08f9f88bb21b954dab1"


@pytest.fixture(scope="module")
def clip():
    return load_clip("demo")


@pytest.fixture(scope="module")
def shifted():
    return scenes.demo_set(10, seed=7)


def test_files():
    files = {path.name: path.stat().st_size for path in ASSETS.iterdir()}
    assert set(files) == {"open_clip_config.json", "open_clip_model.safetensors", "vocab.json"}
    assert sum(files.values()) <= 8 * 2**20
    assert hashlib.sha256(WEIGHTS.read_bytes()).hexdigest() == WEIGHTS_SHA256


def test_weights_are_finite_float16():
    with safe_open(WEIGHTS, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def test_config_and_vocabulary_are_those_of_the_training_script():
    vocab = build_vocab(caption_words())
    assert json.loads((ASSETS / "vocab.json").read_text()) == vocab
    assert json.loads((ASSETS / "open_clip_config.json").read_text()) == model_config(len(vocab))


def test_loads_in_float32_and_preprocesses_like_the_training(clip):
    assert {p.dtype for p in clip.model.parameters()} == {torch.float32}
    assert clip.width == 128
    pixels = scenes.demo_set(1, seed=3)[0][:1]
    picture = Image.fromarray(pixels[0])
    torch.testing.assert_close(clip.preprocess(picture)[None], normalise(pixels))


def test_zero_shot_on_the_shifted_scenes(clip, shifted):
    """49 % of these 240 images are right; 24 classes make 4 % chance."""
    images, labels, _, names = shifted
    text = clip.encode_text(names)
    image, _ = clip.encode_image(normalise(images))
    share = (F.normalize(image, dim=-1) @ text.T).argmax(1).eq(torch.from_numpy(labels))
    assert 0.30 < share.double().mean() < 0.80


def test_tokens_know_where_the_object_is(clip, shifted):
    """The largest product of token and class text lies in the box far more often than chance."""
    images, labels, boxes, names = shifted
    text = clip.encode_text(names)[torch.from_numpy(labels)]
    _, tokens = clip.encode_image(normalise(images), "projected")
    best = (tokens @ text[:, :, None])[:, :, 0].argmax(1).numpy()
    x, y = best % 8 * 8 + 4, best // 8 * 8 + 4
    inside = (boxes[:, 0] <= x) & (x < boxes[:, 2]) & (boxes[:, 1] <= y) & (y < boxes[:, 3])
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / scenes.SIDE**2
    assert inside.mean() > 3 * area.mean()


def test_a_word_it_never_saw_is_no_error(clip):
    text = clip.encode_text(["zebra crossing", "striped circle", "the {} café"])
    assert text.shape == (3, 128)
    np.testing.assert_allclose(text.norm(dim=-1).numpy(), 1, rtol=1e-6)
