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


def cancelling_everywhere(inputs, seeds, fixed) -> dict[str, float]:
    """The largest sum of |terms| in each gradient, in steps of the seeds' dtype.

    Of two columns LayerNorm leaves a sign, and of d_hidden nothing but what eps adds; of one column
    the cosine is a sign, and nothing is left of any gradient. All
    implementations sum in float32 at least, so a step is float32's for 16-bit types too.
    """
    hidden, n, norm_bias, text, image = (tensor.detach() for tensor in inputs.values())
    residual, scale = fixed.get("residual", 1.0), fixed.get("scale", 1.0)
    r = (hidden.var(-1, correction=0, keepdim=True) + fixed.get("eps", 1e-5)).rsqrt()
    zh = (hidden - hidden.mean(-1, keepdim=True)) * r
    y = text + residual * (n * zh + norm_bias)
    zh, n = zh.abs(), n.abs()
    u, v = F.normalize(y, dim=-1).abs(), F.normalize(image, dim=-1).abs()
    g = scale * seeds[0].double().abs()[..., None]
    d_y = g / y.norm(dim=-1, keepdim=True) * (v[:, None] + (u @ v[..., None]) * u)
    d_n = residual * n * d_y
    d_v = (g * u).sum(1)
    terms = {
        "hidden": r * (d_n + d_n.mean(-1, keepdim=True) + zh * (d_n * zh).mean(-1, keepdim=True)),
        "weight": residual * (d_y * zh).sum((0, 1)),
        "bias": residual * d_y.sum((0, 1)),
        "text": d_y.sum(0),
        "image": (d_v + (d_v * v).sum(-1, keepdim=True) * v) / image.norm(dim=-1, keepdim=True),
    }
    dtype = seeds[0].dtype
    step = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / torch.finfo(dtype).eps
    return {name: float(sizes.nan_to_num().amax()) * step for name, sizes in terms.items()}


def cancelling(inputs, seeds, fixed) -> dict[str, float]:
    """Of the gradient of `hidden` alone: of the others something is left from two columns on."""
    return {"hidden": cancelling_everywhere(inputs, seeds, fixed)["hidden"]}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("C", [2, 3])
def test_few_columns(C, dtype, impl, runnable, compare):
    """Of one row of them the reference may be right in digits that no order of sums can promise."""
    runnable("norm_cosine_logits", dtype, C)
    for _ in range(50):
        inputs = {"hidden": torch.randn(1, 1, C), "weight": torch.randn(C), "bias": torch.randn(C)}
        inputs |= {"text": torch.randn(1, C), "image": torch.randn(1, C)}
        inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
        compare(ops.norm_cosine_logits, inputs, cancelling)


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
