# SPDX-License-Identifier: Apache-2.0
"""Names that people type: what they stand for, what is said, and what comes near."""

from __future__ import annotations

from pathlib import Path

import open_clip
import pytest

from vtclip.clip import ClipNotFound
from vtclip.clip.names import architectures, resolve, resolve_architecture


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vtclip.clip.names.is_cached", lambda repo, filename: False)


TAKEN = {
    "ViT-B/32": "ViT-B-32:openai",
    "vit-b/32": "ViT-B-32:openai",
    "ViT-B/16:openai": "ViT-B-16:openai",
    "vit-b-32:openai": "ViT-B-32:openai",
    "ViT_B_32:OpenAI": "ViT-B-32:openai",
    "ViT-L/14@336px": "ViT-L-14-336:openai",
    "ViT-L-14-336px:openai": "ViT-L-14-336:openai",
    "RN50x4": "RN50x4:openai",
    "rn50:OPENAI": "RN50:openai",
    "ViT-B-32:laion2B-s34B-b79K": "ViT-B-32:laion2b_s34b_b79k",
    "ViT-B-32/openai": "ViT-B-32:openai",
    "vit_b_32_openai": "ViT-B-32:openai",
    "ViT-B-32, openai": "ViT-B-32:openai",
    "clip-vit-base-patch32": "ViT-B-32:openai",
    "openai/clip-vit-base-patch32": "ViT-B-32:openai",
    "OpenAI/CLIP-ViT-Large-Patch14-336": "ViT-L-14-336:openai",
    "google/siglip-base-patch16-224": "ViT-B-16-SigLIP:webli",
    "google/siglip2-so400m-patch14-384": "ViT-SO400M-14-SigLIP2-378:webli",
    "laion/CLIP-ViT-B-32-laion2B-s34B-b79K": "ViT-B-32:laion2b_s34b_b79k",
    "CLIP-ViT-H-14-laion2B-s32B-b79K": "ViT-H-14:laion2b_s32b_b79k",
    "hf_hub:owner/name": "hf-hub:owner/name",
    "hf:owner/name": "hf-hub:owner/name",
    "HF-HUB:owner/name": "hf-hub:owner/name",
    "https://huggingface.co/owner/name": "hf-hub:owner/name",
    "huggingface.co/owner/name/tree/main": "hf-hub:owner/name",
}


@pytest.mark.parametrize("typed", TAKEN)
def test_a_name_that_was_guessed_is_said_once(typed: str, caplog: pytest.LogCaptureFixture) -> None:
    assert resolve(typed).name == TAKEN[typed]
    resolve(typed)
    assert caplog.messages == [f"model {typed!r} is taken as {TAKEN[typed]}"]


