# SPDX-License-Identifier: Apache-2.0
"""Low-rank changes of the attentions' weights: where they go, to the bit; PEFT is not needed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pictures import WIDTH, small_model, write_model

from vtclip.clip import Clip, load_clip
from vtclip.clip.low_rank import LowRank, add_low_rank, attention_layers
from vtclip.files import NewFiles
from vtclip.heads import ZeroShot
from vtclip.runs.adapter import Adapter, add_adapter
from vtclip.runs.encoders import (
    ENCODERS,
    LORA,
    add_encoders,
    load_encoders,
    save_with_encoders,
    tuned_features,
    with_low_rank,
)

LAYERS = ["visual.transformer.resblocks.0.attn", "transformer.resblocks.0.attn"]
CPU = torch.device("cpu")


@pytest.fixture
def clip(tmp_path: Path) -> Clip:
    return load_clip(small_model(tmp_path / "model"))


def change_of(clip: Clip, rank: int = 3) -> LowRank:
    factors = {}
    for name, layer in attention_layers(clip).items():
        C = layer.embed_dim
        for part in "qkv":
            factors[f"{name}.{part}.A"] = torch.randn(rank, C)
            factors[f"{name}.{part}.B"] = torch.randn(C, rank)
    return LowRank(factors, 0.3)


def test_the_change_is_scale_times_B_A_in_the_rows_of_its_part(clip):
    assert list(attention_layers(clip)) == LAYERS
    before = {name: value.clone() for name, value in clip.model.state_dict().items()}
    change = change_of(clip)
    add_low_rank(clip, change)
    after = clip.model.state_dict()
    touched = {name for name in before if not torch.equal(before[name], after[name])}
    assert touched == {f"{name}.in_proj_weight" for name in LAYERS}
    for name in LAYERS:
        rows = zip("qkv", after[f"{name}.in_proj_weight"].chunk(3), strict=True)
        old = before[f"{name}.in_proj_weight"].chunk(3)
        for (part, new), start in zip(rows, old, strict=True):
            A, B = (change.factors[f"{name}.{part}.{factor}"].double() for factor in "AB")
            torch.testing.assert_close(
                new.double() - start.double(), 0.3 * B @ A, rtol=0, atol=1e-6
            )


def test_zeros_change_no_bit(clip):
    before = clip.weights_digest
    change = change_of(clip)
    zeros = {k: v.zero_() if k.endswith("B") else v for k, v in change.factors.items()}
    assert with_low_rank(clip, LowRank(zeros, 0.3)).weights_digest == before


def test_the_order_of_sums_is_fixed(clip):
    """Products of float32 numbers are exact in float64: nothing is left to the machine."""
    name = f"{LAYERS[0]}.q"
    change = change_of(clip, rank=2)
    start = attention_layers(clip)[LAYERS[0]].in_proj_weight[0, 0].item()
    add_low_rank(clip, change)
    A, B = change.factors[f"{name}.A"], change.factors[f"{name}.B"]
    total = B[0, 0].item() * A[0, 0].item() + B[0, 1].item() * A[1, 0].item()
    wanted = torch.tensor(start + 0.3 * total, dtype=torch.float64).float()
    assert attention_layers(clip)[LAYERS[0]].in_proj_weight[0, 0] == wanted


def test_what_does_not_fit_is_refused(clip):
    change = change_of(clip)
    lacking = {k: v for k, v in change.factors.items() if k != f"{LAYERS[0]}.k.A"}
    with pytest.raises(ValueError, match=rf"do not fit .*: {LAYERS[0]}\.k\.A"):
        add_low_rank(clip, LowRank(lacking, 1.0))
    wide = {**change.factors, f"{LAYERS[0]}.k.A": torch.zeros(3, 5)}
    with pytest.raises(ValueError, match=r"do not fit .*attn, got \[3, 5\] and \[32, 3\]"):
        add_low_rank(clip, LowRank(wide, 1.0))


def test_a_tower_without_blocks_is_named(tmp_path):
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}
    text = {"context_length": 16, "width": 16, "heads": 2, "layers": 1}
    config = {"model_cfg": {"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": text}}
    resnet = load_clip(write_model(tmp_path / "resnet", config, ["a"], seed=1))
    with pytest.raises(ValueError, match=r"^lora: .* both towers, its image tower has none$"):
        attention_layers(resnet)


def test_a_folder_holds_the_factors_alone_and_gives_the_same_weights(clip, tmp_path):
    base = clip.weights_digest
    changed = with_low_rank(clip, change_of(clip))
    assert changed.weights_digest != base
    said = tuned_features(changed, "", base)
    features = {
        "model": str(tmp_path / "model"), "model_config": changed.config,
        "weights_digest": changed.weights_digest, "encoders": said,
    }  # fmt: skip
    head = ZeroShot(torch.randn(2, WIDTH))
    adapter = Adapter(head, ["ant", "bee"], None, features)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ENCODERS).write_bytes(b"of a run before")
    with NewFiles(tmp_path / "run") as new:
        said["digest"] = add_encoders(new, changed)
        add_adapter(new, adapter)
        new.commit()
    held = {path.name for path in (tmp_path / "run").iterdir()}
    assert held == {LORA, "adapter.safetensors", "adapter_config.json"}
    again = load_encoders(tmp_path / "run", adapter, None, CPU)
    assert again.weights_digest == changed.weights_digest
    save_with_encoders(tmp_path / "copy", adapter, lambda: again)
    assert (tmp_path / "copy" / LORA).read_bytes() == (tmp_path / "run" / LORA).read_bytes()
    path = tmp_path / "run" / LORA
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=f"{LORA} is cut, damaged or another format"):
        load_encoders(tmp_path / "run", adapter, None, CPU)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{LORA} does not exist"):
        load_encoders(tmp_path / "run", adapter, None, CPU)
