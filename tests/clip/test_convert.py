# SPDX-License-Identifier: Apache-2.0
"""Files of weights, read and converted: the same values, and what the new file says of them."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import open_clip
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from vtclip.clip import ClipNotFound, architecture, build_clip, convert_file, load_clip
from vtclip.clip.architecture import architecture_of
from vtclip.clip.weights import read_weights

# sizes whose heads are 64 wide, as OpenAI's, and the byte-pair vocabulary
VIT: dict[str, Any] = {
    "embed_dim": 48,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 8},
    "text_cfg": {
        "context_length": 16, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2
    },
}  # fmt: skip
RESNET = {**VIT, "vision_cfg": {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8}}
EXTRA = {
    "input_resolution": torch.tensor(32), "context_length": torch.tensor(16),
    "vocab_size": torch.tensor(49408),
}  # fmt: skip


def state_of(config: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: value.half() for name, value in build_clip(config).state_dict().items()}


class Traced(nn.Module):
    """A CLIP that can be traced by its whole forward pass, with OpenAI's extra entries."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        model = build_clip(config)
        for name, child in model.named_children():
            setattr(self, name, child)
        for name, value in model.named_parameters(recurse=False):
            setattr(self, name, value)
        for name, value in EXTRA.items():
            self.register_buffer(name, value)

    def forward(self, x: Tensor) -> Tensor:
        total = self.visual(x).sum()  # type: ignore[operator]
        for name, value in self.named_parameters():
            if not name.startswith("visual"):
                total = total + value.sum()
        return total + self.input_resolution + self.context_length + self.vocab_size