@pytest.mark.parametrize(
    "typed",
    [
        "demo",
        "ViT-B-32:openai",
        "RN50:yfcc15m",
        "hf-hub:owner/name",
        "ViT-B-32:datacomp_xl_s13b_b90k",
    ],
)
def test_an_exact_name_is_not_commented(typed: str, caplog: pytest.LogCaptureFixture) -> None:
    assert resolve(typed).name == typed
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("ViT-B-32", r"an architecture without weights; give ViT-B-32:TAG \(one of openai,"),
        ("vitb32", r"an architecture without weights; give ViT-B-32:TAG"),
        ("ViT-H/14", r"an architecture without weights; give ViT-H-14:TAG \(one of laion2b"),
        ("ViT-B-33", "neither a folder nor a known architecture; did you mean 'ViT-B-32'"),
        ("VIT-B-3:openai", "did you mean 'ViT-B-32'"),
        ("openai/clip-vit-base-patch33", "did you mean 'openai/clip-vit-base-patch32'"),
        ("clip-vit-bse-patch32", "did you mean 'openai/clip-vit-base-patch32'"),
        ("laion/CLIP-ViT-B-32-laion2B-s34B-b79", "did you mean 'laion/CLIP-ViT-B-32-laion2B-s34B"),
        ("owner/name", "give hf-hub:owner/name for a repository of the hub, or demo,"),
        ("ViT-B-32:opnai", "unknown weights tag 'opnai'; did you mean 'openai'"),
        ("ViT-B-32:opnai:/x/w.pt", "unknown weights tag 'opnai'; did you mean 'openai'"),
        ("./weights.safetensors", "no such weights file: weights.safetensors"),
        ("ViT-B/32:w.pt", "no such weights file: w.pt"),
        ("ViT-B-32:openai:w.pt", "no such weights file: w.pt"),
        ("", "no name; give demo, ARCHITECTURE:TAG"),
        ("  ", "no name; give"),
        ("hf-hub:", "no repository; give hf-hub:owner/name"),
        ("local-dir:", "no folder; give local-dir:/folder"),
        ("dir: ", "no folder; give local-dir:/folder"),
        ("demo2", "did you mean 'demo'"),
        ("Demo", "did you mean 'demo'"),
        ("clip", r"known architecture; give demo, ARCHITECTURE:TAG \(such as ViT-B-32:openai\)"),
        (":", "neither a folder nor a known"),
    ],
)
def test_what_stands_for_nothing_gets_the_nearest_names(typed: str, message: str) -> None:
    with pytest.raises(ClipNotFound, match=message) as caught:
        resolve(typed)
    assert "\n" not in str(caught.value)
    assert repr(typed) in str(caught.value)


def test_paths_become_absolute_without_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "w.safetensors").write_bytes(b"x")
    for typed, name in {
        "folder": f"{tmp_path}/folder",
        "./folder": f"{tmp_path}/folder",
        "local-dir:folder": f"local-dir:{tmp_path}/folder",
        "local-dir:missing": f"local-dir:{tmp_path}/missing",
        "w.safetensors": f"{tmp_path}/w.safetensors",
        "ViT-B-32:w.safetensors": f"ViT-B-32:{tmp_path}/w.safetensors",
        "ViT-B-32:./folder/../w.safetensors": f"ViT-B-32:{tmp_path}/w.safetensors",
        "ViT-B-32:openai:w.safetensors": f"ViT-B-32:openai:{tmp_path}/w.safetensors",
    }.items():
        assert resolve(typed).name == name
        assert resolve(name).name == name
    assert caplog.messages == []
    assert resolve("vit-b/32:w.safetensors").name == f"ViT-B-32:{tmp_path}/w.safetensors"
    assert resolve("local_dir:folder").name == f"local-dir:{tmp_path}/folder"
    assert len(caplog.messages) == 2


def test_a_link_keeps_its_name(tmp_path: Path) -> None:
    """The hub's cache has blobs without suffix behind its links."""
    (tmp_path / "blob").write_bytes(b"x")
    (tmp_path / "w.safetensors").symlink_to(tmp_path / "blob")
    assert resolve("w.safetensors").name == f"{tmp_path}/w.safetensors"


def test_a_folder_wins_over_a_name(tmp_path: Path) -> None:
    (tmp_path / "openai" / "clip-vit-base-patch32").mkdir(parents=True)
    assert resolve("openai/clip-vit-base-patch32").path == tmp_path / "openai/clip-vit-base-patch32"


def test_a_cached_repository_wins_over_a_known_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vtclip.clip.names.is_cached", lambda repo, name: name == "config.json")
    typed = "openai/clip-vit-base-patch32"
    assert resolve(typed).name == f"hf-hub:{typed}"


def test_no_two_architectures_have_the_same_letters() -> None:
    assert len(architectures()) == len(open_clip.list_models())


def test_an_architecture_with_or_without_a_tag() -> None:
    assert resolve_architecture("vit-b/32") == ("ViT-B-32", "")
    assert resolve_architecture("ViT-B-32:OpenAI") == ("ViT-B-32", "openai")
    with pytest.raises(ClipNotFound, match="must be ARCHITECTURE or ARCHITECTURE:TAG here"):
        resolve_architecture("demo")
