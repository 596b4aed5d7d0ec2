# SPDX-License-Identifier: Apache-2.0
"""cross_attn: the reference against F.scaled_dot_product_attention, every kernel against it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vtclip import ops, testing

# name -> (Bq, B, H, K, L, d); Bq = 1 is the shared query
CASES = {
    "ordinary": (1, 3, 2, 20, 49, 32),
    "per-image-query": (2, 2, 2, 20, 49, 32),
    "odd": (1, 2, 3, 17, 51, 20),
    "two-tiles": (1, 2, 1, 33, 65, 16),
    "three-tiles": (1, 2, 1, 5, 130, 8),
    "one-of-each": (1, 1, 1, 1, 1, 1),
    "one-key": (1, 3, 2, 4, 1, 8),
    "one-query": (1, 3, 4, 1, 29, 16),
    "wide": (1, 1, 1, 3, 5, 256),
    "width-64": (1, 2, 1, 19, 50, 64),
    "width-128": (2, 2, 1, 19, 50, 128),
    "width-59": (1, 2, 1, 9, 13, 59),
    "no-images": (1, 0, 2, 3, 4, 8),
    "no-heads": (1, 2, 0, 3, 4, 8),
    "no-queries": (1, 2, 2, 0, 4, 8),
    "no-keys": (1, 2, 2, 3, 0, 8),
    "no-width": (1, 2, 2, 3, 4, 0),
}


def draw(case: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    Bq, B, H, K, L, d = CASES[case]
    shapes = {"query": (Bq, H, K, d), "key": (B, H, L, d), "value": (B, H, L, d)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def some_mask(B: int, L: int) -> Tensor:
    mask = torch.rand(B, L) > 0.4
    mask[:, 0] = True
    return mask


def cancelling(
    inputs: dict[str, Tensor], seeds: list[Tensor], fixed: dict[str, object]
) -> dict[str, float]:
    """The largest sum of |terms| in each gradient, with dS = P * (dP - Delta), and in a score.

    Where the softmax saturates, dP and Delta cancel; a softmax that keeps its row reaches exactly
    0 there, a kernel that recomputes it from the log-sum-exp reaches a rounding step of the terms.
    """
    query, key, value = inputs.values()
    scale, mask = fixed.get("scale"), fixed.get("key_mask")
    weights = ops.cross_attn_weights(query, key, key_mask=mask, scale=scale, impl="reference")
    terms = weights * (seeds[0].double().abs() @ value.abs().transpose(-1, -2))
    if len(seeds) > 1:
        terms = terms + weights * seeds[1].double().abs()[..., None]
    terms = (terms + weights * terms.sum(-1, keepdim=True)) * (scale or query.shape[-1] ** -0.5)
    d_query = (terms @ key.abs()).sum(0) if query.shape[0] == 1 else terms @ key.abs()
    d_key = terms.transpose(-1, -2) @ query.abs()
    d_value = weights.transpose(-1, -2) @ seeds[0].double().abs()
    sizes = {"query": d_query, "key": d_key, "value": d_value}
    if len(seeds) > 1:  # a log-sum-exp errs as its scores do, in which order they are summed
        size = query.abs() @ key.abs().transpose(-1, -2)
        sizes["output 1"] = size * (scale or query.shape[-1] ** -0.5)
    return {name: float(x.amax()) if x.numel() else 0.0 for name, x in sizes.items()}


def test_budget_has_room_for_scores_that_are_summed_in_order():
    """Torch sums products in blocks; of nineteen results it may be exact in all by luck."""
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 19, 128), torch.randn(1, 1, 70, 128)
    in_order = torch.zeros(1, 1, 19, 70)
    for i in range(128):
        in_order += query[..., i, None] * key[..., None, :, i]
    found = torch.logsumexp(0.3 * in_order, -1)
    exact = {"query": query.double(), "key": key.double(), "value": key.double()}
    oracle = ops.cross_attn_lse(**exact, scale=0.3, impl="reference")[1]
    seeds = [torch.zeros(1, 1, 19, 128), torch.zeros(1, 1, 19)]
    room = torch.finfo(torch.float32).eps * cancelling(exact, seeds, {"scale": 0.3})["output 1"]
    with pytest.raises(AssertionError, match="allowed"):
        testing.assert_within_budget(found, oracle, oracle.float())
    testing.assert_within_budget(found, oracle, oracle.float(), floor=room)


@pytest.mark.parametrize("case", CASES)
def test_every_dtype(case, dtype, impl, runnable, compare):
    runnable("cross_attn", dtype, CASES[case][-1])
    floor = cancelling if CASES[case][-1] else None
    compare(ops.cross_attn, draw(case, dtype), floor)


@pytest.mark.parametrize("case", CASES)
def test_lse_and_its_gradient(case, impl, runnable, compare):
    runnable("cross_attn", torch.float32, CASES[case][-1])
    if CASES[case][4] == 0:
        out, lse = ops.cross_attn_lse(*draw(case).values(), impl=impl)
        assert (out == 0).all()
        assert (lse == -torch.inf).all()
        return
    compare(ops.cross_attn_lse, draw(case), cancelling, scale=0.2)


@pytest.mark.parametrize("shared", [True, False], ids=["one-mask", "mask-per-image"])
def test_key_mask(shared, dtype, impl, runnable, compare):
    runnable("cross_attn", dtype, 32)
    mask = some_mask(1 if shared else 3, 49)
    compare(ops.cross_attn_lse, draw("ordinary", dtype), cancelling, key_mask=mask)


def test_fully_masked_image_is_zero_with_zero_gradients(impl, device, runnable):
    runnable("cross_attn", torch.float32, 32)
    tensors = {k: v.to(device).requires_grad_() for k, v in draw("ordinary").items()}
    mask = torch.ones(3, 49, dtype=torch.bool, device=device)
    mask[1] = False
    out, lse = ops.cross_attn_lse(**tensors, key_mask=mask, impl=impl)
    assert (out[1] == 0).all()
    assert (lse[1] == -torch.inf).all()
    grads = torch.autograd.grad(out.sum() + lse[[0, 2]].sum(), list(tensors.values()))
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[1][1] == 0).all()
    assert (grads[2][1] == 0).all()
    # the shared query's gradient is that of the two visible images
    visible = {k: (v if k == "query" else v[[0, 2]]) for k, v in tensors.items()}
    out, lse = ops.cross_attn_lse(**visible, impl=impl)
    (expected,) = torch.autograd.grad(out.sum() + lse.sum(), [tensors["query"]])
    torch.testing.assert_close(grads[0], expected)


def test_fully_masked_image_is_zero_though_the_query_is_nan(impl, device, runnable):
    runnable("cross_attn", torch.float32, 32)
    tensors = {k: v.to(device) for k, v in draw("ordinary").items()}
    tensors["query"][..., 1, 0] = torch.nan
    mask = torch.ones(3, 49, dtype=torch.bool, device=device)
    mask[1] = False
    out, lse = ops.cross_attn_lse(**tensors, key_mask=mask, impl=impl)
    assert (out[1] == 0).all()
    assert (lse[1] == -torch.inf).all()
    assert out[0, :, 1].isnan().all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_what_masked_columns_hold_does_not_matter(poison, impl, device, inputs):
    mask = some_mask(3, 49).to(device)
    results = []
    for fill in (0.0, poison):
        leaves = {
            k: (v if k == "query" else v.masked_fill(~mask[:, None, :, None], fill))
            .clone()
            .requires_grad_()
            for k, v in inputs.items()
        }
        out = ops.cross_attn(**leaves, key_mask=mask, impl=impl)
        results.append([out, *torch.autograd.grad(out.square().sum(), list(leaves.values()))])
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned)


def test_nan_stays_in_its_row(inputs, impl):
    inputs["query"][0, 0, 3, 5] = float("nan")
    out = ops.cross_attn(**inputs, impl=impl)
    expected = ops.cross_attn(**inputs, impl="reference")
    assert torch.equal(out.isnan(), expected.isnan())
    assert expected.isnan().any()


def test_any_strides(attention_layout, impl, runnable, compare):
    runnable("cross_attn", torch.float32, 20)
    compare(ops.cross_attn, {k: attention_layout(v) for k, v in draw("odd").items()})


def recomputing(
    inputs: dict[str, Tensor], seeds: list[Tensor], fixed: dict[str, object]
) -> dict[str, float]:
    """`cancelling`, for kernels that recompute P = exp(S - lse) in the backward.

    There the relative error of P is a rounding step of the largest score, which is far from 1 only
    at scores no trained attention has.
    """
    query, key, _ = inputs.values()
    scores = (query @ key.transpose(-1, -2)).abs() * fixed["scale"]
    factor = 1.0 + float(scores.amax())
    return {name: factor * size for name, size in cancelling(inputs, seeds, fixed).items()}


@pytest.mark.parametrize("magnitude", [1e4, 1e-38, 300.0])
def test_extreme_scores(magnitude, impl, runnable, compare):
    runnable("cross_attn", torch.float32, 32)
    inputs = draw("ordinary")
    inputs["query"] = inputs["query"] * magnitude
    compare(ops.cross_attn, inputs, cancelling if impl == "cpu" else recomputing, scale=1.0)


@pytest.mark.parametrize(
    ("query_batch", "key_batch", "value_batch", "mask_batch"),
    [(4, 1, 1, None), (4, 1, 1, 1), (4, 1, 1, 4), (4, 1, 4, None), (1, 1, 1, 4), (1, 4, 1, None)],
)
def test_size_one_batches_broadcast(
    query_batch, key_batch, value_batch, mask_batch, impl, runnable, compare
):
    runnable("cross_attn", torch.float32, 8)
    inputs = {
        "query": torch.randn(query_batch, 2, 5, 8),
        "key": torch.randn(key_batch, 2, 7, 8),
        "value": torch.randn(value_batch, 2, 7, 8),
    }
    mask = None if mask_batch is None else some_mask(mask_batch, 7)
    compare(ops.cross_attn_lse, inputs, key_mask=mask)


def test_repeats_are_bitwise_equal(impl, device, runnable):
    runnable("cross_attn", torch.float32, 32)
    tensors = [v.to(device).requires_grad_() for v in draw("ordinary").values()]

    def once() -> list[Tensor]:
        out = ops.cross_attn(*tensors, impl=impl)
        return [out, *torch.autograd.grad(out.square().sum(), tensors)]

    first = once()
    for _ in range(3 if impl == "triton" and device == "cpu" else 25):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


@pytest.mark.parametrize("case", ["ordinary", "odd", "per-image-query", "one-of-each"])
def test_reference_is_scaled_dot_product_attention(case):
    tensors = draw(case, torch.float64)
    query, key, value = tensors.values()
    mask = some_mask(key.shape[0], key.shape[2])
    expanded = query.expand(key.shape[0], -1, -1, -1)
    expected = F.scaled_dot_product_attention(expanded, key, value, mask[:, None, None])
    actual = ops.cross_attn(query, key, value, key_mask=mask, impl="reference")
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)


def test_ordinary_calls_take_the_head_width_scale():
    tensors = draw("ordinary")
    torch.testing.assert_close(
        ops.cross_attn(**tensors), ops.cross_attn(**tensors, scale=32**-0.5), rtol=0, atol=0
    )