def archive_of(config: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """A TorchScript archive like OpenAI's; returns its state dict without the extra entries."""
    model = Traced(config).eval()
    size = config["vision_cfg"]["image_size"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(model, torch.zeros(1, 3, size, size), check_trace=False).save(str(path))
    return {name: value for name, value in model.state_dict().items() if name not in EXTRA}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """ViT-B-32 is small: its tags, names and digests stay."""
    known = open_clip.get_model_config

    def config(name: str) -> Any:
        if name in ("ViT-B-32", "ViT-B-32-quickgelu"):
            quick = {"quick_gelu": True} if name.endswith("gelu") else {}
            return json.loads(json.dumps({**VIT, **quick}))
        return known(name)

    monkeypatch.setattr(open_clip, "get_model_config", config)
    architecture._known_settings.cache_clear()
    yield
    monkeypatch.undo()
    architecture._known_settings.cache_clear()


@pytest.mark.usefixtures("small")
def test_openais_archive_loads_and_converts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.jit, "load", lambda *args, **more: pytest.fail("torch.jit.load"))
    monkeypatch.chdir(tmp_path)
    state = archive_of(VIT, tmp_path / "ViT-B-32.pt")
    out, facts = convert_file("ViT-B-32.pt")
    assert str(out) == "ViT-B-32.safetensors"
    assert facts["architecture"] == "ViT-B-32"
    assert facts["model_cfg"]["quick_gelu"] is True
    assert len(facts["source_sha256"]) == 64
    clips = [load_clip(name) for name in (
        "ViT-B-32:ViT-B-32.pt", "ViT-B-32.pt", "ViT-B/32:ViT-B-32.pt", "ViT-B-32.safetensors",
        "ViT-B-32:ViT-B-32.safetensors", "ViT-B-32:openai:ViT-B-32.safetensors",
    )]  # fmt: skip
    for clip in clips:
        assert clip.identity == clips[0].identity
        assert clip.identity["activation"] == "QuickGELU"
        loaded = clip.model.state_dict()
        assert all(torch.equal(loaded[name], state[name]) for name in loaded)
        assert Path(clip.name.rpartition(":")[2]).is_absolute()
    assert "does not tell" not in caplog.text
    assert load_clip(clips[0].name).identity == clips[0].identity


@pytest.mark.parametrize("config", [VIT, RESNET], ids=["vit", "resnet"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_state_dicts_convert(
    tmp_path: Path, config: dict[str, Any], wrapped: bool, caplog: pytest.LogCaptureFixture
) -> None:
    state = state_of(config)
    saved: Any = {**state, **EXTRA}
    if wrapped:
        saved = {"epoch": 3, "state_dict": {f"module.{name}": v for name, v in saved.items()}}
    torch.save(saved, tmp_path / "w.pt")
    out, facts = convert_file(tmp_path / "w.pt")
    assert facts["architecture"] == ""
    assert "heads are taken to be 64 wide" in caplog.text or config is RESNET
    tensors = safetensors.torch.load_file(out)
    assert set(tensors) == set(state)
    assert all(torch.equal(tensors[name], value) for name, value in state.items())
    clip = load_clip(out)
    assert clip.identity["activation"] == "QuickGELU"
    if config is VIT:
        assert clip.config["model_cfg"]["vision_cfg"] == VIT["vision_cfg"]
    with safe_open(out, framework="pt") as file:
        assert json.loads(file.metadata()["vtclip"])["source"] == "w.pt"


def test_shapes_show_the_architecture() -> None:
    for name in ("ViT-B-32", "RN50"):
        with torch.device("meta"):
            state = build_clip(open_clip.get_model_config(name)).state_dict()
        assert architecture_of(state)[0] == name
    with pytest.raises(ValueError, match="it holds no weights of a CLIP"):
        architecture_of({"x": torch.ones(2)})
    with pytest.raises(ValueError, match="give it as ARCHITECTURE:FILE"):
        architecture_of({"visual.trunk.norm.weight": torch.ones(2)})


def test_an_image_encoder_alone_is_named(tmp_path: Path) -> None:
    visual = {n[7:]: v for n, v in state_of(VIT).items() if n.startswith("visual.")}
    torch.save(visual, tmp_path / "w.pt")
    with pytest.raises(ClipNotFound, match="image encoder alone"):
        convert_file(tmp_path / "w.pt")
    with pytest.raises(ClipNotFound, match="image encoder alone"):
        load_clip(tmp_path / "w.pt")


@pytest.mark.usefixtures("small")
def test_the_model_can_be_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(state_of(VIT), tmp_path / "w.pt")
    for model, quick in (("ViT-B-32:openai", True), ("vit-b/32:laion2b_e16", False)):
        out, facts = convert_file(tmp_path / "w.pt", model=model, overwrite=True)
        assert facts["model_cfg"].get("quick_gelu", False) is quick
        assert (load_clip(out).identity["activation"] == "QuickGELU") is quick
    assert "does not tell" not in caplog.text
    convert_file(tmp_path / "w.pt", model="ViT-B-32", overwrite=True)
    assert "does not tell the activation" in caplog.text
    with pytest.raises(ClipNotFound, match="does not fit its architecture"):
        convert_file(tmp_path / "w.pt", tmp_path / "x.safetensors", model="RN50:openai")
    assert not (tmp_path / "x.safetensors").exists()


def test_nothing_is_overwritten_and_nothing_is_left_behind(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({**state_of(VIT), **EXTRA}, path)
    out = tmp_path / "w.safetensors"
    out.write_text("mine")
    with pytest.raises(FileExistsError, match="exists already; add --overwrite"):
        convert_file(path)
    assert out.read_text() == "mine"
    for bad, kind, message in (
        (tmp_path / "w.bin", ValueError, "must end in .safetensors"),
        (tmp_path / "no" / "w.safetensors", FileNotFoundError, "no folder"),
    ):
        with pytest.raises(kind, match=message):
            convert_file(path, bad)
    convert_file(path, overwrite=True)
    with pytest.raises(ValueError, match="is the file itself"):
        convert_file(out)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        convert_file(tmp_path / "missing.pt")
    assert sorted(os.listdir(tmp_path)) == ["w.pt", "w.safetensors"]


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.filterwarnings("ignore")  # torch's on sparse and quantised tensors
@pytest.mark.parametrize(
    "kind", ["empty", "html", "trap", "numbers", "list", "nan", "sparse", "csr", "quantised"]
)
def test_files_without_weights_are_one_line(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "w.pt"
    if kind in ("empty", "html"):
        path.write_bytes(b"" if kind == "empty" else b"<html>404</html>")
    else:
        state = state_of(VIT)
        state["ln_final.bias"][0] = torch.nan
        saved: dict[str, Any] = {
            "trap": {"state_dict": Trap(tmp_path / "trapped")},
            "numbers": {"a": 1},
            "list": [torch.ones(2)],
            "nan": state,
            "sparse": {**state_of(VIT), "visual.proj": torch.eye(4).to_sparse()},
            "csr": {**state_of(VIT), "visual.proj": torch.eye(4).to_sparse_csr()},
            "quantised": {
                **state_of(VIT),
                "visual.proj": torch.quantize_per_tensor(torch.eye(4), 0.1, 0, torch.quint8),
            },
        }
        torch.save(saved[kind], path)
    with pytest.raises(ClipNotFound) as caught:
        convert_file(path)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)
    if kind in ("sparse", "csr", "quantised"):
        assert "visual.proj must be a dense tensor, it is" in str(caught.value)
    assert os.listdir(tmp_path) == ["w.pt"]


def test_wrappers_and_prefixes_are_taken_off(tmp_path: Path) -> None:
    state = {"a.weight": torch.ones(2), "b": torch.zeros(1)}
    for number, saved in enumerate((
        state, {"state_dict": state}, {"model": state, "epoch": 1},
        {"model": {"state_dict": state}},
        {f"module.{name}": value for name, value in state.items()},
        {"model_state_dict": {f"_orig_mod.module.{name}": v for name, v in state.items()}},
    )):  # fmt: skip
        torch.save(saved, tmp_path / f"{number}.pt")
        assert set(read_weights(tmp_path / f"{number}.pt").tensors) == set(state)
