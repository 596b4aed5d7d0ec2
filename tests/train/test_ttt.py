# SPDX-License-Identifier: Apache-2.0
"""Test-time training: the objective, the views, the loop over images, and the command."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import json_of, refused
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import vtclip
from vtclip.cli import main
from vtclip.clip import Clip, load_clip
from vtclip.data.extract import write_features
from vtclip.data.views import folder_views, image_views
from vtclip.demo.scenes import demo_set
from vtclip.heads import VTCLIP, RAda, ZeroShot
from vtclip.heads._each import StackedRAda
from vtclip.runs.adapter import load_adapter
from vtclip.train import ttt
from vtclip.train.ttt import TTT

K, D, L, V, N = 6, 16, 5, 8, 7
SMALL = TTT(views=V, keep=0.25, lr=1e-2)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"views": 0}, "views must be at least 1, got 0"),
        ({"views": 2.0}, "views must be an int, got float"),
        ({"keep": 0.0}, "keep must be above 0 and at most 1, got 0.0"),
        ({"keep": 1.5}, "keep must be above 0 and at most 1, got 1.5"),
        ({"keep": math.nan}, "keep must be above 0 and at most 1, got nan"),
        ({"views": 9}, "keep * views must be at least 1 view, got 0.1 * 9"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"lr": 0.0}, "lr must be above 0 and at most 1000, got 0.0"),
        ({"lr": -1.0}, "lr must be above 0 and at most 1000, got -1.0"),
        ({"lr": math.inf}, "lr must be above 0 and at most 1000, got inf"),
        ({"lr": "fast"}, "lr must be a number, got str"),
        ({"seed": -1}, "seed must be in 0..4294967295, got -1"),
        ({"weight_decay": -0.1}, "weight_decay must be in 0..1000, got -0.1"),
    ],
)
def test_bad_settings_are_named_in_one_line(setting, words):
    with pytest.raises((ValueError, TypeError)) as caught:
        TTT(**setting)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("views", "keep", "kept"), [(64, 0.1, 6), (64, 1.0, 64), (100, 0.29, 29), (10, 0.1, 1)]
)
def test_how_many_views_are_kept(views, keep, kept):
    assert TTT(views=views, keep=keep).kept == kept


def test_the_objective_in_the_papers_own_words():
    logits = 3 * torch.randn(N, V, K, dtype=torch.float64)
    p = F.softmax(logits, dim=-1)
    h = -(p * p.log()).sum(-1)
    torch.testing.assert_close(ttt.entropy(logits), h)
    torch.testing.assert_close(ttt.mean_log_prob(logits).exp(), p.mean(dim=1))
    best = ttt.confident(logits, 3)
    for image in range(N):
        wanted = sorted(range(V), key=lambda view: float(h[image, view]))[:3]
        assert best[image].tolist() == wanted
    kept = ttt.take(logits, best)
    assert torch.equal(kept[2, 1], logits[2, best[2, 1]])


def test_extreme_logits_and_ties():
    sure = torch.full((1, 2, K), -1e4)
    sure[..., 0] = 1e4
    sure.requires_grad_()
    h = ttt.entropy(ttt.mean_log_prob(sure))
    assert h.item() == 0.0
    (grad,) = torch.autograd.grad(h.sum(), sure)
    assert bool(grad.isfinite().all())
    assert ttt.confident(torch.zeros(1, V, K), 3).tolist() == [[0, 1, 2]]


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load_clip("demo")


def picture(width: int = 80, height: int = 50) -> Image.Image:
    pixels = np.random.default_rng(1).integers(0, 255, (height, width, 3)).astype(np.uint8)
    return Image.fromarray(pixels)


def test_views_are_functions_of_seed_name_and_number(clip):
    image = picture()
    eight = image_views(clip, image, 8, seed=3, name="a/b.png")
    assert eight.shape == (8, 3, 64, 64)
    assert torch.equal(eight[0], clip.preprocess(image))
    assert torch.equal(image_views(clip, image, 5, seed=3, name="a/b.png"), eight[:5])
    others = [image_views(clip, image, 8, seed=4, name="a/b.png")]
    others.append(image_views(clip, image, 8, seed=3, name="a/c.png"))
    for other in others:
        assert torch.equal(other[0], eight[0])
        assert not any(torch.equal(other[view], eight[view]) for view in range(1, 8))
    assert len({eight[view].sum().item() for view in range(8)}) == 8
    assert image_views(clip, image, 1, seed=0, name="bad\udcff").shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match="views must be at least 1, got 0"):
        image_views(clip, image, 0, seed=0, name="a")


def test_folder_views_are_in_order_whatever_the_company(clip, tmp_path):
    names = [f"k/{number}.png" for number in range(5)]
    (tmp_path / "k").mkdir()
    for number, name in enumerate(names):
        picture(70 + number).save(tmp_path / name)
    together = list(folder_views(clip, tmp_path, names, 3, seed=0))
    alone = list(folder_views(clip, tmp_path, [names[3]], 3, seed=0))
    assert torch.equal(alone[0], together[3])
    (tmp_path / names[2]).write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"k/2\.png: not an image"):
        list(folder_views(clip, tmp_path, names, 3, seed=0))


def encode(features: Tensor) -> tuple[Tensor, None]:
    """Features stand for pixels: adapt is told what a view is by its encoder alone."""
    return features, None


def encode_both(features: Tensor) -> tuple[Tensor, Tensor]:
    """[n, 1 + L, D]: the global feature and L tokens."""
    return features[:, 0].contiguous(), features[:, 1:].contiguous()


def rada() -> RAda:
    head = RAda(torch.randn(K, D), num_heads=4, logit_scale=30.0)
    torch.nn.init.normal_(head.out.weight, std=0.3)  # type: ignore[arg-type]
    return head


def vtclip_head() -> VTCLIP:
    return VTCLIP(torch.randn(K, D), num_heads=4, ffn_dim=8, logit_scale=30.0, init="torch")


def close(found: Tensor, wanted: Tensor) -> None:
    """Equal but for float32's rounding, which one AdamW step passes on undiminished."""
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["rada", "rada with adapters", "vtclip"])
def test_every_image_is_for_itself(kind):
    """Against the plain loop; whatever the batch, the order and the company."""
    spatial = kind == "vtclip"
    head: Any = vtclip_head() if spatial else rada()
    if kind == "rada with adapters":
        head = RAda(torch.randn(K, D), num_heads=4, logit_scale=30.0, adapters=True)
        torch.nn.init.normal_(head.image_adapter[2].weight, std=0.3)
    features = torch.randn(N, V, 1 + L, D) if spatial else torch.randn(N, V, D)
    code = encode_both if spatial else encode
    before = {name: value.clone() for name, value in head.state_dict().items()}
    found = ttt.adapt(head, features, code, SMALL)
    for batch, order in ((1, range(N)), (3, range(N)), (N, range(N)), (2, range(N - 1, -1, -1))):
        order = list(order)
        other = ttt.adapt(head, features[order], code, SMALL, batch=batch)
        for name in ("plain", "kept_mean", "all_mean", "adapted"):
            close(getattr(other, name), getattr(found, name)[order])
    for name, value in head.state_dict().items():
        assert torch.equal(value, before[name])
    for image in range(N):
        with torch.no_grad():
            logits = head(*[x for x in code(features[image]) if x is not None])
        best = ttt.confident(logits[None], 2)[0]
        close(found.plain[image], logits[0])
        close(found.all_mean[image].exp(), F.softmax(logits, dim=1).mean(dim=0))
        close(found.kept_mean[image].exp(), F.softmax(logits[best], dim=1).mean(dim=0))
        kept, first = code(features[image][best]), code(features[image][:1])
        whole = [kept[0], first[0][0]]
        if spatial:
            whole += [kept[1], first[1][0]]
        close(found.adapted[image], ttt.adapt_one(head, *whole, config=SMALL))
    assert float((found.adapted - found.plain).abs().amax()) > 0.1
    assert set(found.seconds) == {"views", "encode and select", "adapt"}


