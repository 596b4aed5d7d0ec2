# SPDX-License-Identifier: Apache-2.0
"""sum_norm: LayerNorm of a sum with rows that all images share, and what the head makes of it."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vtclip.heads import _feed_forward
from vtclip.kernels.sum_norm import sum_norm_bwd, sum_norm_fwd

EPS = 1e-5
SIZES = [(1, 1, 1), (3, 5, 37), (2, 70, 64), (9, 3, 130), (0, 5, 8), (2, 0, 8)]


def inputs(device, B, K, C, dtype):
    torch.manual_seed(0)
    shapes = (B, K, C), (K, C), (C,), (C,), (C,)
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]


def exact(product, start, weight, bias, shift):
    """Out and shifted [B K, C] in float64."""
    u = product + start
    centred = u - u.mean(-1, keepdim=True)
    out = centred / (centred.square().mean(-1, keepdim=True) + EPS).sqrt() * weight + bias
    out = out.flatten(0, 1)
    return out, out + shift


def close(found, wanted, dtype, steps=4):
    """Within some roundings of the largest entry."""
    assert found.dtype == dtype
    bound = (
        steps
        * torch.finfo(dtype).eps
        * max(1.0, wanted.abs().max().item() if wanted.numel() else 0)
    )
    assert found.shape == wanted.shape
    assert ((found.double() - wanted).abs() <= bound).all()


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_formula_and_its_gradients(device, sizes, dtype):
    drawn = inputs(device, *sizes, dtype)
    wide = [x.double().requires_grad_() for x in drawn]
    wanted = exact(*wide)
    grads = [torch.randn(x.shape, device=device).to(dtype) for x in wanted]
    # C = 1 has no deviation: out is the bias, and its gradient a difference of equal numbers
    wanted_grads = torch.autograd.grad(wanted, wide, [g.double() for g in grads])

    out, shifted, mean, rstd = sum_norm_fwd(*drawn, EPS)
    close(out, wanted[0], dtype)
    close(shifted, wanted[1], dtype)
    alone = sum_norm_fwd(*drawn[:4], None, EPS)
    assert torch.equal(alone[0], out)
    assert alone[1].numel() == 0
    product, start, weight, *_ = drawn
    d_product, d_start, d_vectors = sum_norm_bwd(
        *(g.view_as(product) for g in grads), product, start, weight, mean, rstd
    )
    for found, expected in zip((d_product, d_start, *d_vectors), wanted_grads, strict=True):
        close(found, expected, dtype, steps=8 if sizes[2] > 1 else 2**12)
    again = sum_norm_bwd(*(g.view_as(product) for g in grads), product, start, weight, mean, rstd)
    assert all(map(torch.equal, again, (d_product, d_start, d_vectors)))


def test_strides_and_numbers_far_from_zero(device):
    product, start, *vectors = inputs(device, 3, 20, 48, torch.float32)
    product += 100.0  # the deviation is of centred numbers
    apart = product.transpose(0, 2).contiguous().transpose(0, 2)
    strided = [x.repeat_interleave(2)[::2] for x in vectors]
    found = sum_norm_fwd(apart, start.t().contiguous().t(), *strided, EPS)
    assert all(map(torch.equal, found, sum_norm_fwd(product, start, *vectors, EPS)))
    wanted = exact(*(x.double() for x in (product, start, *vectors)))
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=0, atol=2e-4)


def test_a_row_that_is_not_a_number_leaves_the_others_alone(device):
    product, start, *vectors = inputs(device, 2, 5, 20, torch.float32)
    wanted = sum_norm_fwd(product, start, *vectors, EPS)[0]
    product[1, 2, 3] = float("nan")
    found = sum_norm_fwd(product, start, *vectors, EPS)[0]
    rows = torch.arange(10, device=device) != 7
    assert found[7].isnan().all()
    assert torch.equal(found[rows], wanted[rows])


@pytest.fixture
def leaves(device):
    importlib.import_module("vtclip.ops")
    drawn = inputs(device, 3, 6, 24, torch.float32)
    drawn[1] = drawn[1][None]
    return [x.requires_grad_() for x in drawn]


def norm_of(weight, bias):
    norm = nn.LayerNorm(weight.numel(), eps=EPS, device=weight.device)
    norm.weight, norm.bias = (nn.Parameter(x.detach().clone()) for x in (weight, bias))
    return norm


def plain(product, start, norm, shift):
    x = F.layer_norm(product + start, norm.normalized_shape, norm.weight, norm.bias, EPS)
    return x.flatten(0, 1), x.flatten(0, 1) + shift


def tail(function, leaves, norm):
    """Both results used, the second one overwritten, and which gradients are asked for."""
    product, start, _, _, shift = leaves
    x, shifted = function(product, start, norm, shift)
    shifted.addmm_(x.relu(), torch.eye(24, device=x.device))
    return shifted.sin().sum(), [product, start, norm.weight, norm.bias, shift]


def test_the_head_s_function_is_differentiated_once_and_twice(leaves):
    norm = norm_of(*leaves[2:4])
    value, asked = tail(_feed_forward.norm_of_sum, leaves, norm)
    wanted, _ = tail(plain, leaves, norm)
    torch.testing.assert_close(value, wanted)
    once = torch.autograd.grad(wanted, asked, create_graph=True)
    kernels = torch.autograd.grad(value, asked, retain_graph=True)
    graph = torch.autograd.grad(value, asked, create_graph=True)
    twice = torch.autograd.grad(sum(g.square().sum() for g in once), asked)
    ours = torch.autograd.grad(sum(g.square().sum() for g in graph), asked)
    for found, expected in ((kernels, once), (graph, once), (ours, twice)):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_gradients_that_nobody_asks_for(leaves):
    product, start, weight, bias, shift = leaves
    norm = norm_of(weight, bias)
    norm.requires_grad_(False)
    for at in (0, 1):  # one of the results alone
        result = _feed_forward.norm_of_sum(product.detach(), start, norm, shift)[at]
        wanted = plain(product.detach(), start, norm, shift)[at]
        (found,) = torch.autograd.grad(result.sin().sum(), [start])
        (expected,) = torch.autograd.grad(wanted.sin().sum(), [start])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        alone = _feed_forward.norm_of_sum_alone(product, start, norm, norm.bias + shift)
    torch.testing.assert_close(alone, plain(product, start, norm, shift)[1])


def test_where_torch_s_own_norm_stays(monkeypatch):
    start, weight = torch.empty(1, 3, 8, device="meta"), torch.empty(8, device="meta")
    monkeypatch.setattr(_feed_forward, "on_gpu", lambda x, weight: x.dtype == weight.dtype)
    monkeypatch.setattr(_feed_forward, "by_triton", lambda x: True)
    assert _feed_forward.norms_sums(start, weight)
    assert not _feed_forward.norms_sums(start.expand(2, 3, 8), weight)
    assert not _feed_forward.norms_sums(start.half(), weight)
    monkeypatch.setattr(_feed_forward, "by_triton", lambda x: False)
    assert not _feed_forward.norms_sums(start, weight)
