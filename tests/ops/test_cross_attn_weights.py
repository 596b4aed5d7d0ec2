# SPDX-License-Identifier: Apache-2.0
"""cross_attn_weights against its reference, and as the map behind cross_attn."""

from __future__ import annotations

import functools

import pytest
import torch

from vtclip import ops, testing

# name -> (Bq, B, H, K, L, d)
CASES = {
    "ordinary": (1, 3, 2, 20, 49, 32),
    "per-image-query": (2, 2, 2, 20, 49, 32),
    "odd": (1, 2, 3, 17, 67, 20),
    "width-64": (1, 2, 1, 19, 50, 64),
    "width-128": (2, 2, 1, 19, 50, 128),
    "wide": (1, 1, 1, 3, 5, 256),
    "one-of-each": (1, 1, 1, 1, 1, 1),
    "no-images": (1, 0, 2, 3, 4, 8),
    "no-queries": (1, 2, 2, 0, 4, 8),
    "no-keys": (1, 2, 2, 3, 0, 8),
    "no-width": (1, 2, 2, 3, 4, 0),
}


def draw(case: str, dtype: torch.dtype = torch.float32):
    Bq, B, H, K, L, d = CASES[case]
    return {
        "query": torch.randn(Bq, H, K, d).to(dtype),
        "key": torch.randn(B, H, L, d).to(dtype),
    }


def cancelling(inputs, seeds, fixed, exact: bool = True) -> dict[str, float]:
    """The largest sum of |terms| in each gradient, dS = W * (dW - mean), in steps of the dtype.

    What cancels there is summed in float32 at least. The weights themselves were rounded to the
    dtype, and what of them lies below its smallest number is lost. Not `exact`: where scores are
    multiplied by log2(e) before their maximum is taken off, that rounding grows with them, and the
    weights have it too; and dS is rounded to the dtype, as an operand of tensor cores.
    """
    query, key = (tensor.detach() for tensor in inputs.values())
    scale = fixed.get("scale") or query.shape[-1] ** -0.5
    weights = ops.cross_attn_weights(query, key, scale=scale, impl="reference")
    on_weights, info = seeds[0].double().abs(), torch.finfo(seeds[0].dtype)
    mean = (weights * on_weights).sum(-1, keepdim=True)
    step = torch.finfo(torch.promote_types(seeds[0].dtype, torch.float32)).eps
    if not exact:
        step *= 1 + float((query @ key.transpose(-1, -2)).abs().amax()) * abs(scale)
    terms = (weights * step + info.smallest_normal * info.eps) * (on_weights + mean) * abs(scale)
    if not exact:
        d_s = weights * (seeds[0] - (weights * seeds[0]).sum(-1, keepdim=True))
        terms = terms + info.eps / 2 * d_s.abs() * abs(scale)
    d_query = (terms @ key.abs()).sum(0) if query.shape[0] == 1 else terms @ key.abs()
    d_key = terms.transpose(-1, -2) @ query.abs()
    largest = {"query": d_query, "key": d_key}
    if not exact:
        largest["output 0"] = weights * step
    return {name: float(terms.amax()) / info.eps for name, terms in largest.items()}


@pytest.mark.parametrize("case", CASES)
def test_every_dtype(case, dtype, impl, runnable, compare):
    runnable("cross_attn_weights", dtype, CASES[case][-1])
    compare(ops.cross_attn_weights, draw(case, dtype))


@pytest.mark.parametrize("scale", [1.0, 7.0, 100.0])
@pytest.mark.parametrize("case", ["ordinary", "per-image-query", "odd"])
def test_saturated_maps(case, scale, dtype, impl, runnable, compare):
    """Where one weight of a row is nearly 1, what rounding it left out is no part of a gradient."""
    runnable("cross_attn_weights", dtype, CASES[case][-1])
    floor = functools.partial(cancelling, exact=impl in ("cpu", "reference"))
    compare(ops.cross_attn_weights, draw(case, dtype), floor, scale=scale)


def test_key_mask_and_layout(impl, runnable, compare):
    runnable("cross_attn_weights", torch.float32, 32)
    mask = torch.rand(3, 49) > 0.4
    mask[1] = False
    inputs = {k: testing.spread(v) for k, v in draw("ordinary").items()}
    compare(ops.cross_attn_weights, inputs, key_mask=mask)


def test_masked_columns_may_hold_nan(impl, device, inputs):
    query, key = inputs.values()
    mask = (torch.rand(3, 49) > 0.4).to(device)
    grads = []
    for fill in (0.0, float("nan")):
        q = query.clone().requires_grad_()
        k = key.masked_fill(~mask[:, None, :, None], fill).requires_grad_()
        weights = ops.cross_attn_weights(q, k, key_mask=mask, impl=impl)
        grads.append([weights, *torch.autograd.grad(weights.square().sum(), (q, k))])
    for clean, poisoned in zip(*grads, strict=True):
        assert torch.equal(clean, poisoned)


def test_rows_sum_to_one_and_give_cross_attn(inputs, impl):
    query, key = inputs.values()
    value = torch.randn_like(key)
    weights = ops.cross_attn_weights(query, key, impl=impl)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    torch.testing.assert_close(
        weights @ value, ops.cross_attn(query, key, value, impl=impl), atol=1e-5, rtol=1e-5
    )
