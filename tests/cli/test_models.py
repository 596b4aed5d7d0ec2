# SPDX-License-Identifier: Apache-2.0
"""`vtclip models`: what --model can name, and which weights are on this machine."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from commands import call, json_of

from vtclip.clip import hub, listing
from vtclip.clip.names import architectures, tags_of


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a listing opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(hub, "fetch", refused)


def test_every_architecture_is_listed_with_its_size_and_tags(capsys):
    assert call("models") == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines[2:-1]]
    assert names[0] == "demo"
    assert sorted(names[1:]) == sorted(architectures().values())
    (row,) = [line for line in lines if line.startswith("RN50x64 ")]
    assert row.split()[1:4] == ["448", "1024", "ResNet"]
    assert lines[-1].startswith(f"{len(names)} architectures; ")
    assert max(map(len, lines)) <= 150


def test_a_few_are_shown_with_parameters_spatial_features_and_tags(capsys):
    assert call("models", "vit-b-32-QUICK") == 0
    said = capsys.readouterr().out
    assert "ViT-B-32-quickgelu: 224 pixels, width 512, ViT\n" in said
    assert "  87.8 million parameters of the image tower, 63.4 of the text tower\n" in said
    assert "  spatial features: raw (768), projected (512)\n" in said
    for tag in tags_of("ViT-B-32-quickgelu"):
        assert f"  ViT-B-32-quickgelu:{tag}\n" in said
    assert call("models", "coca_ViT-B-32") == 0
    assert "spatial features: none, so no --method vtclip\n" in capsys.readouterr().out
    assert call("models", "mt5-base") == 0
    assert "mt5-base-ViT-B-32 cannot be built here: " in capsys.readouterr().out


def test_a_tag_is_searched_too_and_weights_of_the_cache_come_first(capsys, monkeypatch):
    here = "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
    monkeypatch.setattr(listing, "is_cached", lambda repo, _: repo == here)
    found = json_of(capsys, "models", "laion2b_s34b_b79k", "--json")["models"]
    assert [one["name"] for one in found] == ["ViT-B-32"]
    assert found[0]["cached"] == ["laion2b_s34b_b79k"]
    assert call("models") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("fetched before: ViT-B-32:laion2b_s34b_b79k")
    assert [line.split()[0] for line in lines[2:4]] == ["demo", "ViT-B-32"]


def test_weights_by_address_are_looked_for_where_open_clip_puts_them(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "URL_CACHE", str(tmp_path))
    monkeypatch.setattr(
        listing, "tag_config", lambda *_: {"url": "https://example.org/weights/RN50.pt"}
    )
    assert not listing.tag_is_cached("RN50", "openai")
    Path(tmp_path, "RN50.pt").write_bytes(b"weights")
    assert listing.tag_is_cached("RN50", "openai")
