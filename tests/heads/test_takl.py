# SPDX-License-Identifier: Apache-2.0
"""TAKL is the minimum of its objective: by other optimisers, by its limits and by symmetries."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from support_sets import fitted, scaled_nll, table, unit
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from vtclip.heads import TAKL, Support, ZeroShot, _logistic, _support
from vtclip.heads import takl as module
from vtclip.heads._logistic import Problem, gradient, minimise, objective

K, C = 4, 8
LABEL = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 2, 2, 0])  # class 3 has no support
N = len(LABEL)
SCALE = 30.0
kernels = pytest.mark.parametrize("beta", [0.0, 1.0])


def gram_of(x: Tensor, s: Tensor, beta: float) -> Tensor:
    """k(x, s), from the distances themselves."""
    x, s = unit(x), unit(s)
    if not beta:
        return x @ s.T
    return torch.exp(-beta * (x[:, None] - s[None]).square().sum(dim=-1))


def anchored(text: Tensor, support: Support) -> tuple[Tensor, Tensor]:
    """The rows S [N + K, C] and their labels."""
    return torch.cat([unit(support.image), unit(text)]), torch.cat([support.label, torch.arange(K)])


def cost(A: Tensor, text: Tensor, support: Support, beta: float, lam: float, T0: float) -> Tensor:
    """The objective of the docstring, of kernel coefficients A [N + K, K]."""
    rows, label = anchored(text, support)
    gram = gram_of(rows, rows, beta)
    logits = SCALE * rows @ unit(text).T / T0 + gram @ A
    loss = F.cross_entropy(logits, label, reduction="sum")
    return loss + lam / 2 * (A * (gram @ A)).sum()


def problem(M: int = 9, r: int = 5, classes: int = 3) -> Problem:
    label = torch.arange(M) % classes
    rows = torch.randn(M, r).double()
    return Problem(rows, torch.randn(M, classes).double(), torch.rand(M).double() + 0.5, label)


def test_the_objective_has_its_gradient():
    some, W = problem(), torch.randn(5, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda W: objective(some, W, 0.3), (W,))
    assert torch.autograd.gradgradcheck(lambda W: objective(some, W, 0.3), (W,))
    (slope,) = torch.autograd.grad(objective(some, W, 0.3), W)
    torch.testing.assert_close(gradient(some, W.detach(), 0.3), slope, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lam", [1.0, 1e-2, 1e-4])
def test_the_minimum_is_reached_from_anywhere(lam):
    """The bound on the gradient bounds the distance, too: the objective is strongly convex."""
    some = problem(M=30, r=20, classes=6)
    ends = []
    for start in (torch.zeros(20, 6), 10 * torch.randn(20, 6)):
        W = minimise(some, start.double(), lam, closeness=1e-9, max_steps=2000)
        assert float(gradient(some, W, lam).norm()) <= 1e-9 * lam
        ends.append(W)
    torch.testing.assert_close(*ends, rtol=0, atol=2e-9)


def test_no_step_raises_the_objective():
    some = problem(M=30, r=20, classes=6)
    start = 100 * torch.randn(20, 6).double()  # where the probabilities are 0 and 1
    costs = [
        float(objective(some, minimise(some, start, 1e-3, closeness=0, max_steps=n), 1e-3))
        for n in range(60)
    ]
    assert all(after <= before + 1e-10 for before, after in zip(costs, costs[1:], strict=False))
    ends = [
        float(objective(some, minimise(some, begin, 1e-3, closeness=0, max_steps=2000), 1e-3))
        for begin in (start, torch.zeros_like(start))
    ]
    assert ends[0] == pytest.approx(ends[1], rel=1e-8)  # convex: one end from anywhere


def test_what_is_not_a_number_ends():
    some = problem()
    for bad in (math.nan, math.inf):
        offset = some.offset.clone()
        offset[2, 1] = bad
        broken = some._replace(offset=offset)
        minimise(broken, torch.zeros(5, 3).double(), 0.1, closeness=1e-9, max_steps=50)


@kernels
@pytest.mark.parametrize(("lam", "T0"), [(0.3, 2.0), (1e-3, 2.0), (0.01, 0.7)])
def test_no_change_of_the_coefficients_lowers_the_objective(beta, lam, T0):
    """The gradient in A is k(S, S) (P - Y + lam A): 0 at the optimum, seen in k's own norm."""
    text, image, support = table(K, LABEL)
    options = {"beta": beta, "lam": lam, "zero_shot_temperature": T0, "logit_scale": SCALE}
    head = fitted(TAKL, text, support, **options)
    rows, label = anchored(text, support)
    z = SCALE * rows @ unit(text).T / T0
    found = head(rows)  # at the training rows: the probabilities give A by stationarity
    A = (F.one_hot(label, K) - found.softmax(dim=1)) / lam
    torch.testing.assert_close(z + gram_of(rows, rows, beta) @ A, found, rtol=0, atol=1e-8)
    wanted = SCALE * unit(image) @ unit(text).T / T0 + gram_of(image, rows, beta) @ A
    torch.testing.assert_close(head(image), wanted, rtol=0, atol=1e-8)
    if beta:
        torch.testing.assert_close(head.coefficients, A, rtol=0, atol=1e-6)
    A.requires_grad_()
    (slope,) = torch.autograd.grad(cost(A, text, support, beta, lam, T0), A)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-9)


