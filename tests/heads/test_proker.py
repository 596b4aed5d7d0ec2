# SPDX-License-Identifier: Apache-2.0
"""ProKeR is its equation; its limits are zero-shot, ridge regression and interpolation."""

from __future__ import annotations

import math
import sys
from typing import Any

import pytest
import torch
from support_sets import fitted, scaled_nll, table, unit
from torch import Tensor

from vtclip import machine
from vtclip.heads import ProKeR, Support, ZeroShot, _kernel_solve
from vtclip.heads import proker as module

K, C, N = 4, 8, 11
LABEL = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 0])  # class 3 has no support


def rbf(x: Tensor, s: Tensor, beta: float) -> Tensor:
    """From the distances themselves."""
    return torch.exp(-beta * (unit(x)[:, None] - unit(s)[None]).square().sum(dim=-1))


def centred(logits: Tensor) -> Tensor:
    """Without what all classes of an image share, which no softmax sees."""
    return logits - logits.mean(dim=1, keepdim=True)


@pytest.mark.parametrize(
    ("alpha", "beta", "lam"), [(10.0, 0.5, 0.1), (1.0, 4.0, 1e-3), (40.0, 0.05, 3.0)]
)
def test_is_the_equation(alpha, beta, lam):
    text, image, support = table(K, LABEL)
    head = fitted(ProKeR, text, support, alpha=alpha, beta=beta, lam=lam, logit_scale=30.0)
    z, z_S = (30.0 * unit(rows) @ unit(text).T for rows in (image, support.image))
    residual = alpha * torch.eye(K).double()[support.label] - z_S
    gram = rbf(support.image, support.image, beta) + lam * torch.eye(N).double()
    wanted = z + rbf(image, support.image, beta) @ torch.linalg.inv(gram) @ residual
    torch.testing.assert_close(centred(head(image)), centred(wanted), rtol=1e-9, atol=1e-9)
    # the published form: one-hot targets, zero-shot scaled to them
    small = z / alpha + rbf(image, support.image, beta) @ torch.linalg.inv(gram) @ (
        residual / alpha
    )
    torch.testing.assert_close(centred(head(image)), alpha * centred(small), rtol=1e-9, atol=1e-9)


def test_a_large_lam_and_no_support_are_zero_shot():
    text, image, support = table(K, LABEL)
    wanted = ZeroShot(text)(image)
    head = fitted(ProKeR, text, support, lam=1e12)
    torch.testing.assert_close(head(image), wanted, rtol=0, atol=1e-8)
    assert torch.equal(ProKeR(text)(image), wanted)
    empty = Support(torch.zeros(0, C).double(), torch.zeros(0, dtype=torch.long))
    assert torch.equal(fitted(ProKeR, text, empty)(image), wanted)
    assert not torch.allclose(fitted(ProKeR, text, support, lam=1.0)(image), wanted, atol=1e-2)


def test_a_flat_kernel_is_ridge_regression_shrunk_to_the_texts():
    """k -> 1 + 2 beta (x s^T - 1): with lam = 2 beta mu, ridge of strength mu and a free bias."""
    text, image, support = table(K, LABEL)
    beta, mu, alpha, scale = 1e-6, 0.7, 12.0, 30.0
    head = fitted(
        ProKeR, text, support, alpha=alpha, beta=beta, lam=2 * beta * mu, logit_scale=scale
    )
    S, W0 = unit(support.image), scale * unit(text)
    Y = alpha * torch.eye(K).double()[support.label]
    # argmin over W, b of |S W^T + b - Y|^2 + mu |W - W0|^2
    A = torch.cat([S, torch.ones(N, 1).double()], dim=1)
    strength = mu * torch.eye(C + 1).double()
    strength[C, C] = 0
    change = torch.linalg.solve(A.T @ A + strength, A.T @ (Y - S @ W0.T))  # [C + 1, K]
    wanted = unit(image) @ (W0.T + change[:C]) + change[C]
    torch.testing.assert_close(centred(head(image)), centred(wanted), rtol=0, atol=2e-4)


def test_a_small_lam_reaches_the_targets():
    text, _, support = table(K, LABEL)
    head = fitted(ProKeR, text, support, alpha=10.0, beta=4.0, lam=1e-6)
    wanted = centred(10.0 * torch.eye(K).double()[support.label])
    torch.testing.assert_close(centred(head(support.image)), wanted, rtol=0, atol=1e-2)


