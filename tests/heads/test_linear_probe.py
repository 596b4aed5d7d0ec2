# SPDX-License-Identifier: Apache-2.0
"""LinearProbe: the minimum of its objective, found by another method; its search; its edges."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vtclip.heads import LinearProbe, Support
from vtclip.heads.linear_probe import STRENGTHS, logistic_regression


def shots(each: int, K: int = 4, C: int = 12, noise: float = 1.0, seed: int = 0) -> Support:
    """Images around class centres that are the same for every seed."""
    centre = 2 * torch.randn(K, C, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(K).repeat_interleave(each)
    image = 3 + centre[label] + noise * torch.randn(K * each, C, generator=generator)
    return Support(F.normalize(image, dim=-1), label)


def objective(flat: Tensor, x: Tensor, label: Tensor, K: int, l2: float) -> Tensor:
    weight, bias = flat[: K * x.shape[1]].view(K, -1), flat[K * x.shape[1] :]
    log_p = torch.log_softmax(x @ weight.T + bias, dim=1)
    return -log_p[torch.arange(len(x)), label].sum() + l2 / 2 * (weight**2).sum()


def newton(support: Support, K: int, l2: float) -> tuple[Tensor, Tensor]:
    """W and b by damped Newton steps with the full Hessian."""
    x = support.image.double()
    flat = torch.zeros(K * x.shape[1] + K, dtype=torch.float64)

    def f(at: Tensor) -> Tensor:
        return objective(at, x, support.label, K, l2)

    for _ in range(200):
        gradient = torch.func.grad(f)(flat)
        # adding a number to every bias changes nothing: a small ridge keeps that direction still
        hessian = torch.func.hessian(f)(flat) + 1e-10 * torch.eye(len(flat), dtype=torch.float64)
        step = torch.linalg.solve(hessian, gradient)
        size = 1.0
        while f(flat - size * step) > f(flat) and size > 1e-9:
            size /= 2
        flat = flat - size * step
        if float(gradient.abs().max()) < 1e-11:
            break
    return flat[: K * x.shape[1]].view(K, -1), flat[K * x.shape[1] :]


@pytest.mark.parametrize("l2", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("each", [1, 2, 20])
def test_is_the_minimum(each, l2):
    """each = 1, 2: fewer images than width, solved within their span."""
    support = shots(each)
    head = LinearProbe(torch.randn(4, 12, dtype=torch.float64), l2=l2)
    head.fit_support(support)
    weight, bias = newton(support, 4, l2)
    x = torch.randn(30, 12, dtype=torch.float64)
    want = F.linear(F.normalize(x, dim=-1), weight, bias)
    # logits mean what their differences are
    got = head(5 * x)
    got, want = (y - y.mean(dim=1, keepdim=True) for y in (got.detach(), want))
    # the search ends at a gradient of 1e-8: with a weak penalty the flattest direction of the
    # bowl then still lies off by about 1e-8 N / l2
    torch.testing.assert_close(got, want, rtol=0, atol=1e-3 * float(want.abs().max()))
    flat = torch.cat([head.weight.detach().flatten(), head.bias.detach()])
    x = support.image.double()
    best = objective(torch.cat([weight.flatten(), bias]), x, support.label, 4, l2)
    reached = objective(flat, x, support.label, 4, l2)
    assert float(reached - best) <= 1e-7 * len(x)


def test_texts_take_no_part(record):
    support = shots(3)
    heads = [LinearProbe(torch.randn(4, 12), logit_scale=scale) for scale in (1.0, 100.0)]
    for head in heads:
        head.fit_support(support)
    image = torch.randn(5, 12)
    assert torch.equal(heads[0](image), heads[1](image))


def test_is_undecided_before_it_has_seen_anything(record):
    text, image, _ = record()
    logits = LinearProbe(text)(image)
    assert torch.equal(logits, torch.zeros_like(logits))


@pytest.mark.parametrize("noise", [0.3, 4.0])
def test_validation_images_choose_the_strength(noise):
    support, val = shots(8, noise=noise), shots(4, noise=noise, seed=1)
    head = LinearProbe(torch.randn(4, 12, dtype=torch.float64))
    head.fit_support(support)
    before = head.weight.detach().clone()
    head.choose(val)
    assert head.l2 in STRENGTHS
    assert head.options()["l2"] == head.l2
    again = LinearProbe(torch.randn(4, 12, dtype=torch.float64), l2=head.l2)
    again.fit_support(support)
    assert not torch.equal(head.weight, before)
    x, losses = F.normalize(val.image.double(), dim=-1), {}
    for l2 in STRENGTHS:
        (fit,) = logistic_regression(support, 4, [l2])
        # the scale of the logits is judged at its best
        losses[l2] = min(
            float(F.cross_entropy(F.linear(x, *fit) * 2 ** (i / 2), val.label))
            for i in range(-3, 4)
        )
    assert losses[head.l2] <= min(losses.values()) * 1.1
    assert losses[max(STRENGTHS)] > losses[head.l2]
    torch.testing.assert_close(
        head(support.image.double()), again(support.image.double()), rtol=0.02, atol=0.02
    )


def test_much_noise_chooses_a_stronger_penalty():
    chosen = []
    for noise in (0.3, 6.0):
        head = LinearProbe(torch.randn(4, 12))
        head.fit_support(shots(8, noise=noise))
        head.choose(shots(8, noise=noise, seed=1))
        chosen.append(head.l2)
    assert chosen[1] > 10 * chosen[0]


def test_the_images_are_let_go_once_the_strength_is_chosen():
    head = LinearProbe(torch.randn(4, 12))
    with pytest.raises(ValueError, match="^LinearProbe: choose needs the images of fit_support"):
        head.choose(shots(1))
    head.fit_support(shots(2))
    assert set(head.state_dict()) == {"text", "weight", "bias"}
    head.choose(shots(1, seed=1))
    with pytest.raises(ValueError, match="^LinearProbe: choose needs the images of fit_support"):
        head.choose(shots(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_class_and_one_image_per_class(dtype):
    one = LinearProbe(torch.randn(1, 12, dtype=dtype))
    one.fit_support(shots(3, K=1))
    assert torch.equal(one(torch.randn(2, 12, dtype=dtype)), torch.zeros(2, 1, dtype=dtype))
    head = LinearProbe(torch.randn(4, 12, dtype=dtype))
    support = shots(1)
    head.fit_support(support)
    head.choose(shots(1, seed=1))
    assert head(support.image.to(dtype)).argmax(dim=1).tolist() == [0, 1, 2, 3]
    assert head.weight.dtype == dtype


def test_a_class_without_images_is_the_least_likely():
    support = shots(4)
    keep = support.label != 2
    head = LinearProbe(torch.randn(4, 12))
    head.fit_support(Support(support.image[keep], support.label[keep]))
    assert not bool((head(support.image).argmax(dim=1) == 2).any())
    assert bool(head.weight.isfinite().all())


@pytest.mark.parametrize(
    ("support", "message"),
    [
        (Support(torch.ones(0, 12), torch.zeros(0).long()), r"N >= 1, got \[0, 12\]"),
        (Support(torch.ones(2, 11), torch.zeros(2).long()), r"N >= 1, got \[2, 11\]"),
        (Support(torch.ones(2, 12), torch.tensor([0, 4])), r"lie in 0\.\.3, got 0\.\.4"),
        (Support(torch.ones(2, 12), torch.tensor([-1, 0])), r"lie in 0\.\.3, got -1\.\.0"),
    ],
)
def test_bad_support(support, message):
    head = LinearProbe(torch.randn(4, 12))
    with pytest.raises(ValueError, match=message) as caught:
        head.fit_support(support)
    assert str(caught.value).startswith("LinearProbe: support ")
    assert not bool(head.weight.any())
