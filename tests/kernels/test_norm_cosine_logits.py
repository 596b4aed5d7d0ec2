# SPDX-License-Identifier: Apache-2.0
"""norm_cosine_logits_fwd and norm_cosine_logits_bwd against the formula in float64."""

import math

import pytest
import torch
from kernel_checks import assert_close, assert_same, drawing, rnorm, unit
from torch.nn.functional import layer_norm

from vtclip import testing

STATS = ("mean", "rstd", "image_rnorm", "row_rnorm")
GRADS = ("d_hidden", "d_weight", "d_bias", "d_text", "d_image")


def expected(tensors, residual, scale, eps, grad_logits):
    leaves = [t.detach().cpu().double().requires_grad_() for t in tensors]
    hidden, weight, bias, text, image = leaves
    y = text + residual * layer_norm(hidden, hidden.shape[-1:], weight, bias, eps)
    logits = scale * (unit(y) * unit(image)[:, None]).sum(-1)
    grads = torch.autograd.grad(logits, leaves, grad_logits.cpu().double())
    h = hidden.detach()
    mean = h.mean(-1)
    rstd = ((h - mean[..., None]).square().mean(-1) + eps).rsqrt()
    stats = (mean, rstd, rnorm(image.detach()), rnorm(y.detach()))
    return dict(zip(("logits", *STATS, *GRADS), (logits.detach(), *stats, *grads), strict=True))


def run(tensors, residual, scale, eps, grad_logits):
    from vtclip.kernels import norm_cosine_logits as op

    logits, *stats = op.norm_cosine_logits_fwd(*tensors, residual, scale, eps)
    grads = op.norm_cosine_logits_bwd(
        grad_logits, *tensors, logits, *stats, residual, scale, eps
    )  # fmt: skip
    return dict(zip(("logits", *STATS, *GRADS), (logits, *stats, *grads), strict=True))


def assert_near(actual, wanted, scale, *, steps=64):
    """Logits by `scale`; 64 covers trees of up to 600 terms and 20 roundings of each."""
    assert_close(actual, wanted, steps=steps, least=1e-3, sizes={"logits": abs(scale)})


def check(tensors, residual, scale, *rest, steps=64):
    arguments = tensors, residual, scale, *rest
    assert_near(run(*arguments), expected(*arguments), scale, steps=steps)


def problem(B, K, C, *, dtype=torch.float32, device="cpu"):
    draw = drawing(device, dtype)
    tensors = (draw(B, K, C) + 0.5, draw(C), draw(C), draw(K, C), draw(B, C))
    return tensors, draw(B, K)


@pytest.mark.parametrize(
    ("B", "K", "C"),
    [(2, 3, 8), (3, 17, 20), (9, 5, 130), (2, 600, 16), (1, 1, 2), (2, 3, 1030)],
    ids=str,
)
def test_shapes(B, K, C, device):
    tensors, grad = problem(B, K, C, device=device)
    # rows of two entries normalise to almost +-1, so gradients are what is left of a cancellation
    check(tensors, 0.7, 10.0, 1e-5, grad, steps=64 if C > 2 else 4096)


def test_width_one_has_constant_norm(device):
    tensors, grad = problem(2, 3, 1, device=device)
    actual = run(tensors, 0.7, 2.0, 1e-5, grad)
    y = tensors[3] + 0.7 * tensors[2]  # LayerNorm of one entry is its bias
    wanted = 2.0 * (y[:, 0].sign() * tensors[4].sign())
    assert torch.allclose(actual["logits"], wanted, rtol=1e-6)
    for name in GRADS:
        # differences of equal terms of size scale / |y|, which is below 100 here
        assert actual[name].abs().max() <= 1e-4, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype, device):
    tensors, grad = problem(3, 17, 70, dtype=dtype, device=device)
    actual = run(tensors, 1.0, 3.0, 1e-5, grad)
    wanted = expected(tensors, 1.0, 3.0, 1e-5, grad)
    # all arithmetic is float32: one rounding of the result, statistics not even that
    for name in STATS:
        assert actual[name].dtype == torch.float32, name
    assert_near(actual, wanted, 3.0, steps=16)
    results = {name: wanted[name] for name in ("logits", *GRADS)}
    for name in results:
        assert actual[name].dtype == dtype, name
    assert_near(actual, results, 3.0, steps=1)