def test_duplicates_at_the_least_lam_are_finite():
    text, image, support = table(K, LABEL)
    twice = Support(support.image.repeat(50, 1), support.label.repeat(50))
    head = fitted(ProKeR, text, twice, lam=module.LEAST_LAM)
    assert bool(head(image).isfinite().all())
    # labels that contradict each other meet half way
    both = Support(support.image[:1].repeat(2, 1), torch.tensor([0, 1]))
    seen = fitted(ProKeR, text, both, lam=module.LEAST_LAM, alpha=10.0)(support.image[:1])[0]
    assert abs(float(seen[0] - seen[1])) < 1e-3
    assert float(seen[0] - seen[2]) == pytest.approx(5.0, abs=1e-2)


def test_search_finds_what_heads_of_each_point_would(monkeypatch):
    monkeypatch.setattr(module, "ALPHAS", (0.05, 0.2))
    monkeypatch.setattr(module, "BETAS", (0.25, 1.0))
    monkeypatch.setattr(module, "LAMBDAS", (0.03, 0.3))
    text, image, support = table(K, LABEL)
    label = torch.tensor([0, 1, 2, 3, 1, 0])
    head = fitted(ProKeR, text, support)
    costs = {}
    for alpha in (5.0, 20.0):
        for beta in (0.25, 1.0):
            for lam in (0.03, 0.3):
                logits = fitted(ProKeR, text, support, alpha=alpha, beta=beta, lam=lam)(image)
                nll = scaled_nll(logits, label)
                ratios = alpha / 15.0, beta / 1.0, lam / 0.1
                away = sum((math.log(ratio) / math.log(2)) ** 2 for ratio in ratios)
                costs[alpha, beta, lam] = nll + away / 2
    best, second = sorted(costs.values())[:2]
    assert second - best > 1e-6  # a tie would prove nothing
    head.choose(Support(image, label))
    assert costs[head.alpha, head.beta, head.lam] == best
    again = fitted(ProKeR, text, support, alpha=head.alpha, beta=head.beta, lam=head.lam)
    torch.testing.assert_close(head(image), again(image), rtol=0, atol=1e-10)


def test_float32_solves_in_float64():
    text, image, support = table(K, LABEL)
    options = {"alpha": 10.0, "beta": 0.5, "lam": 1e-4}
    text, support = text.float(), Support(support.image.float(), support.label)
    narrow = fitted(ProKeR, text, support, **options)
    exact = Support(support.image.double(), support.label)
    wide = fitted(ProKeR, text.double(), exact, **options)
    assert narrow.coefficients.dtype == torch.float32
    size = float(wide.coefficients.abs().max())
    error = float((narrow.coefficients - wide.coefficients).abs().max())
    # keys of float32 length 1, not the solve, limit the agreement: eps / lam
    assert error / size < 20 * torch.finfo(torch.float32).eps / options["lam"]


def many(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Support]:
    """600 images of 40 classes, whose directions have a lot in common as those of CLIP have."""
    torch.manual_seed(5)
    classes, width = 40, 24
    label = torch.arange(classes).repeat_interleave(15)
    text = torch.randn(classes, width).double() + 1
    drawn = text[label] + torch.randn(len(label), width).double()
    return text.to(dtype), unit(drawn[::3]).to(dtype), Support(unit(drawn).to(dtype), label)


@pytest.mark.parametrize(
    ("alpha", "beta", "lam"), [(15.0, 1.0, 0.1), (80.0, 0.25, 0.01), (2.5, 4.0, 10.0)]
)
@pytest.mark.parametrize("votes", [None, 10.0])
def test_many_images_are_solved_in_float32_as_well(alpha, beta, lam, votes, monkeypatch):
    text, image, support = many()
    options = {"alpha": alpha, "beta": beta, "lam": lam, "votes_per_class": votes}
    wide = fitted(ProKeR, text, support, **options)
    monkeypatch.setattr(_kernel_solve, "MANY_ROWS", len(support.label) - 1)
    seen = []
    monkeypatch.setattr(_kernel_solve, "_in_place", lambda *of, do=_kernel_solve._in_place: (
        seen.append(of[0].dtype), do(*of))[1])  # fmt: skip
    narrow, again = (fitted(ProKeR, text, support, **options) for _ in range(2))
    assert seen == [torch.float32] * 2
    assert narrow.coefficients.dtype == torch.float32
    assert narrow.coefficients.is_contiguous()
    assert torch.equal(narrow.coefficients, again.coefficients)
    error = (centred(narrow(image)) - centred(wide(image))).double().square().mean().sqrt()
    assert float(error / centred(wide(image)).double().square().mean().sqrt()) < 1e-3
    assert torch.equal(narrow(image).argmax(dim=1), wide(image).argmax(dim=1))


