# SPDX-License-Identifier: Apache-2.0
"""cosine_logits against its reference, its oracle in torch, and at vectors that overflow."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from vtclip import ops, testing

# name -> (B, K, D)
CASES = {
    "ordinary": (5, 7, 64),
    "odd": (3, 17, 59),
    "wide": (2, 33, 1025),
    "one-of-each": (1, 1, 1),
    "no-images": (0, 3, 8),
    "no-classes": (3, 0, 8),
    "no-width": (3, 2, 0),
}


def draw(case: str, per_image: bool, dtype: torch.dtype = torch.float32):
    B, K, D = CASES[case]
    text = (B, K, D) if per_image else (K, D)
    return {"image": torch.randn(B, D).to(dtype), "text": torch.randn(text).to(dtype)}


def cancelling(inputs, seeds, fixed) -> dict[str, float]:
    """The largest sum of |terms| in each gradient, in steps of the seeds' dtype.

    Of rows that are nearly parallel, and of one column, nothing is left of g - u <g, u>. What
    cancels is summed in float32 at least.
    """
    image, text = (tensor.detach() for tensor in inputs.values())
    u, v = (F.normalize(rows, dim=-1).abs() for rows in (image, text))
    g = fixed["scale"] * seeds[0].double().abs()[..., None]
    on_image = (g * v).sum(1)
    on_text = g * u[:, None] if text.dim() == 3 else (g * u[:, None]).sum(0)
    summed = torch.promote_types(seeds[0].dtype, torch.float32)
    step = torch.finfo(summed).eps / torch.finfo(seeds[0].dtype).eps
    sizes = {}
    for name, rows, unit, total in (("image", image, u, on_image), ("text", text, v, on_text)):
        terms = total + unit * (total * unit).sum(-1, keepdim=True)
        largest = (terms / rows.norm(dim=-1, keepdim=True)).nan_to_num().amax()
        sizes[name] = float(largest) * step
    return sizes


per_image = pytest.mark.parametrize("per_image", [False, True], ids=["shared", "per-image"])


@per_image
@pytest.mark.parametrize("case", CASES)
def test_every_dtype(case, per_image, dtype, impl, runnable, compare):
    runnable("cosine_logits", dtype, CASES[case][-1])
    compare(ops.cosine_logits, draw(case, per_image, dtype), scale=100.0)


@pytest.mark.parametrize("impl", ["cpu"])
@pytest.mark.parametrize(("B", "K"), [(131, 3), (3, 131)])
def test_more_rows_than_one_step_of_a_sum(B, K, impl, runnable, compare):
    """128 rows in csrc/cpu: the gradients are sums over images, and over classes."""
    runnable("cosine_logits", torch.float32, 20)
    compare(ops.cosine_logits, {"image": torch.randn(B, 20), "text": torch.randn(K, 20)}, scale=3.0)


@per_image
@pytest.mark.parametrize("layout", [testing.spread, testing.misaligned])
def test_any_strides(layout, per_image, impl, runnable, compare):
    runnable("cosine_logits", torch.float32, 59)
    inputs = {k: layout(v) for k, v in draw("odd", per_image).items()}
    compare(ops.cosine_logits, inputs, scale=3.0)


@per_image
@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_huge_and_tiny_vectors(size, per_image, impl, device, runnable):
    runnable("cosine_logits", torch.float32, 64)
    image, text = (v.to(device) for v in draw("ordinary", per_image).values())
    expected = ops.cosine_logits(image.double(), text.double(), impl="reference").float()
    actual = ops.cosine_logits(image * size, text * size, impl=impl)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-5)


@per_image
def test_zero_vectors_give_zero_and_no_gradient(per_image, impl, device, runnable):
    runnable("cosine_logits", torch.float32, 64)
    image, text = (v.to(device) for v in draw("ordinary", per_image).values())
    image[2] = 0
    text[..., 4, :] = 0
    image.requires_grad_()
    text.requires_grad_()
    logits = ops.cosine_logits(image, text, scale=100.0, impl=impl)
    assert (logits[2] == 0).all()
    assert (logits[:, 4] == 0).all()
    grad_image, grad_text = torch.autograd.grad(logits.square().sum() + logits.sum(), (image, text))
    assert grad_image.isfinite().all()
    assert grad_text.isfinite().all()
    assert (grad_image[2] == 0).all()
    assert (grad_text[..., 4, :] == 0).all()


def test_nan_stays_in_its_row(impl, device, runnable):
    runnable("cosine_logits", torch.float32, 64)
    image, text = (v.to(device) for v in draw("ordinary", False).values())
    image[1, 3] = float("nan")
    logits = ops.cosine_logits(image, text, impl=impl)
    assert logits[1].isnan().all()
    assert logits[[0, 2, 3, 4]].isfinite().all()


def test_reference_is_cosine_similarity():
    inputs = draw("ordinary", True, torch.float64)
    expected = 7 * F.cosine_similarity(inputs["image"][:, None], inputs["text"], dim=-1)
    actual = ops.cosine_logits(**inputs, scale=7.0, impl="reference")
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)
