# SPDX-License-Identifier: Apache-2.0
"""The word tokenizer: ids, specials, and any user's class names."""

from __future__ import annotations

import pytest
import torch

from vtclip.clip.word_tokenizer import END, PAD, START, UNKNOWN, WordTokenizer, build_vocab


@pytest.fixture
def vocab():
    return build_vocab(["a", "photo", "of", "striped", "circle", "a"])


def test_special_ids(vocab):
    assert vocab[PAD] == 0
    assert vocab[END] == max(vocab.values()) == len(vocab) - 1
    assert sorted(vocab.values()) == list(range(len(vocab)))


def test_a_sentence(vocab):
    ids = WordTokenizer(vocab, 8)("A photo of a striped-circle!")
    words = [START, "a", "photo", "of", "a", "striped", "circle", END]
    assert ids.tolist() == [[vocab[word] for word in words]]
    assert ids.dtype == torch.int64


@pytest.mark.parametrize("text", ["striped_circle", "  STRIPED   circle.", "'striped' (circle)"])
def test_case_and_punctuation_do_not_matter(vocab, text):
    tokenizer = WordTokenizer(vocab, 6)
    assert torch.equal(tokenizer(text), tokenizer("striped circle"))


def test_padding_and_truncation_keep_the_end(vocab):
    tokenizer = WordTokenizer(vocab, 5)
    ids = tokenizer(["circle", "a photo of a striped circle", ""])
    assert ids.shape == (3, 5)
    # towers read the feature at the largest id: it must be the last real token
    assert ids.argmax(1).tolist() == [2, 4, 1]
    assert ids[0, 3:].tolist() == [0, 0]
    assert ids[1].tolist()[:4] == [vocab[w] for w in (START, "a", "photo", "of")]


@pytest.mark.parametrize(
    "name", ["Boeing 737-800", "crème brûlée", "犬", "🦊", "{}%s", "\ud800", "", "x" * 5000]
)
def test_any_class_name_gets_ids(vocab, name):
    ids = WordTokenizer(vocab, 20)([f"a photo of a {name}."])
    assert ids.shape == (1, 20)
    assert int(ids.max()) == vocab[END]


def test_unknown_words_are_stable_and_mostly_differ(vocab):
    tokenizer = WordTokenizer(vocab, 4)
    rows = tokenizer([f"word{i}" for i in range(64)])
    unknown = {vocab[name] for name in UNKNOWN}
    assert set(rows[:, 1].tolist()) == unknown
    assert torch.equal(rows, tokenizer([f"WORD{i}" for i in range(64)]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop(END), "lacks"),
        (lambda v: v.update({"late": 10_000}), "largest id 10000"),
    ],
)
def test_a_bad_vocabulary_is_refused(vocab, change, message):
    change(vocab)
    with pytest.raises(ValueError, match=message):
        WordTokenizer(vocab, 8)


def test_a_context_without_room_is_refused(vocab):
    with pytest.raises(ValueError, match="context_length must be >= 2, got 1"):
        WordTokenizer(vocab, 1)