@pytest.mark.parametrize("axis", ["B", "K", "BK"])
def test_empty(axis, device):
    sizes = {"B": 2, "K": 3, "C": 4} | dict.fromkeys(axis, 0)
    tensors, grad = problem(**sizes, device=device)
    check(tensors, 1.0, 2.0, 1e-5, grad)


def test_empty_width(device):
    tensors, grad = problem(2, 3, 0, device=device)
    actual = run(tensors, 1.0, 2.0, 1e-5, grad)
    assert (actual["logits"] == 0).all()
    assert actual["d_hidden"].shape == (2, 3, 0)


def test_zero_rows(device):
    tensors, grad = problem(3, 4, 12, device=device)
    _, weight, bias, text, image = tensors
    image[1] = 0
    text[2] = 0
    weight.zero_()
    bias.zero_()
    actual = run(tensors, 1.0, 2.0, 1e-5, grad)
    assert_near(actual, expected(tensors, 1.0, 2.0, 1e-5, grad), 2.0)
    assert (actual["logits"][1] == 0).all()
    assert (actual["logits"][:, 2] == 0).all()
    assert (actual["d_text"][2] == 0).all()


@pytest.mark.parametrize(("residual", "scale"), [(0.0, 1.0), (1.0, 0.0), (-2.0, -100.0)])
def test_factors(residual, scale, device):
    tensors, grad = problem(2, 5, 24, device=device)
    check(tensors, residual, scale, 1e-3, grad)


def test_large_mean_is_not_cancelled(device):
    tensors, grad = problem(2, 5, 64, device=device)
    hidden = (tensors[0] + 1000.0).round(decimals=2)
    tensors = (hidden, *tensors[1:])
    # the mean itself is rounded by eps * 1000, which moves every entry of the row alike
    check(tensors, 1.0, 1.0, 1e-5, grad, steps=64 * 16)


@pytest.mark.parametrize("magnitude", [1e30, 1e-30])
def test_extreme_images(magnitude, device):
    tensors, grad = problem(2, 5, 24, device=device)
    tensors = (*tensors[:4], tensors[4] * magnitude)
    wanted = expected(tensors, 1.0, 1.0, 1e-5, grad)
    actual = run(tensors, 1.0, 1.0, 1e-5, grad)
    for values in (actual, wanted):
        values["d_image"] = values["d_image"] * magnitude
        values["image_rnorm"] = values["image_rnorm"] * magnitude
    assert_near(actual, wanted, 1.0)


def test_nan_stays_in_its_row(device):
    tensors, grad = problem(3, 5, 24, device=device)
    tensors[0][1, 2, 3] = math.nan
    logits = run(tensors, 1.0, 1.0, 1e-5, grad)["logits"]
    assert logits.isnan().nonzero().tolist() == [[1, 2]]


def test_strides(device):
    tensors, grad = problem(3, 5, 12, device=device)
    plain = run(tensors, 1.0, 2.0, 1e-5, grad)
    odd = run(tuple(testing.spread(t) for t in tensors), 1.0, 2.0, 1e-5, testing.spread(grad))
    assert_same(odd, plain)
    hidden, weight, bias, text, image = tensors
    shared = (
        hidden[:1].expand(3, 5, 12), weight[:1].expand(12), bias[:1].expand(12),
        text[:1].expand(5, 12), image[:1].expand(3, 12),
    )  # fmt: skip
    ones = torch.ones((), device=device).expand(3, 5)
    check(shared, 1.0, 2.0, 1e-5, ones)
