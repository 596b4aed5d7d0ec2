# SPDX-License-Identifier: Apache-2.0
"""The parts of a head's logits add up to them, and are what its equation says of each row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support_sets import table, unit
from torch import Tensor
from torch.nn import functional as F

from vtclip.heads import HEADS, TAKL, Auto, Head, Support, _contributions
from vtclip.heads._contributions import PROMPTS, expansion
from vtclip.heads._logistic import Problem, minimise
from vtclip.heads.auto import EVERY_CLASS
from vtclip.heads.takl import basis

# method, options: what is fitted to a support without training
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "zeroshot": ("zeroshot", {}),
    "tip-adapter": ("tip-adapter", {"alpha": 3.0, "beta": 4.0}),
    "tip-adapter-f": ("tip-adapter-f", {"alpha": 3.0, "beta": 4.0}),
    "tip-x": ("tip-x", {"alpha": 3.0, "beta": 4.0, "gamma": 2.0}),
    "ape": ("ape", {"gamma": 0.5, "share": 0.5}),
    "ape-t": ("ape-t", {"alpha": 3.0, "share": 0.5}),
    "proker": ("proker", {"alpha": 3.0, "beta": 0.5}),
    "takl": ("takl", {"lam": 0.03}),
    "takl, kernel": ("takl", {"beta": 1.0, "lam": 0.03}),
    "cross-modal": ("cross-modal", {"l2": 0.03}),
}
LABELS = {
    "odd": [0, 0, 0, 1, 1, 1, 1, 2, 2, 0, 4],  # class 3 has none
    "one shot": [0, 1, 2, 3, 4],
    "one class": [0, 0, 0],
    "one image": [0],
    "two classes": [1, 0, 1],
    "none": [],
}
BALANCED = {"tip-adapter", "tip-x", "proker", "takl", "cross-modal"}
every_case = pytest.mark.parametrize("case", CASES)


def made(case: str, K: int, label: Tensor, C: int = 9, **more: Any) -> tuple[Head, Tensor, Support]:
    """A float64 head, fitted and shaken where it has parameters; image [3, C]; the support."""
    method, options = CASES[case]
    text, image, support = table(K, label, C=C, B=3)
    head = HEADS[method](text, logit_scale=20.0, **options, **more)
    head.fit_support(support)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return head.eval(), image, support


def close(actual: Tensor, wanted: Tensor, relative: float = 1e-9) -> None:
    torch.testing.assert_close(actual, wanted, rtol=0, atol=relative * float(wanted.abs().amax()))


def test_each_head_with_contributions_is_here():
    able = {name for name in HEADS if HEADS[name].has_contributions}
    assert able == {method for method, _ in CASES.values()} | {"auto"}


@every_case
@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("C", [9, 40])
def test_the_parts_add_up_to_the_logits(case, labels, C):
    label = torch.tensor(LABELS[labels], dtype=torch.long)
    K = {"one class": 1, "one image": 1, "two classes": 2}.get(labels, 5)
    head, image, _ = made(case, K, label, C)
    with torch.no_grad():
        logits = head(image)
    parts = head.contributions(image)
    close(parts.logits(), logits)
    base, N = parts.terms[PROMPTS], len(parts.label)
    rows = parts.rows()
    assert rows.shape == (3, N + K, K)
    assert (0 if case == "zeroshot" else len(label)) == N
    close(base + rows.sum(dim=1), logits)
    close(base + parts.shared() + parts.rows(centred=True).sum(dim=1), logits)
    torch.testing.assert_close(parts.rows([K - 1]), rows[:, :, [K - 1]], rtol=0, atol=0)
    torch.testing.assert_close(parts.label, label[:N])
    torch.testing.assert_close(parts.text_cosine, unit(image) @ unit(head.text).T)


@pytest.mark.parametrize("case", [name for name in CASES if CASES[name][0] in BALANCED])
def test_they_do_with_votes_per_class(case):
    head, image, _ = made(case, 5, torch.tensor(LABELS["odd"]), votes_per_class=2.5)
    with torch.no_grad():
        close(head.contributions(image).logits(), head(image))


@every_case
def test_they_go_with_their_rows(case):
    """The support in another order, and one image at a time."""
    label = torch.tensor(LABELS["odd"])
    if case == "zeroshot":
        label = label[:0]
    head, image, support = made(case, 5, label)
    head.fit_support(support)  # what is trained is as it begins
    parts = head.contributions(image)
    order = torch.randperm(len(label))
    other = type(head)(head.text, **{**head.options(), "num_support": 0}) if len(label) else head
    other.fit_support(support.rows(order))
    moved = other.contributions(image[[1]])
    rows = torch.cat([order, len(label) + torch.arange(5)])
    close(moved.rows()[0], parts.rows()[1, rows], 1e-6)
    close(moved.rows(centred=True)[0], parts.rows(centred=True)[1, rows], 1e-6)
    torch.testing.assert_close(moved.label, parts.label[order])
    torch.testing.assert_close(moved.cosine[0], parts.cosine[1, order])


def test_rows_of_tip_adapter_and_proker_are_those_of_their_equations():
    label = torch.tensor(LABELS["odd"])
    head, image, support = made("tip-adapter", 5, label)
    near = torch.exp(-4.0 * (1 - unit(image) @ unit(support.image).T))  # [3, N]
    wanted = 3.0 * near[:, :, None] * F.one_hot(label, 5)
    torch.testing.assert_close(head.contributions(image).rows()[:, : len(label)], wanted)
    assert not head.contributions(image).rows()[:, len(label) :].any()
    head, image, support = made("proker", 5, label)
    s = unit(support.image)
    near = torch.exp(-0.5 * (unit(image)[:, None] - s).square().sum(dim=2))
    wanted = near[:, :, None] * head.coefficients
    torch.testing.assert_close(head.contributions(image).rows()[:, : len(label)], wanted)
    usual = torch.exp(-0.5 * (s[:, None] - s).square().sum(dim=2)).mean(dim=0)
    wanted = (near - usual)[:, :, None] * head.coefficients
    torch.testing.assert_close(
        head.contributions(image).rows(centred=True)[:, : len(label)], wanted
    )


def test_the_usual_kernel_values_do_not_depend_on_how_many_are_held_at_once(monkeypatch):
    head, image, _ = made("takl, kernel", 5, torch.tensor(LABELS["odd"]))
    wanted = head.contributions(image).shared()
    monkeypatch.setattr(_contributions, "AT_A_TIME", 3)
    close(head.contributions(image).shared(), wanted, 1e-12)


@pytest.mark.parametrize("C", [4, 9, 40])
def test_an_expansion_is_that_of_the_optimum(C):
    """A_i = w_i (y_i - p_i) / lam, with which rows^T A is W; C below and above the rows."""
    label = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2])
    rows, offset = unit(torch.randn(9, C).double()), torch.randn(9, 3).double()
    weight, lam = torch.rand(9).double() + 0.5, 0.02
    problem = Problem(rows, offset, weight, label)
    W = minimise(problem, torch.zeros(C, 3).double(), lam, closeness=1e-11, max_steps=5000)
    A = expansion(rows, W, offset, weight, label, lam)
    share = (offset + rows @ W).softmax(dim=1)
    close(A, weight[:, None] * (F.one_hot(label, 3) - share) / lam, 1e-7)
    close(rows.T @ A, W)


@pytest.mark.parametrize("C", [4, 9, 40])
def test_an_expansion_is_exact_before_the_optimum_too(C):
    label = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2])
    rows, offset = unit(torch.randn(9, C).double()), torch.randn(9, 3).double()
    rows[4] = rows[1]  # the same image twice
    weight, lam = torch.rand(9).double() + 0.5, 0.02
    B, R = basis(rows, 0.0)  # W lies in the span of the rows
    problem = Problem(R, offset, weight, label)
    W = B @ minimise(problem, torch.zeros(R.shape[1], 3).double(), lam, closeness=0.0, max_steps=3)
    share = (offset + rows @ W).softmax(dim=1)
    found = weight[:, None] * (F.one_hot(label, 3) - share) / lam
    assert float((rows.T @ found - W).abs().max()) > 0.01
    close(rows.T @ expansion(rows, W, offset, weight, label, lam), W)


def test_a_float32_head_adds_up_to_its_rounding():
    label = torch.arange(6).repeat_interleave(4)
    text = F.normalize(torch.randn(6, 16) + 2, dim=-1)
    support = Support(F.normalize(text[label] + 0.3 * torch.randn(24, 16), dim=-1), label)
    support.image[1] = support.image[0] + 1e-7  # near copies must not blow the expansion up
    head = TAKL(text, lam=0.001)
    head.fit_support(support)
    image = torch.randn(5, 16)
    parts = head.contributions(image)
    assert parts.logits().dtype == torch.float64
    torch.testing.assert_close(parts.logits(), head(image).double(), rtol=0, atol=2e-4)
    assert float(parts.rows().abs().max()) < 1 / 0.001  # |w (y - p) / lam| is no more


def pool(label: Tensor, **options: Any) -> tuple[Auto, list[Head], Tensor]:
    """A float64 pool of heads over one support, next to the heads themselves."""
    text, image, support = table(4, label, C=16, B=3)
    heads = []
    for method in ("takl", "rada", "tip-adapter-f", "zeroshot", "proker"):
        head = HEADS[method](text, logit_scale=20.0)
        head.fit_support(support)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        heads.append(head.eval())
    members = [
        {"method": head.method, "options": head.options(), "temperature": T, "weight": w}
        for head, T, w in zip(heads, (0.5, 2.0, 1.5, 0.7, 3.0), (3, 2, 1, 2, 4), strict=True)
    ]
    auto = Auto(text, members=members, logit_scale=20.0, **options)
    for own, head in zip(auto.heads, heads, strict=True):
        own.load_state_dict(head.state_dict())
    return auto.eval(), heads, image


def test_a_log_linear_pool_adds_the_parts_of_its_members():
    label = torch.tensor([0, 0, 1, 2, 3, 3])
    auto, heads, image = pool(label, pool="log-linear", sharpness=1.3)
    parts = auto.contributions(image)
    assert set(parts.terms) == {PROMPTS, "rada", EVERY_CLASS}
    shares = [
        1.3 * w / T
        for w, T in zip((3 / 12, 2 / 12, 1 / 12, 2 / 12, 4 / 12), auto.temperatures, strict=True)
    ]
    with torch.no_grad():
        logits = [head(image) for head in heads]
        scaled = [rows / T for rows, T in zip(logits, auto.temperatures, strict=True)]
        wanted = sum(
            1.3 * w * rows.log_softmax(dim=1) for w, rows in zip(auto.weights, scaled, strict=True)
        )
    close(parts.logits(), wanted)
    torch.testing.assert_close(parts.terms["rada"], shares[1] * logits[1])
    level = parts.terms[EVERY_CLASS]
    torch.testing.assert_close(level, level[:, :1].expand_as(level))
    own = [head.contributions(image).rows() for head in (heads[0], heads[2], heads[4])]
    each = sum(s * rows for s, rows in zip((shares[0], shares[2], shares[4]), own, strict=True))
    close(parts.rows(), each)
    # of the trained keys and of the images as they were the latter
    torch.testing.assert_close(parts.cosine, heads[4].contributions(image).cosine)


def test_members_of_another_support_are_terms():
    auto, heads, image = pool(torch.tensor([0, 0, 1, 2, 3, 3]), pool="log-linear")
    with torch.no_grad():
        auto.heads[4].label[0] = 3
    parts = auto.contributions(image)
    assert set(parts.terms) == {PROMPTS, "rada", "proker", EVERY_CLASS}
    with torch.no_grad():
        torch.testing.assert_close(parts.logits(), auto(image).double(), rtol=1e-5, atol=1e-5)


def test_a_mixture_is_no_sum_and_one_member_is():
    auto, heads, image = pool(torch.tensor([0, 1, 2, 3]))
    assert not auto.is_sum
    with pytest.raises(NotImplementedError, match="^Auto: contributions: a mixture of several "):
        auto.contributions(image)
    alone = Auto(heads[0].text)
    assert alone.is_sum
    with torch.no_grad():
        wanted = alone(image).double()
    torch.testing.assert_close(alone.contributions(image).logits(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [name for name in HEADS if not HEADS[name].has_contributions])
def test_other_heads_refuse(method):
    text, image, _ = table(3, torch.tensor([0, 1, 2]), C=16)
    head = HEADS[method](text)
    with pytest.raises(NotImplementedError, match=f"^{type(head).__name__}: contributions: "):
        head.contributions(image)


@every_case
def test_a_wrong_image_is_refused(case):
    head, image, _ = made(case, 5, torch.tensor(LABELS["odd"]))
    with pytest.raises(ValueError, match=r"image must be \[B, 9\], got \[3, 8\]$"):
        head.contributions(image[:, 1:])
