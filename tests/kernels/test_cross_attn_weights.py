# SPDX-License-Identifier: Apache-2.0
"""cross_attn_weights_fwd and cross_attn_weights_bwd against the formula in float64."""

import math

import pytest
import torch
from kernel_checks import assert_close, assert_same, drawing, strided

NAMES = ("weights", "d_query", "d_key")


def expected(query, key, key_mask, scale, grad_weights):
    query, key = (t.detach().cpu().double().requires_grad_() for t in (query, key))
    scores = scale * query @ key.transpose(-1, -2)
    if key_mask is not None:
        hidden = ~key_mask.cpu()[:, None, None, :]
        # a row without a column: any finite score, then weight 0
        weights = scores.masked_fill(hidden, -1e300).softmax(-1).masked_fill(hidden, 0.0)
    else:
        weights = scores.softmax(-1)
    grads = torch.autograd.grad(weights, (query, key), grad_weights.cpu().double())
    return dict(zip(NAMES, (weights.detach(), *grads), strict=True))


def run(query, key, key_mask, scale, grad_weights):
    from vtclip.kernels import cross_attn_weights as op

    weights = op.cross_attn_weights_fwd(query, key, key_mask, scale)
    grads = op.cross_attn_weights_bwd(grad_weights, weights, query, key, scale)
    return dict(zip(NAMES, (weights, *grads), strict=True))


def problem(B, H, K, L, d, *, shared=True, dtype=torch.float32, device="cpu"):
    draw = drawing(device, dtype)
    return draw(1 if shared else B, H, K, d), draw(B, H, L, d), draw(B, H, K, L)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per_image"])
@pytest.mark.parametrize(
    ("B", "H", "K", "L", "d"),
    [(2, 2, 4, 8, 16), (3, 2, 17, 49, 20), (5, 1, 40, 130, 8), (1, 1, 1, 1, 1)],
    ids=str,
)
def test_shapes(B, H, K, L, d, shared, device):
    query, key, grad = problem(B, H, K, L, d, shared=shared, device=device)
    assert_close(run(query, key, None, 0.3, grad), expected(query, key, None, 0.3, grad))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype, device):
    query, key, grad = problem(3, 2, 17, 70, 20, dtype=dtype, device=device)
    # weights and dS are rounded to 16 bits before they are used
    assert_close(run(query, key, None, 0.3, grad), expected(query, key, None, 0.3, grad), steps=4)


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per_image"])
@pytest.mark.parametrize("axis", ["B", "H", "K", "L", "d", "BHKLd"])
def test_empty(axis, shared, device):
    sizes = {"B": 2, "H": 2, "K": 3, "L": 4, "d": 5} | dict.fromkeys(axis, 0)
    query, key, grad = problem(**sizes, shared=shared, device=device)
    assert_close(run(query, key, None, 0.5, grad), expected(query, key, None, 0.5, grad))


@pytest.mark.parametrize("L", [12, 70])
def test_masked_columns_do_not_exist(L, device):
    query, key, grad = problem(3, 2, 5, L, 6, device=device)
    key_mask = torch.rand(3, L, generator=torch.Generator().manual_seed(1)) < 0.5
    key_mask[0, 0] = key_mask[2, 0] = True
    key_mask[1] = False
    key_mask = key_mask.to(device)
    clean = run(query, key, key_mask, 0.4, grad)
    assert_close(clean, expected(query, key, key_mask, 0.4, grad))
    for bad in (math.nan, math.inf):
        dirty_key = key.masked_fill(~key_mask[:, None, :, None], bad)
        dirty_grad = grad.masked_fill(~key_mask[:, None, None, :], bad)
        actual = run(query, dirty_key, key_mask, 0.4, dirty_grad)
        assert_same(actual, clean)


def test_one_mask_for_all_images(device):
    query, key, grad = problem(3, 2, 5, 12, 6, device=device)
    key_mask = torch.arange(12, device=device)[None] % 3 != 0
    assert_close(run(query, key, key_mask, 0.4, grad), expected(query, key, key_mask, 0.4, grad))


def test_strides(device):
    query, key, grad = problem(2, 2, 5, 9, 6, device=device)

    plain = run(query, key, None, 0.4, grad)
    odd = run(strided(query), strided(key), None, 0.4, strided(grad))
    assert_same(odd, plain)
    ones = torch.ones((), device=device).expand(2, 2, 5, 9)
    wide_key = key[:, :, :1].expand(2, 2, 9, 6)
    assert_close(run(query, wide_key, None, 0.4, ones), expected(query, wide_key, None, 0.4, ones))
