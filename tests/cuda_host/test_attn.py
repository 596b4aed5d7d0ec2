# SPDX-License-Identifier: Apache-2.0
"""The block code of the CUDA cross_attn and cross_attn_weights kernels on the host."""

from __future__ import annotations

import pytest
import torch
from block_results import compare

from vtclip import ops, testing
from vtclip.reference._dtypes import acc_dtype

# B, H, K, L, d, images of one block; a block has 64 rows and steps of 16 to 64
CASES = {
    "ordinary": (2, 2, 10, 49, 32, 1),
    "tiles": (1, 1, 66, 70, 64, 1),
    "odd": (3, 2, 7, 17, 5, 2),
    "chunked head": (2, 1, 17, 33, 72, 2),
    "wide": (1, 1, 5, 34, 256, 1),
    "odd wide": (2, 1, 3, 18, 201, 1),
    "one": (1, 1, 1, 1, 1, 1),
    "no image": (0, 1, 3, 4, 8, 1),
    "no class": (2, 1, 0, 4, 8, 1),
    "no token": (2, 1, 3, 0, 8, 1),
    "no width": (2, 1, 3, 4, 0, 1),
}


@pytest.fixture(scope="module")
def attn(build):
    return build("cross_attn")


@pytest.fixture(scope="module")
def weights(build):
    return build("cross_attn_weights")


def drawn(case, dtype, shared, count):
    B, H, K, L, d, _ = CASES[case]
    query = torch.randn(1 if shared else B, H, K, d)
    return [t.to(dtype) for t in (query, *torch.randn(count, B, H, L, d))]


def masked(case):
    """Half of the columns, and none at all for the first image."""
    B, L = CASES[case][0], CASES[case][3]
    mask = torch.rand(B, L) < 0.5
    mask[:1] = False
    return mask


def check_attn(program, inputs, key_mask, images=1, with_lse=True, given=None):
    """`given` is what the program gets where the reference gets `inputs`."""
    query, key, value = inputs
    B, H, _, d = key.shape
    d_out = torch.randn(B, H, query.shape[2], d).to(query.dtype)
    d_lse = torch.randn(B, H, query.shape[2]).to(acc_dtype(query.dtype)) if with_lse else None
    fed = (*(given or inputs), key_mask, d_out, d_lse)
    out, lse, *grads = program(fed, (images,), (0.3,))
    d_p = d_out.double().abs() @ value.double().abs().transpose(-1, -2)
    extra = 0.0 if d_lse is None else d_lse.double().abs()[..., None]
    floor = cancelling(query.dtype, (query, key), key_mask, d_p, extra)
    hold_attn((out, lse, *grads), inputs, (d_out, d_lse), floor, key_mask=key_mask)


def hold_attn(results, inputs, seeds, floor, **fixed):
    out, lse, *grads = results
    d_query, d_key, d_value = (grad.transpose(1, 2) for grad in grads)
    named = {"d_query": d_query, "d_key": d_key, "d_value": d_value}
    floors = dict.fromkeys(named, floor)
    named = {"out": out.transpose(1, 2), "lse": lse} | named
    compare(named, ops.cross_attn_lse, inputs, seeds, floors, scale=0.3, **fixed)


def check_weights(program, inputs, key_mask, images=1, given=None):
    query, key = inputs
    B, H, L, _ = key.shape
    d_weights = torch.randn(B, H, query.shape[2], L).to(query.dtype)
    result, *grads = program((*(given or inputs), key_mask, d_weights), (images,), (0.3,))
    d_query, d_key = (grad.transpose(1, 2) for grad in grads)
    floor = cancelling(query.dtype, (query, key), key_mask, d_weights.double().abs())
    compare(
        {"weights": result, "d_query": d_query, "d_key": d_key},
        ops.cross_attn_weights,
        inputs,
        (d_weights,),
        dict.fromkeys(("d_query", "d_key"), floor),
        key_mask=key_mask,
        scale=0.3,
    )