@pytest.mark.parametrize("reason", ["not positive", "not close", "float64 head"])
def test_many_images_are_solved_in_float64_where_float32_is_not_enough(reason, monkeypatch):
    dtype = torch.float64 if reason == "float64 head" else torch.float32
    text, image, support = many(dtype)
    lam = module.LEAST_LAM if reason == "not positive" else 0.01
    if reason == "not positive":
        support = Support(support.image.repeat(4, 1), support.label.repeat(4))
    wide = fitted(ProKeR, text, support, lam=lam, beta=0.25)
    monkeypatch.setattr(_kernel_solve, "MANY_ROWS", 100)
    if reason == "not close":
        monkeypatch.setattr(_kernel_solve, "CLOSENESS", 1e-12)
    seen = []

    def in_place(*of: Any, do: Any = _kernel_solve._in_place) -> Tensor | None:
        seen.append((of[0].dtype, do(*of)))
        return seen[-1][1]

    monkeypatch.setattr(_kernel_solve, "_in_place", in_place)
    head = fitted(ProKeR, text, support, lam=lam, beta=0.25)
    assert [dtype for dtype, _ in seen] == [torch.float32, torch.float64][-len(seen) :]
    assert len(seen) == (1 if reason == "float64 head" else 2)
    if reason == "not positive":
        assert seen[0][1] is None
    torch.testing.assert_close(head(image), wide(image), rtol=1e-5, atol=1e-4)


def test_what_is_left_of_the_targets_is_seen():
    _, _, support = many(torch.float64)
    keys, ridge = support.image, torch.full((600,), 0.1).double()
    b = torch.randn(600, 5).double()
    exact = _kernel_solve.kernel_solve(keys, 1.0, ridge, b)
    left = lambda X: _kernel_solve._left(keys, 1.0, ridge, b, X)  # noqa: E731
    assert left(exact) < 1e-12
    assert left(torch.zeros_like(b)) == pytest.approx(1.0)
    assert left(exact + 0.01) > _kernel_solve.CLOSENESS
    exact[3, 1] = math.nan
    assert left(exact) == math.inf


def test_no_solve_before_the_choice(monkeypatch):
    """What `choose` makes of a kept support is what it makes of a solved one."""
    text, image, support = table(K, LABEL)
    val = Support(image, torch.tensor([0, 1, 2, 3, 1, 0]))
    solved = fitted(ProKeR, text, support)
    kept = ProKeR(text)
    kept.keep_support(support)
    with pytest.raises(RuntimeError):
        kept(image)
    solved.choose(val)
    kept.choose(val)
    assert kept.options() == solved.options()
    assert torch.equal(kept.coefficients, solved.coefficients)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no peak memory from a moment on")
def test_the_memory_of_one_table_of_float32(monkeypatch):
    """Also of what torch makes inside its functions: the process grows by no second table."""
    rows, classes, width = 4000, 8, 16
    label = torch.arange(rows) % classes
    support = Support(torch.randn(rows, width), label)
    monkeypatch.setattr(_kernel_solve, "MANY_ROWS", rows - 1)
    monkeypatch.setattr(_kernel_solve, "CHECKED", 64)
    cpu, text = torch.device("cpu"), torch.randn(classes, width)
    fitted(ProKeR, text, Support(support.image[:200], label[:200]))  # what loads itself late
    machine.reset_peak_memory(cpu)
    before = machine.peak_memory_mb(cpu)
    fitted(ProKeR, text, support)
    after = machine.peak_memory_mb(cpu)
    assert before is not None
    assert after is not None
    assert after - before < 1.5 * rows**2 * 4 / 1e6