def test_the_linear_case_is_cross_modal_logistic_regression():
    """In the space of weights, with texts as further rows, by Newton's method in one piece."""
    text, image, support = table(K, LABEL)
    lam = 0.05
    rows, label = anchored(text, support)

    def loss(flat: Tensor) -> Tensor:
        W = flat.view(C, K)
        logits = SCALE * rows @ unit(text).T / 2 + rows @ W
        return F.cross_entropy(logits, label, reduction="sum") + lam / 2 * W.square().sum()

    flat = torch.zeros(C * K).double()
    for _ in range(50):
        step = torch.linalg.solve(torch.func.hessian(loss)(flat), torch.func.grad(loss)(flat))
        size = 1.0
        while float(loss(flat - size * step)) > float(loss(flat)) + 1e-12:
            size /= 2
        flat = flat - size * step
    head = fitted(TAKL, text, support, lam=lam, logit_scale=SCALE)
    torch.testing.assert_close(head.coefficients, flat.view(C, K), rtol=0, atol=1e-8)
    wanted = unit(image) @ (SCALE / 2 * unit(text).T + flat.view(C, K))
    torch.testing.assert_close(head(image), wanted, rtol=0, atol=1e-8)


@pytest.mark.parametrize("width", [6, 40])  # more rows than features, and fewer
def test_the_linear_kernel_needs_no_table_of_rows(width):
    """In the space of features it is what the eigenvectors of k(S, S) give."""
    text, image, support = table(K, LABEL, C=width)
    head = fitted(TAKL, text, support, lam=0.02, logit_scale=SCALE)
    rows, label = anchored(text, support)
    values, U = torch.linalg.eigh(rows @ rows.T)
    R = U * values.clamp(min=0).sqrt()
    offset = SCALE * rows @ unit(text).T / 2
    ones = torch.ones(len(rows)).double()
    W = minimise(
        Problem(R, offset, ones, label), torch.zeros(len(rows), K).double(), 0.02,
        closeness=1e-10, max_steps=1000,
    )  # fmt: skip
    torch.testing.assert_close(head(rows), offset + R @ W, rtol=0, atol=1e-8)
    assert head.coefficients.shape == (width, K)
    B, R = module.basis(rows, 0.0)
    assert R.shape[1] <= min(width, len(rows))
    torch.testing.assert_close(R @ R.T, rows @ rows.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(rows @ B, R, rtol=0, atol=1e-12)


def test_leading_eigenvectors_of_many_rows(monkeypatch):
    """Above EXACT_ROWS an approximate space, exactly orthonormal in the kernel, little worse."""
    rows = unit(torch.randn(240, 24).double() * torch.linspace(3, 0.1, 24).double() + 1)
    gram = gram_of(rows, rows, 1.0)
    monkeypatch.setattr(module, "RANK", 64)
    exact = module.basis(rows, 1.0)[1]
    monkeypatch.setattr(module, "EXACT_ROWS", 100)
    B, R = module.basis(rows, 1.0)
    assert R.shape == (240, 64)
    torch.testing.assert_close(B.T @ gram @ B, torch.eye(64).double(), rtol=0, atol=1e-8)
    torch.testing.assert_close(gram @ B, R)
    missing = [float(gram.trace() - x.square().sum()) for x in (exact, R)]
    assert 0 < missing[0] <= missing[1] < 1.5 * missing[0]
    state = torch.get_rng_state()
    assert torch.equal(module.basis(rows, 1.0)[1], R)
    assert torch.equal(torch.get_rng_state(), state)


@kernels
def test_a_strong_penalty_ranks_as_zero_shot(beta):
    text, image, support = table(K, LABEL)
    z = ZeroShot(text, logit_scale=SCALE)(image)
    head = fitted(TAKL, text, support, beta=beta, lam=1e9, logit_scale=SCALE)
    torch.testing.assert_close(head(image), z / 2, rtol=0, atol=1e-7)
    assert torch.equal(head(image).argsort(dim=1), z.argsort(dim=1))
    weak = fitted(TAKL, text, support, beta=beta, lam=0.1, logit_scale=SCALE)
    assert not torch.allclose(weak(image), z / 2, atol=1e-1)
    # without images there is nothing to be less sure for
    assert torch.equal(TAKL(text, beta=beta, logit_scale=SCALE)(image), z)
    empty = Support(support.image[:0], support.label[:0])
    assert torch.equal(fitted(TAKL, text, empty, beta=beta, logit_scale=SCALE)(image), z)


@kernels
def test_permuted_classes_permute_the_logits(beta):
    text, image, support = table(K, LABEL)
    order = torch.tensor([2, 0, 3, 1])
    moved = Support(support.image, order.argsort()[support.label])
    one = fitted(TAKL, text, support, beta=beta, logit_scale=SCALE)
    two = fitted(TAKL, text[order], moved, beta=beta, logit_scale=SCALE)
    torch.testing.assert_close(two(image), one(image)[:, order], rtol=0, atol=1e-8)
    val = Support(image, torch.arange(len(image)) % K)
    one.choose(val)
    two.choose(Support(image, order.argsort()[val.label]))
    assert (one.beta, one.lam) == (two.beta, two.lam)


@kernels
def test_duplicates_and_labels_that_contradict_each_other(beta):
    text, image, support = table(K, LABEL)
    twice = Support(support.image.repeat(2, 1), support.label.repeat(2))
    one = fitted(TAKL, text, twice, beta=beta, votes_per_class=1.0, logit_scale=SCALE)
    two = fitted(TAKL, text, support, beta=beta, votes_per_class=1.0, logit_scale=SCALE)
    torch.testing.assert_close(one(image), two(image), rtol=0, atol=1e-7)
    many = Support(support.image.repeat(40, 1), support.label.repeat(40))
    head = fitted(TAKL, text, many, beta=beta, lam=module.LEAST_LAM, logit_scale=SCALE)
    assert bool(head(image).isfinite().all())
    both = Support(support.image[:1].repeat(40, 1), torch.tensor([0, 1] * 20))
    seen = fitted(TAKL, text, both, beta=beta, lam=0.01, logit_scale=SCALE)(support.image[:1])[0]
    assert abs(float(seen[0] - seen[1])) < 1.0
    assert float(seen[:2].min() - seen[2:].max()) > 2.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_text_that_is_not_finite_is_refused(value):
    text, image, support = table(K, LABEL)
    head = fitted(TAKL, text, support)
    before = head(image)
    head.text[2, 1] = value
    with pytest.raises(ValueError, match=r"^TAKL: text must be finite, got NaN .* in row 2$"):
        head.fit_support(Support(support.image[:2], LABEL[:2]))
    head.text.copy_(text)
    assert torch.equal(head(image), before)


@kernels
def test_more_classes_than_features(beta):
    text, image, support = table(20, torch.arange(20), C=4)
    head = fitted(TAKL, text, support, beta=beta, lam=1e-3, logit_scale=SCALE)
    right = [
        float((one(support.image).argmax(dim=1) == support.label).double().mean())
        for one in (head, ZeroShot(text))
    ]
    assert right[0] > right[1] + 0.2
    head.choose(Support(image, torch.arange(6)))
    assert bool(head(image).isfinite().all())


@kernels
def test_the_same_images_give_the_same_bits_whatever_was_asked_before(beta):
    text, image, support = table(K, LABEL)
    text, image = text.float(), image.float()
    support = Support(support.image.float(), LABEL)
    point = {"beta": beta, "lam": 0.003}
    at_once = fitted(TAKL, text, support, **point, logit_scale=SCALE)
    other = fitted(TAKL, text, support, beta=1.0 - beta, lam=1e-4, logit_scale=SCALE)
    other.take({"beta": beta, "lam": 0.1})
    other.take(point)
    assert torch.equal(other.coefficients, at_once.coefficients)
    heads = [fitted(TAKL, text, support, logit_scale=SCALE) for _ in range(2)]
    for head in heads:
        head.choose(Support(image, torch.arange(len(image)) % K))
    assert torch.equal(heads[0](image), heads[1](image))


def test_search_finds_what_heads_of_each_point_would(monkeypatch):
    text, image, support = table(K, LABEL)
    label = torch.tensor([0, 1, 2, 3, 1, 0])
    costs = {}
    for beta in module.BETAS:
        for lam in module.LAMBDAS:
            logits = fitted(TAKL, text, support, beta=beta, lam=lam, logit_scale=SCALE)(image)
            away = math.log10(lam / 0.01) ** 2 / 2  # and no prior of the kernel
            costs[beta, lam] = scaled_nll(logits, label) + away
    best, second = sorted(costs.values())[:2]
    assert second - best > 1e-6  # a tie would prove nothing
    monkeypatch.setattr(module, "ROUGH", 1e-9)
    monkeypatch.setattr(module, "ROUGH_STEPS", 1000)
    head = fitted(TAKL, text, support, logit_scale=SCALE)
    head.choose(Support(image, label))
    assert costs[head.beta, head.lam] == best
    again = fitted(TAKL, text, support, beta=head.beta, lam=head.lam, logit_scale=SCALE)
    torch.testing.assert_close(head(image), again(image), rtol=0, atol=1e-8)


def test_a_rough_search_ranks_as_an_exact_one():
    torch.manual_seed(3)
    text, image, support = table(6, torch.arange(6).repeat_interleave(4), C=24, B=60)
    label = torch.arange(60) % 6
    head = fitted(TAKL, text, support, logit_scale=SCALE)
    rough = head.candidates(unit(image), label)
    for beta in module.BETAS:
        for lam in module.LAMBDAS:
            exact = fitted(TAKL, text, support, beta=beta, lam=lam, logit_scale=SCALE)(image)
            found = rough.logits_of({"beta": beta, "lam": lam})
            assert abs(scaled_nll(found, label) - scaled_nll(exact, label)) < 0.2


def test_kernels_with_a_table_are_left_out_where_rows_are_many(monkeypatch):
    text, image, support = table(K, LABEL)
    head = fitted(TAKL, text, support)
    grids = lambda: head.candidates(unit(image), torch.arange(6) % K).grid["beta"]  # noqa: E731
    assert grids() == (0.0, 1.0)
    monkeypatch.setattr(module, "KERNEL_ROWS", N + K)
    assert grids() == (0.0, 1.0)
    monkeypatch.setattr(module, "KERNEL_ROWS", N + K - 1)
    assert grids() == (0.0,)
    # the search over every other class asks about the whole
    monkeypatch.setattr(_support, "SEARCH_ROWS", N - 1)
    seen: list[Any] = []
    monkeypatch.setattr(module, "basis", lambda rows, beta, do=module.basis: (
        seen.append((len(rows), beta)), do(rows, beta))[1])  # fmt: skip
    head = fitted(TAKL, text, support)
    head.choose(Support(image, torch.arange(6) % K))
    assert head.beta == 0
    assert {beta for _, beta in seen} == {0.0}


def test_float32_solves_in_float64():
    text, image, support = table(K, LABEL)
    support = Support(unit(support.image).float(), LABEL)
    narrow = fitted(TAKL, text.float(), support, lam=1e-3, logit_scale=SCALE)
    exact = Support(support.image.double(), LABEL)
    wide = fitted(TAKL, text.float().double(), exact, lam=1e-3, logit_scale=SCALE)
    assert narrow.coefficients.dtype == torch.float32
    size = float(wide.coefficients.abs().max())
    assert float((narrow.coefficients - wide.coefficients).abs().max()) / size < 1e-5


@kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_solved_like_others(beta, dtype):
    text, image, support = (x.to(dtype) if isinstance(x, Tensor) else x for x in table(K, LABEL))
    head = fitted(TAKL, text, support, beta=beta, lam=0.1, logit_scale=SCALE)
    head.choose(Support(image, torch.arange(6) % K))
    head.take({"beta": beta, "lam": 0.1})
    keys = Support(head.keys.double(), LABEL)
    wide = fitted(TAKL, text.double(), keys, beta=beta, lam=0.1, logit_scale=SCALE)
    assert head(image).dtype == head.coefficients.dtype == dtype
    torch.testing.assert_close(
        head(image).double(), wide(image.double()), rtol=0, atol=60 * torch.finfo(dtype).eps
    )


def test_copies_share_solutions_and_files_have_none():
    text, image, support = table(K, LABEL)
    head = fitted(TAKL, text, support, logit_scale=SCALE)
    other = copy.deepcopy(head)
    assert other._fits is head._fits
    other.fit_support(Support(support.image[:4], LABEL[:4]))  # and no longer
    assert other._fits is not head._fits
    loaded = pickle.loads(pickle.dumps(head))
    assert not loaded._fits
    loaded.take({"beta": 1.0, "lam": 0.1})  # from its own keys
    head.take({"beta": 1.0, "lam": 0.1})
    assert torch.equal(loaded(image), head(image))
    head.choose(Support(image, torch.arange(6) % K))
    assert not head._fits


class Largest(TorchFunctionMode):
    """Elements of the largest tensor that any function of torch returned."""

    elements = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in made if isinstance(made, tuple) else (made,):
            if isinstance(one, Tensor):
                self.elements = max(self.elements, one.numel())
        return made


def test_memory_grows_with_rows_times_classes(monkeypatch):
    """An eighth of 16 shots of 1,000 classes: no table has [N + K, N + K] or [K, N, ...]."""
    classes, shots, width = 125, 16, 64
    label = torch.arange(classes).repeat_interleave(shots)
    text = torch.randn(classes, width)
    support = Support(text[label] + torch.randn(len(label), width), label)
    monkeypatch.setattr(module, "KERNEL_ROWS", len(label))
    with Largest() as seen:
        head = fitted(TAKL, text, support)
        head.choose(Support(support.image[::4], label[::4]))
    assert head.beta == 0
    assert seen.elements == (len(label) + classes) * classes


def test_steps_are_few_where_each_is_long(monkeypatch):
    """The time is bounded: products with R [M, r] and a W [r, K] come to WORK or LEAST_STEPS."""
    text, _, support = table(K, LABEL)
    asked: list[int] = []

    def minimise(problem: Problem, start: Tensor, lam: float, **how: Any) -> Tensor:
        asked.append(how["max_steps"])
        return start

    monkeypatch.setattr(_logistic, "minimise", minimise)
    for work, wanted in ((module.WORK, 199), (0.0, module.LEAST_STEPS)):
        monkeypatch.setattr(module, "WORK", work)
        fitted(TAKL, text, support, lam=0.1)
        assert asked == [module.ROUGH_STEPS, module.ROUGH_STEPS, wanted]
        asked.clear()


def noisy(classes: int = 30, shots: int = 12, width: int = 48) -> tuple[Tensor, Support, Support]:
    """Texts, support and other images, of which a fit names most and not all."""
    torch.manual_seed(2)
    text, centre = unit(torch.randn(2, classes, width)).unbind()
    label = torch.arange(classes).repeat_interleave(shots + 8)
    image = 0.25 * text[label] + 0.5 * centre[label] + unit(torch.randn(len(label), width))
    order = torch.arange(len(label)) % (shots + 8)
    train, test = order < shots, order >= shots
    return text, Support(image[train], label[train]), Support(image[test], label[test])


@pytest.mark.parametrize("lam", [1e-1, 1e-2, 1e-4, 3e-6])
def test_many_rows_come_near_the_optimum(lam, monkeypatch):
    text, support, test = noisy()
    exact = fitted(TAKL, text, support, lam=lam)
    monkeypatch.setattr(module, "KERNEL_ROWS", len(support.label))
    seen = []
    monkeypatch.setattr(_logistic, "minimise", lambda problem, *of, **how: (
        seen.append(problem.basis.dtype), minimise(problem, *of, **how))[1])  # fmt: skip
    near, again = (fitted(TAKL, text, support, lam=lam) for _ in range(2))
    assert set(seen) == {torch.float32}
    assert torch.equal(near.coefficients, again.coefficients)
    wanted, found = (head(unit(test.image)) for head in (exact, near))
    error = (found - wanted - (found - wanted).mean(dim=1, keepdim=True)).square().mean().sqrt()
    assert float(error) < 0.05 * float((wanted - ZeroShot(text)(unit(test.image)) / 2).std())
    right = [float((x.argmax(dim=1) == test.label).double().mean()) for x in (wanted, found)]
    assert 0.4 < right[0] < 0.95
    assert abs(right[0] - right[1]) < 0.01


def test_many_rows_that_do_not_converge_say_so(monkeypatch, caplog):
    text, support, _ = noisy()
    monkeypatch.setattr(module, "KERNEL_ROWS", len(support.label))
    monkeypatch.setattr(module, "MANY_EXCESS", -1.0)
    monkeypatch.setattr(module, "MANY_ROUNDS", 2)
    fitted(TAKL, text, support)
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith("takl: lam 0.01: 16 steps end ")
    assert said.endswith(" images and classes, wanted -100.0 %")


def test_excess_is_what_is_left_to_win():
    some = problem(M=30, r=20, classes=6)
    best = minimise(some, torch.zeros(20, 6).double(), 0.1, closeness=1e-9, max_steps=2000)
    least = float(objective(some, best, 0.1))
    assert _logistic.excess(some, best, 0.1) < 1e-12
    for far in (0.003, 0.03):
        W = best + far * torch.randn(20, 6).double()
        above = float(objective(some, W, 0.1)) / least - 1
        assert above / 10 < _logistic.excess(some, W, 0.1) < 10 * above
