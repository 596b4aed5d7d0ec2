# SPDX-License-Identifier: Apache-2.0
"""cross_attn_weights against its reference, and as the map behind cross_attn."""

from __future__ import annotations

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


@pytest.mark.parametrize("case", CASES)
def test_every_dtype(case, dtype, impl, runnable, compare):
    runnable("cross_attn_weights", dtype, CASES[case][-1])
    compare(ops.cross_attn_weights, draw(case, dtype))


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
