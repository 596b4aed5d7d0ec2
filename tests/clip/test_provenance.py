# SPDX-License-Identifier: Apache-2.0
"""Activation and preprocessing of a file of weights: by what it tells, never silently guessed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from vtclip.clip import provenance
from vtclip.clip.names import tags_of
from vtclip.clip.provenance import decide
from vtclip.clip.weights import Weights

OPENAI_MEAN = 0.48145466


def decided(arch: str, path: Path, tag: str = "", **more: Any) -> tuple[bool, float]:
    """Activation and the first mean for a file of an architecture."""
    config = decide(open_clip.get_model_config(arch), Weights(path, {}, **more), arch=arch, tag=tag)
    mean = config["preprocess_cfg"].get("mean", [OPENAI_MEAN])[0]
    return bool(config["model_cfg"].get("quick_gelu", False)), mean


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "w.pt"
    path.write_bytes(b"weights")
    return path


def test_nothing_tells_and_tags_differ_so_it_is_said(
    weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert decided("ViT-B-32", weights) == (False, OPENAI_MEAN)
    [line] = caplog.messages
    assert "does not tell the activation" in line
    assert "GELU is assumed (known weights: QuickGELU openai," in line
    assert "; GELU laion2b_e16," in line
    assert f"give ViT-B-32:TAG:{weights}" in line
    decided("ViT-B-32", weights)
    assert len(caplog.messages) == 1


def test_tags_that_agree_against_the_architecture_are_followed_and_said(
    weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert decided("RN50", weights)[0] is True
    assert "QuickGELU is assumed (known weights: QuickGELU openai" in caplog.text
    assert "GELU none" in caplog.text


def test_preprocessing_that_differs_is_in_the_same_warning(
    weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    decided("ViT-L-14", weights)
    [line] = caplog.messages
    assert "activation and preprocessing" in line
    assert "differ in preprocessing; that of openai is used" in line
    assert "put open_clip_config.json next to the weights" in line


def test_where_all_known_weights_agree_nothing_is_said(
    weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert decided("ViT-B-16-SigLIP", weights) == (False, 0.5)
    assert decided("ViT-S-32", weights)[0] is False  # no published weights
    assert caplog.messages == []


def test_the_tag_that_is_named_decides(weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert decided("ViT-B-32", weights, "openai")[0] is True
    assert decided("ViT-B-32", weights, "laion2b_s34b_b79k")[0] is False
    assert decided("ViT-L-14", weights, "laion2b_s32b_b82k") == (False, 0.5)
    assert "does not tell" not in caplog.text


def test_openais_extra_entries_decide(weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert decided("ViT-B-32", weights, openai=True)[0] is True
    assert decided("ViT-L-14", weights, openai=True) == (True, OPENAI_MEAN)
    assert "quick_gelu=True" in caplog.text
    assert "by the tag openai" in caplog.text
    assert "does not tell" not in caplog.text


def test_a_digest_that_is_known_decides(
    weights: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = hashlib.sha256(b"weights").hexdigest()
    monkeypatch.setattr(provenance, "_published", lambda arch: {digest: "openai"})
    assert decided("ViT-B-32", weights)[0] is True
    monkeypatch.setattr(provenance, "_published", lambda arch: {digest[:8]: "laion2b_e16"})
    assert decided("ViT-B-32", weights)[0] is False
    facts = {"source_sha256": digest}
    path = weights.rename(weights.with_suffix(".safetensors"))
    assert decided("ViT-B-32", path, facts=facts)[0] is False
    assert "does not tell" not in caplog.text


def test_published_digests_are_those_of_the_publishers() -> None:
    known = provenance._published("ViT-B-32")
    assert known["40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af"] == "openai"
    assert known["46683a32"] == "laion400m_e32"
    for arch in ("RN50", "RN101", "RN50x4", "RN50x16", "RN50x64", "ViT-B-16", "ViT-L-14",
                 "ViT-L-14-336"):  # fmt: skip
        assert [
            len(key) for key, tag in provenance._published(arch).items() if tag == "openai"
        ] == [64]


def test_what_convert_wrote_decides(weights: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = weights.rename(weights.with_suffix(".safetensors"))
    for quick in (True, False):
        facts = {"model_cfg": {"quick_gelu": quick}, "preprocess_cfg": {"mean": [0.1, 0.2, 0.3]}}
        assert decided("ViT-B-32", path, facts=facts) == (quick, 0.1)
    assert "does not tell" not in caplog.text


def test_a_config_beside_the_file_decides_where_its_sizes_are_the_same(
    weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = open_clip.get_model_config("ViT-B-32")
    beside = weights.parent / "open_clip_config.json"
    write = {"model_cfg": {**config, "quick_gelu": True}, "preprocess_cfg": {"mean": [0.1] * 3}}
    beside.write_text(json.dumps(write))
    assert decided("ViT-B-32", weights) == (True, 0.1)
    assert "does not tell" not in caplog.text
    assert decided("ViT-B-16", weights, "openai") == (True, 0.1)
    write["model_cfg"] = {**open_clip.get_model_config("ViT-L-14"), "quick_gelu": True}
    beside.write_text(json.dumps(write))
    assert decided("ViT-B-32", weights)[0] is False
    assert "does not tell the activation of its weights" in caplog.text
    beside.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        decided("ViT-B-32", weights)


def test_an_architecture_whose_name_says_it(
    weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert decided("ViT-B-32-quickgelu", weights)[0] is True
    assert "activation" not in caplog.text


@pytest.mark.parametrize("arch", ["ViT-B-32", "RN50", "ViT-L-14", "ViT-H-14", "RN50-quickgelu"])
def test_every_tag_gives_the_activation_of_its_own(arch: str, weights: Path) -> None:
    for tag in tags_of(arch):
        wanted = bool(open_clip.get_pretrained_cfg(arch, tag).get("quick_gelu", False))
        assert decided(arch, weights, tag)[0] is wanted


def test_the_config_that_is_given_is_not_changed(weights: Path) -> None:
    config = open_clip.get_model_config("ViT-B-32")
    before = json.dumps(config)
    decide(config, Weights(weights, {"x": torch.ones(1)}, openai=True), arch="ViT-B-32")
    assert json.dumps(config) == before
