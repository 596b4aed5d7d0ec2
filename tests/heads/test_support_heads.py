# SPDX-License-Identifier: Apache-2.0
"""What all heads that keep a support set promise: order, copies, files, later classes, refusals."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import support_sets
import torch
from tables import animal_features
from torch import Tensor
from torch.nn import functional as F

import vtclip
from vtclip.data.splits import few_shot_split
from vtclip.heads import HEADS, Support, _support
from vtclip.runs.adapter import load_adapter

METHODS = (
    *("tip-adapter", "tip-adapter-f", "proker", "takl", "tip-x", "proto-clip", "cross-modal"),
    *("gda", "lp++", "ape", "ape-t", "prolip"),
)
EXACT = tuple(name for name in METHODS if name not in ("tip-adapter-f", "ape-t"))
K, C, B = 5, 16, 6
ITERATED = {
    "cross-modal": 1e-5,
    "prolip": 1e-5,
}  # how far from each other solves end that stop at a tolerance
AWAY: dict[str, dict[str, float]] = {  # from what a search finds
    "gda": {"alpha": 4.0},
    "lp++": {"num_steps": 7.0},
}
COUNTS = (3, 1, 4, 2, 0)


def table(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Support]:
    """text [K, C], image [B, C] and a support of COUNTS."""
    text, image = torch.randn(K, C).to(dtype), torch.randn(B, C).to(dtype)
    label = torch.tensor([k for k, count in enumerate(COUNTS) for _ in range(count)])
    rows = F.normalize(text[label].double() + torch.randn(len(label), C), dim=-1)
    return text, image, Support(rows.to(dtype), label)


def fitted(method: str, text: Tensor, support: Support, **options: Any) -> Any:
    return support_sets.fitted(HEADS[method], text, support, logit_scale=20.0, **options)


def near(support: Support) -> Support:
    """Ten noisy copies of each row."""
    rows = support.image.repeat(10, 1)
    return Support(rows + 0.3 * torch.randn_like(rows), support.label.repeat(10))


@pytest.mark.parametrize("method", METHODS)
def test_order_does_not_matter(method):
    text, image, support = table()
    atol = ITERATED.get(method, 1e-10)
    order = torch.randperm(len(support.label))
    shuffled = Support(support.image[order], support.label[order])
    one, two = (fitted(method, text, rows) for rows in (support, shuffled))
    torch.testing.assert_close(one(image), two(image), rtol=0, atol=atol)
    val = Support(torch.randn(8, C).double(), torch.arange(8) % K)
    for head in (one, two):
        head.choose(val)
    torch.testing.assert_close(one(image), two(image), rtol=0, atol=atol)


@pytest.mark.parametrize("method", ["tip-adapter", "tip-adapter-f", "tip-x"])
def test_an_image_that_is_there_twice_votes_twice(method):
    text, image, support = table()
    options = {"slope": 1.0, "offset": 0.0} if method == "tip-x" else {}
    once = fitted(method, text, support, **options)
    twice = Support(support.image.repeat(2, 1), support.label.repeat(2))
    z = HEADS["zeroshot"](text, logit_scale=20.0)(image)
    found = fitted(method, text, twice, **options)(image) - z
    torch.testing.assert_close(found, 2 * (once(image) - z), rtol=1e-10, atol=1e-10)


def test_copies_leave_means_and_halve_the_ridge():
    text, image, support = table()
    twice = Support(support.image.repeat(2, 1), support.label.repeat(2))
    one, two = (fitted("proto-clip", text, rows)(image) for rows in (support, twice))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-12)
    one = fitted("proker", text, support, lam=0.1)(image)
    two = fitted("proker", text, twice, lam=0.2)(image)
    torch.testing.assert_close(one, two, rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_one_class_and_one_image(method):
    text, image, support = table()
    head = fitted(method, text[:1], Support(support.image[:1], support.label[:1]))
    head.choose(Support(image[:2], torch.zeros(2, dtype=torch.long)))
    assert head(image).shape == (B, 1)
    assert bool(head(image).isfinite().all())


@pytest.mark.parametrize("method", METHODS)
def test_support_pulls_towards_its_class(method):
    text, image, _ = table()
    z = HEADS["zeroshot"](text, logit_scale=20.0)(image)
    wrong = z.argmin(dim=1)
    p = fitted(method, text, Support(image, wrong))(image).softmax(dim=1)
    before = fitted(method, text, Support(image[:0], wrong[:0]))(image).softmax(dim=1)
    rows = torch.arange(B)
    assert bool((p[rows, wrong] > before[rows, wrong]).all())


@pytest.mark.parametrize("method", METHODS)
def test_choose_is_repeatable_and_no_images_change_nothing(method):
    text, image, support = table()
    val = near(support)
    one, two = (fitted(method, text, support, **AWAY.get(method, {})) for _ in range(2))
    start = one.options()
    one.choose(val)
    two.choose(val)
    assert one.options() == two.options() != start
    nothing = fitted(method, text, Support(image[:0], val.label[:0]))
    point = nothing.options()
    nothing.choose(Support(image[:0], val.label[:0]))
    for name, value in nothing.options().items():  # the point of the grid next to the prior's
        if value is None:  # an option that is not chosen
            assert point[name] is None
        elif name not in ("slope", "offset"):
            assert math.isclose(value, point[name], rel_tol=0.42), name


@pytest.mark.parametrize("method", EXACT)
def test_extend_equals_a_fit_on_everything(method):
    text, image, support = table()
    head = fitted(method, text, support)
    head.choose(Support(image, torch.arange(B) % K))
    text_new = torch.randn(2, C).double()
    new = Support(torch.randn(4, C).double(), torch.tensor([K, K, K, K + 1]))
    before = {name: value.clone() for name, value in head.state_dict().items()}
    larger = head.extend(text_new, new)
    options = {**head.options()}
    options.pop("num_support", None)
    at_once: Any = HEADS[method](torch.cat([text, text_new]), **options)
    at_once.fit_support(Support(*(torch.cat(pair) for pair in zip(support[:2], new[:2],
                                                                  strict=True))))  # fmt: skip
    atol = ITERATED.get(method, 1e-10)
    torch.testing.assert_close(larger(image), at_once(image), rtol=0, atol=atol)
    assert larger(image).shape == (B, K + 2)
    again: Any = HEADS[method](torch.cat([text, text_new]), **larger.options())
    again.load_state_dict(larger.state_dict())
    for name, value in head.state_dict().items():
        assert torch.equal(value, before[name])


def test_extend_keeps_trained_keys_and_takes_new_ones_as_they_are():
    text, image, support = table()
    head = fitted("tip-adapter-f", text, support)
    with torch.no_grad():
        head.keys += 0.2 * torch.randn_like(head.keys)
    new = Support(3 * torch.randn(2, C).double(), torch.tensor([K, K]))
    larger = head.extend(torch.randn(1, C).double(), new)
    N = len(support.label)
    assert torch.equal(larger.keys[:N], head.keys)
    torch.testing.assert_close(larger.keys[N:], F.normalize(new.image, dim=-1))
    torch.testing.assert_close(larger(image)[:, :K], head(image), rtol=0, atol=1e-12)
    assert larger.keys.requires_grad
    assert (larger.alpha, larger.beta) == (head.alpha, head.beta)


@pytest.mark.parametrize("method", METHODS)
def test_extend_by_a_class_without_images(method):
    text, image, support = table()
    head = fitted(method, text, support)
    nothing = Support(image[:0], torch.zeros(0, dtype=torch.long))
    assert head.extend(torch.randn(1, C).double(), nothing)(image).shape == (B, K + 1)


@pytest.mark.parametrize("method", METHODS)
def test_bad_support(method):
    text, image, support = table()
    head = fitted(method, text, support)
    before = head(image)
    name = type(head).__name__
    label = torch.arange(B) % K
    broken = image.clone()
    broken[2, 0] = math.nan
    for rows, error, text_of in (
        (Support(image, label + 1), ValueError, r"support labels must lie in 0\.\.4, got 1\.\.5$"),
        (Support(image, label - 1), ValueError, r"support labels must lie in 0\.\.4, got -1\.\.3$"),
        (Support(image[:, 1:], label), ValueError, r"support must be image \[N, 16\] and label"),
        (Support(image, label[1:]), ValueError, r"support must be image \[N, 16\] and label"),
        (Support(image, label.double()), TypeError, "support labels must be integers, got"),
        (
            Support(broken, label),
            ValueError,
            "support must be finite, got NaN or infinity in row 2",
        ),
    ):
        for method_of in (head.fit_support, head.choose):
            with pytest.raises(error, match=rf"^{name}: {text_of}"):
                method_of(rows)
    with pytest.raises(ValueError, match=rf"^{name}: text_new must be \[K', 16\], got \[1, 15\]$"):
        head.extend(text[:1, 1:], support)
    with pytest.raises(ValueError, match=rf"^{name}: support labels of new classes must be 5 or"):
        head.extend(text[:1], support)
    with pytest.raises(ValueError, match=rf"^{name}: support labels must lie in 0\.\.5, got 6"):
        head.extend(text[:1], Support(image[:1], torch.tensor([6])))
    assert torch.equal(head(image), before)


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_point_that_is_not_a_number_is_never_chosen(broken):
    label = torch.arange(K)
    nan = torch.full((K, K), math.nan)
    assert _support.scaled_nll(nan, label) == math.inf
    right = torch.eye(K)
    table = {float(i): nan if i == broken else (1 + i) * right for i in range(3)}
    grid, logits_of = {"x": tuple(table)}, lambda at: table[at["x"]]
    wanted = {"x": 2.0 if broken != 2 else 1.0}
    assert _support.most_likely(grid, {}, logits_of, label) == wanted
    parts = torch.ones(1, K, dtype=torch.bool)
    assert _support.most_likely_by(grid, {}, logits_of, label, parts=parts) == [wanted]


def test_scaled_nll_is_the_least_over_temperatures():
    logits, label = 20 * torch.randn(30, 7).double(), torch.arange(30) % 7
    for loud in (0.01, 1.0, 3.0):
        wanted = support_sets.scaled_nll(loud * logits, label)
        assert _support.scaled_nll(loud * logits, label) == pytest.approx(wanted, rel=1e-12)


def test_the_prior_gives_way_to_evidence():
    """Logit a of an event that happens in 3 of 4 trials: the likeliest a is log 3, at T = 1."""
    grid = {"a": _support.steps(1 / 64, 64, 2)}
    label = torch.tensor([0, 0, 0, 1])

    def chosen(copies: int, centre: float) -> float:
        def logits(at: Any) -> Tensor:
            row = torch.tensor([at["a"], 0.0]).double()
            return row.expand(4 * copies, 2)

        return _support.most_likely(grid, {"a": centre}, logits, label.repeat(copies))["a"]

    assert chosen(0, 16.0) == 16.0
    assert chosen(1, 16.0) > chosen(100, 16.0)
    # log 3 at some temperature near 1
    assert chosen(100, 16.0) <= 2.0
    assert chosen(100, 1 / 16) >= 0.5


@pytest.mark.parametrize("method", ["tip-adapter", "tip-adapter-f", "proker", "takl", "tip-x"])
def test_a_large_support_is_searched_over_every_jth_class(method, monkeypatch):
    text, _, support = table()
    image, label = near(support)[:2]
    label = torch.where(label % 2 == 0, label, 4 - label)  # the odd classes deceive
    even = [row for row, k in enumerate(support.label.tolist()) if k % 2 == 0]
    small = fitted(method, text[::2], Support(support.image[even], support.label[even] // 2))
    large = fitted(method, text, support)
    if method == "tip-x":
        small.slope, small.offset = large.slope, large.offset
    kept = label % 2 == 0
    small.choose(Support(image[kept], label[kept] // 2))
    monkeypatch.setattr(_support, "SEARCH_ROWS", len(support.label) - 1)
    large.choose(Support(image, label))
    for name in large.searched:
        assert getattr(large, name) == getattr(small, name), name
    monkeypatch.setattr(_support, "SEARCH_ROWS", len(support.label))
    again = fitted(method, text, support)
    again.choose(Support(image, label))
    assert again.options() != large.options()


@pytest.mark.parametrize("method", METHODS)
def test_copies_choose_by_their_part_as_they_would_alone(method, monkeypatch):
    text, _, support = table()
    image, label = near(support)[:2]
    val = Support(image, label)
    parts = [torch.arange(start, len(label), 3) for start in (0, 1)] + [torch.arange(len(label))]
    for rows in (_support.SEARCH_ROWS, len(support.label) - 1):  # over all and every other class
        monkeypatch.setattr(_support, "SEARCH_ROWS", rows)
        head = fitted(method, text, support, **AWAY.get(method, {}))
        before = head.options()
        for part, copied in zip(parts, head.chosen_by(val, parts), strict=True):
            alone = fitted(method, text, support, **AWAY.get(method, {}))
            alone.choose(Support(image[part], label[part]))
            assert copied.options() == alone.options()
            assert torch.equal(copied(image), alone(image))
        assert head.options() == before
    assert alone.options() != before


def npz(path: Path, *, spoil_test: bool = False) -> Path:
    """Four classes, images half way between two class texts: the support can tell, texts hardly."""
    arrays = animal_features(lean=1.1)
    if spoil_test:
        label = torch.from_numpy(arrays["label"])
        test = few_shot_split(label, [str(i) for i in range(96)], shots=4, seed=1).test
        arrays["image"][test] = torch.randn(len(test), C)
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("method", METHODS)
def test_a_run_gains_over_zero_shot_and_evaluates_as_it_was(method, tmp_path):
    source = npz(tmp_path / "animals.npz")
    run = vtclip.fit(source, method=method, shots=4, out=tmp_path / "run", threads=1)
    gain = run.result["adapted"]["accuracy"] - run.result["zero_shot"]["accuracy"]
    assert gain > 0.3
    again = vtclip.evaluate(tmp_path / "run", threads=1)
    assert again["accuracy"] == run.result["adapted"]["accuracy"]
    assert again["nll"] == run.result["adapted"]["nll"]


@pytest.mark.parametrize("method", METHODS)
def test_test_images_decide_nothing(method, tmp_path):
    states = []
    for spoil in (False, True):
        source = npz(tmp_path / f"{spoil}.npz", spoil_test=spoil)
        out = tmp_path / f"run-{spoil}"
        vtclip.fit(source, method=method, shots=4, out=out, threads=1)
        head = load_adapter(out).head
        states.append((head.options(), head.state_dict()))
    (options, state), (others, other) = states
    assert options == others
    assert all(torch.equal(value, other[name]) for name, value in state.items())
