# SPDX-License-Identifier: Apache-2.0
"""norm_cosine_logits against its reference and against the modules it replaces."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vtclip import ops, testing

# name -> (B, K, C)
CASES = {
    "ordinary": (4, 7, 64),
    "odd": (3, 17, 59),
    "wide": (2, 3, 1025),
    "one-class": (3, 1, 8),
    "no-images": (0, 3, 8),
    "no-classes": (3, 0, 8),
}


def draw(case: str, dtype: torch.dtype = torch.float32):
    B, K, C = CASES[case]
    return {
        "hidden": (3 * torch.randn(B, K, C) + 1).to(dtype),
        "weight": (1 + 0.3 * torch.randn(C)).to(dtype),
        "bias": (0.3 * torch.randn(C)).to(dtype),
        "text": torch.randn(K, C).to(dtype),
        "image": torch.randn(B, C).to(dtype),
    }


@pytest.mark.parametrize("case", CASES)
def test_every_dtype(case, dtype, impl, runnable, compare):
    runnable("norm_cosine_logits", dtype, CASES[case][-1])
    compare(ops.norm_cosine_logits, draw(case, dtype), residual=0.5, scale=10.0)


@pytest.mark.parametrize("layout", [testing.spread, testing.misaligned])
def test_any_strides(layout, impl, runnable, compare):
    runnable("norm_cosine_logits", torch.float32, 59)
    compare(ops.norm_cosine_logits, {k: layout(v) for k, v in draw("odd").items()})


def test_mean_far_from_zero_keeps_its_variance(impl, runnable, compare):
    runnable("norm_cosine_logits", torch.float32, 64)
    inputs = draw("ordinary")
    inputs["hidden"] = inputs["hidden"] + 1000.0
    compare(ops.norm_cosine_logits, inputs)


def test_zero_image_gives_zero_and_no_gradient(inputs, impl):
    inputs["image"][1] = 0
    leaves = {k: v.requires_grad_() for k, v in inputs.items()}
    logits = ops.norm_cosine_logits(**leaves, impl=impl)
    assert (logits[1] == 0).all()
    grads = torch.autograd.grad(logits.sum() + logits.square().sum(), list(leaves.values()))
    assert all(grad.isfinite().all() for grad in grads)
    assert (grads[0][1] == 0).all()
    assert (grads[4][1] == 0).all()


def test_reference_is_layer_norm_then_cosine():
    inputs = draw("ordinary", torch.float64)
    normed = F.layer_norm(inputs["hidden"], (64,), inputs["weight"], inputs["bias"], 1e-5)
    summed = inputs["text"] + 0.5 * normed
    expected = 9 * F.cosine_similarity(inputs["image"][:, None], summed, dim=-1)
    actual = ops.norm_cosine_logits(**inputs, residual=0.5, scale=9.0, impl="reference")
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)
