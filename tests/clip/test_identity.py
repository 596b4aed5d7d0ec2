# SPDX-License-Identifier: Apache-2.0
"""What decides a feature: every field that changes one is named, and nothing else is."""

from __future__ import annotations

import json
from copy import deepcopy
from typing import Any

import pytest

from vtclip.clip import Clip, build_clip, differences, identity_of
from vtclip.clip.word_tokenizer import WordTokenizer, build_vocab

CONFIG: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 48,
        "vision_cfg": {
            "image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8
        },
        "text_cfg": {
            "context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2
        },
    },
    "preprocess_cfg": {
        "size": 32, "mode": "RGB", "mean": [0.48145466, 0.4578275, 0.40821073],
        "std": [0.26862954, 0.26130258, 0.27577711], "interpolation": "bicubic",
        "resize_mode": "shortest", "fill_color": 0,
    },
    "tokenizer": {"kind": "WordTokenizer", "context_length": 16, "vocab_digest": "0" * 64},
}  # fmt: skip


def changed(*path: str, to: Any) -> dict[str, Any]:
    other = deepcopy(CONFIG)
    place = other
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = to
    return other


@pytest.mark.parametrize(
    ("path", "to", "words"),
    [
        (["model_cfg", "quick_gelu"], True, "quick_gelu False vs True"),
        (["model_cfg", "embed_dim"], 32, "feature width (embed_dim) 48 vs 32"),
        (["model_cfg", "vision_cfg", "layers"], 3, "image encoder's layers 2 vs 3"),
        (["model_cfg", "vision_cfg", "pool_type"], "avg", "image encoder's pool_type tok vs avg"),
        (["model_cfg", "text_cfg", "heads"], 4, "text encoder's heads 2 vs 4"),
        (
            ["preprocess_cfg", "mean"], [0, 0, 0],
            "preprocess mean [0.48145466, 0.4578275, 0.40821073] vs [0, 0, 0]",
        ),
        (["preprocess_cfg", "size"], 64, "preprocess size 32 vs 64"),
        (["preprocess_cfg", "interpolation"], "bilinear",
         "preprocess interpolation bicubic vs bilinear"),
        (["tokenizer", "vocab_digest"], "1" * 64, "tokenizer vocab_digest 000000000000 vs 11111"),
    ],
)  # fmt: skip
def test_a_field_that_changes_features_is_named(path: list[str], to: Any, words: str) -> None:
    other = changed(*path, to=to)
    found = differences(CONFIG, other)
    assert len(found) == 1
    assert found[0].startswith(words)
    assert len(differences(other, CONFIG)) == 1
    assert differences(other, other) == []
    assert identity_of(CONFIG, "x") != identity_of(other, "x")


@pytest.mark.parametrize(
    ("path", "to"),
    [
        (["model_cfg", "quick_gelu"], False),
        (["model_cfg", "custom_text"], False),
        (["model_cfg", "init_logit_bias"], -10),
        (["model_cfg", "vision_cfg", "mlp_ratio"], 4),
        (["model_cfg", "vision_cfg", "image_size"], [32, 32]),
        (["model_cfg", "vision_cfg", "patch_dropout"], 0.5),
        (["model_cfg", "text_cfg", "pool_type"], "argmax"),
        (["preprocess_cfg", "fill_color"], 0.0),
        (["preprocess_cfg", "mean"], (0.48145466, 0.4578275, 0.40821073)),
    ],
)
def test_other_ways_to_write_the_same_are_no_difference(path: list[str], to: Any) -> None:
    other = changed(*path, to=to)
    assert differences(CONFIG, other) == []
    assert differences(other, CONFIG) == []
    assert identity_of(CONFIG, "x") == identity_of(other, "x")


def test_every_difference_is_named() -> None:
    other = changed("preprocess_cfg", "mean", to=[0, 0, 0])
    other["preprocess_cfg"]["std"] = [1, 1, 1]
    other["model_cfg"]["quick_gelu"] = True
    found = differences(CONFIG, other)
    assert [line.split(" ")[0:2] for line in found] == [
        ["quick_gelu", "False"], ["preprocess", "mean"], ["preprocess", "std"]
    ]  # fmt: skip


def test_weights_are_compared_where_both_are_known() -> None:
    one, two = {**CONFIG, "weights": "a" * 64}, {**CONFIG, "weights": "b" * 64}
    assert differences(one, two) == ["weights aaaaaaaaaaaa vs bbbbbbbbbbbb"]
    assert differences(one, CONFIG) == []


def test_a_table_names_no_model() -> None:
    assert differences(None, None) == []
    assert differences(None, CONFIG) == ["image encoder none vs a model"]
    assert differences({}, {}) == []


def test_a_tokenizer_that_records_less_is_not_another_one() -> None:
    other = deepcopy(CONFIG)
    del other["tokenizer"]["vocab_digest"]
    assert differences(CONFIG, other) == []


def test_identity_of_a_model() -> None:
    clip = Clip(build_clip(CONFIG), WordTokenizer(build_vocab(["cat"]), 16), CONFIG)
    identity = clip.identity
    json.dumps(identity)
    assert identity["weights"] == clip.weights_digest
    assert identity["activation"] == "GELU"
    assert identity["preprocessing"]["size"] == 32
    assert identity["tokenizer"]["kind"] == "WordTokenizer"
    assert len(identity["architecture_digest"]) == 64
    assert differences(clip.config, json.loads(json.dumps(clip.config))) == []