def cancelling(dtype, inputs, key_mask, d_weights, extra=0.0):
    """One rounding step of the largest sum of |terms| in d_query and d_key, dS = P * (dP - delta).

    Where the softmax saturates dP and delta cancel: a softmax that keeps its row reaches exactly 0
    there, a kernel that recomputes it reaches a rounding step of the terms.
    """
    query, key = (t.double() for t in inputs)
    if 0 in (*query.shape, *key.shape):
        return 0.0
    p = ops.cross_attn_weights(query, key, key_mask=key_mask, scale=0.3, impl="reference")
    terms = p * (d_weights + extra)
    terms = (terms + p * terms.sum(-1, keepdim=True)) * 0.3
    d_query = terms @ key.abs()
    d_query = d_query.sum(0) if query.shape[0] == 1 else d_query
    d_key = terms.transpose(-1, -2) @ query.abs()
    return float(torch.finfo(dtype).eps) * float(torch.maximum(d_query.max(), d_key.max()))


@pytest.mark.parametrize("mask", [False, True], ids=["", "mask"])
@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
@pytest.mark.parametrize("case", CASES)
class TestAgainstTheReference:
    def test_cross_attn(self, attn, case, shared, mask, dtype):
        inputs = drawn(case, dtype, shared, 2)
        key_mask = masked(case) if mask else None
        check_attn(attn, inputs, key_mask, CASES[case][-1], with_lse=shared)

    def test_weights(self, weights, case, shared, mask, dtype):
        inputs = drawn(case, dtype, shared, 1)
        check_weights(weights, inputs, masked(case) if mask else None, CASES[case][-1])


@pytest.mark.parametrize("case", ["ordinary", "tiles", "odd"])
def test_an_equal_gradient_of_all_weights_moves_nothing(weights, case, dtype):
    """A row of P sums to 1, that of the stored P only nearly: the rest must not show."""
    query, key = drawn(case, dtype, False, 1)
    B, H, L, _ = key.shape
    d_weights = torch.full((B, H, query.shape[2], L), 3.0, dtype=dtype)
    _, *grads = weights((query, key, None, d_weights), (CASES[case][-1],), (0.3,))
    rounding = torch.finfo(acc_dtype(dtype)).eps * 3 * 0.3 * L
    assert float(grads[0].double().abs().max()) <= 4 * rounding * float(key.abs().max())
    rows = query.shape[2]
    assert float(grads[1].double().abs().max()) <= 4 * rounding * rows * float(query.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_any_strides(attn, weights, dtype):
    query, key, value = (testing.spread(t) for t in drawn("odd", dtype, False, 2))
    check_attn(attn, (query, key, value), testing.spread(masked("odd"), gap=1.0))
    check_weights(weights, (query, key), None)
    joined = torch.randn(3, 2, 17, 24).to(dtype).transpose(-1, -2)[..., :16, :].transpose(-1, -2)
    expanded = joined[:1].expand(joined.shape)
    check_attn(attn, (joined, expanded, testing.misaligned(joined)), masked("odd")[:1])
    check_weights(weights, (joined, expanded), masked("odd")[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_a_masked_column_holds_is_harmless(attn, weights, dtype):
    query, key, value = drawn("odd", dtype, True, 2)
    key_mask = masked("odd")
    hidden = ~key_mask[:, None, :, None]
    poisoned = [t.masked_fill(hidden, float("nan")) for t in (key, value)]
    check_attn(attn, (query, key, value), key_mask, given=(query, *poisoned))
    check_weights(weights, (query, key), key_mask, given=(query, poisoned[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_large_scores_neither_overflow_nor_lose_the_sum(attn, dtype):
    query, key, value = drawn("ordinary", dtype, True, 2)
    inputs = (40 * query, 40 * key, value)
    d_out = torch.randn(2, 2, 10, 32).to(dtype)
    results = attn((*inputs, None, d_out, None), (1,), (0.3,))
    d_p = d_out.double().abs() @ value.double().abs().transpose(-1, -2)
    # P recomputed from S - lse errs by a rounding step of S, whatever P is
    score = 0.3 * float((inputs[0].double() @ inputs[1].double().transpose(-1, -2)).abs().amax())
    floor = score * cancelling(dtype, inputs[:2], None, d_p, 0.0)
    hold_attn(results, inputs, (d_out, None), floor)


def test_chunks_of_images_sum_to_the_same(attn):
    query, key, value = drawn("odd", torch.float64, True, 2)
    d_out = torch.randn(3, 2, 7, 5).double()
    fed = (query, key, value, None, d_out, None)
    one, two, three = (attn(fed, (images,), (0.3,))[2] for images in (1, 2, 3))
    assert torch.allclose(one, two, rtol=1e-13, atol=1e-13)
    assert torch.allclose(one, three, rtol=1e-13, atol=1e-13)
