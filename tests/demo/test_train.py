# SPDX-License-Identifier: Apache-2.0
"""Training of the demo's CLIP: the loss, the schedule, a tiny overfit, the folder written."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from vtclip.clip import load_clip
from vtclip.clip.word_tokenizer import WordTokenizer, build_vocab
from vtclip.demo import captions, train


def test_contrastive_loss_of_distinct_pairs_is_cross_entropy():
    logits = torch.tensor([[2.0, 0.5], [-1.0, 3.0]])
    rows = nn.functional.cross_entropy(logits, torch.arange(2))
    columns = nn.functional.cross_entropy(logits.T, torch.arange(2))
    got = train.contrastive_loss(logits, torch.eye(2, dtype=torch.bool))
    torch.testing.assert_close(got, (rows + columns) / 2)


def test_equal_captions_are_positives():
    """Two scenes under one caption: the loss of the best logits is their entropy, log 2."""
    true = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    logits = torch.where(true, 50.0, -50.0)
    got = train.contrastive_loss(logits, true)
    assert got.item() == pytest.approx(2 / 3 * math.log(2), abs=1e-6)
    assert train.contrastive_loss(logits, torch.eye(3, dtype=torch.bool)) >= got


def test_schedule():
    rates = [train.schedule(step / 1000) for step in range(1001)]
    assert max(rates) == pytest.approx(1.0, abs=1e-6)
    assert rates.index(max(rates)) == 30
    assert rates[-1] == pytest.approx(0.01)
    assert all(rate > 0 for rate in rates)
    assert sorted(rates[30:], reverse=True) == rates[30:]


def test_a_batch_is_a_function_of_the_generator():
    first, second = (train.draw_batch(np.random.default_rng(4), 6) for _ in range(2))
    assert torch.equal(first.pixels, second.pixels)
    assert first.captions == second.captions
    assert first.caption_true.diagonal().all()
    assert first.phrase_true.diagonal().all()
    torch.testing.assert_close(first.region_weight.sum(1), torch.ones(len(first.phrases)))
    assert first.attributes.shape == (len(first.phrases), 3)


def test_overfits_one_batch():
    torch.manual_seed(0)
    vocab = build_vocab(captions.caption_words())
    config = train.model_config(len(vocab))
    config["model_cfg"]["vision_cfg"]["layers"] = 1
    config["model_cfg"]["text_cfg"]["layers"] = 1
    model = train.build_clip(config)
    model.visual.output_tokens = True
    head = nn.Linear(128, sum(train.ATTRIBUTE_SIZES))
    tokenizer = WordTokenizer(vocab, train.CONTEXT)
    batch = train.draw_batch(np.random.default_rng(0), 8)
    optimizers = train.build_optimizers(model, head)
    losses = []
    for _ in range(25):
        loss = train.batch_loss(model, tokenizer, head, batch)
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    # every parameter took part, but for rows of words that this batch does not say
    assert all(p.grad is not None for _, p in model.named_parameters())


def test_written_folder_is_the_trained_model(tmp_path):
    model, losses = train.train(minutes=5, batch_size=4, max_steps=2, seed=3, out=tmp_path)
    assert len(losses) == 2
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    vocab = json.loads((tmp_path / "vocab.json").read_text())
    assert config["model_cfg"]["text_cfg"]["vocab_size"] == len(vocab)
    clip = load_clip(f"local-dir:{tmp_path}")
    pixels = train.draw_batch(np.random.default_rng(1), 2).pixels
    with torch.no_grad():
        want = model.encode_image(pixels)
    # the folder holds float16: each weight is off by up to 2^-11 of itself, through five layers
    got, tokens = clip.encode_image(pixels, "projected")
    torch.testing.assert_close(got, want, rtol=0, atol=0.02 * float(want.abs().max()))
    # the global feature is the mean of the projected tokens
    torch.testing.assert_close(tokens.mean(1), got, rtol=1e-4, atol=1e-4)


def test_the_command_reads_its_arguments(tmp_path):
    state = torch.get_num_threads()
    try:
        train.main(["--steps", "1", "--out", str(tmp_path), "--threads", "1", "--seed", "9"])
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(state)
    assert (tmp_path / "open_clip_model.safetensors").stat().st_size > 1_000_000


@pytest.mark.parametrize("wrong", [{"minutes": 0}, {"max_steps": 0}])
def test_a_run_of_no_length_is_refused(wrong):
    with pytest.raises(ValueError, match="must be > 0"):
        train.train(**wrong)