def test_steps_lower_the_entropy_of_the_mean():
    head, features = rada(), torch.randn(N, V, D)
    config = TTT(views=V, keep=1.0, lr=1e-3, steps=3)
    with torch.no_grad():
        before = ttt.entropy(ttt.mean_log_prob(head(features.flatten(0, 1)).view(N, V, K)))
        each = StackedRAda(head, N)
        ttt.adapt_stack(each, features, features[:, 0], config)  # no_grad outside is no hindrance
        after = ttt.entropy(ttt.mean_log_prob(each(features)))
    assert bool((after < before).all())


def test_what_cannot_be_adapted_is_refused():
    features = torch.randn(1, V, D)
    with pytest.raises(ValueError, match="must have parameters to train, zeroshot has none"):
        ttt.adapt(ZeroShot(torch.randn(K, D)), features, encode, SMALL)
    with pytest.raises(ValueError, match="there are no images"):
        ttt.adapt(rada(), features[:0], encode, SMALL)
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        ttt.adapt(rada(), features, encode, SMALL, batch=0)
    with pytest.raises(FloatingPointError, match="logits must be finite after the step"):
        ttt.adapt(rada(), features * math.nan, encode, SMALL)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Six drawn scenes of four classes, a run of RAda on them, and four scenes of others."""
    root = tmp_path_factory.mktemp("ttt")
    for folder, per_class, seed in (("images", 6, 11), ("others", 1, 12)):
        pixels, labels, _, names = demo_set(per_class, seed)
        for row, label in enumerate(labels.tolist()):
            if label < 4:
                place = root / folder / names[label]
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels[row]).save(place / f"{row % per_class}.png")
    for method in ("rada", "zeroshot"):
        vtclip.fit(
            root / "images", method=method, shots=2, out=root / method, device="cpu", threads=1,
            cache_dir=root / "cache", overrides={"epochs": 2} if method == "rada" else None,
        )  # fmt: skip
    return {name: root / name for name in ("images", "others", "rada", "zeroshot", "cache")}


def listing(folder: Path) -> list[Path]:
    return sorted(folder.parent.rglob("*"))


FEW = ["--ttt", "--views", "6", "--keep", "0.34"]


def test_evaluate_with_ttt(capsys, world):
    """On the run's own test images: the first row is that of plain evaluate, and all are told."""
    common = ["evaluate", str(world["rada"]), "--cache-dir", str(world["cache"]), "--device", "cpu"]
    plain = json_of(capsys, *common)
    before = listing(world["rada"])
    found = json_of(capsys, *common, *FEW)
    extra = found.pop("ttt")
    assert found == plain
    assert found["count"] == 12
    for name in ("kept_mean", "all_mean", "adapted"):
        assert extra[name]["count"] == 12
        assert 0 <= extra[name]["accuracy"] <= 1
    options = {"views": 6, "keep": 0.34, "kept": 2, "steps": 1, "lr": 5e-3, "seed": 0}
    assert extra["options"] == {**options, "weight_decay": 0.01}
    assert extra["seconds"]["per_image"] == pytest.approx(extra["seconds"]["total"] / 12)
    assert main([*common, *FEW, "--ttt-lr", "0.05", "--steps", "2", "--ttt-seed", "7"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "rada on images: 12 images"
    assert " images left out: " in lines[1]
    heads = [line.split("  ")[0] for line in lines[3:7]]
    assert heads == ["rada", "mean of kept views", "mean of all views", "with TTT"]
    assert lines[7].startswith("6 views, 2 kept, 2 steps at lr 0.05, seed 7; ")
    assert "s per image" in lines[7]
    assert listing(world["rada"]) == before


def test_ttt_on_another_folder_is_the_loop_by_hand(world, clip):
    config = TTT(views=6, keep=0.34, lr=2e-2)
    found = vtclip.evaluate(
        world["rada"], world["others"], device="cpu", cache_dir=world["cache"], ttt=config
    )
    head: Any = load_adapter(world["rada"], device="cpu").head
    hits = 0
    for label, name in enumerate(sorted(path.name for path in world["others"].iterdir())):
        path = next((world["others"] / name).iterdir())
        pixels = image_views(clip, Image.open(path), 6, seed=0, name=f"{name}/{path.name}")
        image, _ = clip.encode_image(pixels)
        best = ttt.confident(head(image)[None], 2)[0]
        hits += int(ttt.adapt_one(head, image[best], image[0], config=config).argmax()) == label
    assert found["ttt"]["adapted"]["accuracy"] == hits / 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--views", "0", "--ttt"], "argument --views: must be in 1..100000, got 0"),
        (["--keep", "2", "--ttt"], "argument --keep: must be above 0 and at most 1, got 2"),
        (["--views", "9", "--ttt"], "--keep * --views must be at least 1 view, got 0.1 * 9"),
        (["--steps", "0", "--ttt"], "argument --steps: must be in 1..10000, got 0"),
        (["--ttt-lr", "0", "--ttt"], "argument --ttt-lr: must be above 0"),
        (["--ttt-seed", "-1", "--ttt"], "argument --ttt-seed: must be in 0..4.29497e+09, got -1"),
        (["--keep", "0.5"], "--keep needs --ttt"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(capsys, world, words, message):
    before = listing(world["rada"])
    assert message in refused(capsys, "evaluate", world["rada"], *words)
    assert listing(world["rada"]) == before


def test_sources_and_heads_that_cannot_be_trained_are_refused(capsys, world, npz, tmp_path):
    write_features(world["others"], tmp_path / "features", device="cpu")
    cases = [
        (world["rada"], npz, "--ttt: SOURCE must be a folder of images, got an .npz table"),
        (world["rada"], tmp_path / "features", "must be a folder of images, got a features folder"),
        (world["zeroshot"], world["others"], "must have parameters to train, zeroshot has none"),
    ]
    for run, source, message in cases:
        assert message in refused(capsys, "evaluate", run, source, "--ttt", "--device", "cpu")
