# SPDX-License-Identifier: Apache-2.0
"""unit_products against its reference, and its identities."""

from __future__ import annotations

import pytest
import row_cases
import torch
import torch.nn.functional as F
from torch import Tensor

from vtclip import ops

CASES = row_cases.CASES | {"many-images": (131, 2, 24)}


def draw(case: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    B, K, D = CASES[case]
    return {"image": torch.randn(B, D).to(dtype), "text": torch.randn(K, D).to(dtype)}


def cancelling(
    inputs: dict[str, Tensor], seeds: list[Tensor], fixed: dict[str, object]
) -> dict[str, float]:
    """The largest sum of |terms| in each gradient, root / |x| * (g - xhat <g, xhat>)."""
    image, text = inputs["image"], inputs["text"]
    root = float(fixed["scale"]) ** 0.5  # type: ignore[arg-type]
    hats = [F.normalize(rows, dim=-1).abs() for rows in (image, text)]
    on_image, on_text, on_products = (seed.double().abs() for seed in seeds)
    totals = (
        on_image + root * (on_products * hats[1]).sum(1),
        on_text + root * (on_products * hats[0][:, None]).sum(0),
    )
    sizes = {}
    for (name, rows), hat, total in zip(inputs.items(), hats, totals, strict=True):
        if not rows.numel():
            continue  # the other rows still have gradients
        terms = total + hat * (total * hat).sum(-1, keepdim=True)
        sizes[name] = float((root / rows.norm(dim=-1, keepdim=True) * terms).amax())
    return sizes


@pytest.mark.parametrize("case", CASES)
def test_every_dtype(case, dtype, impl, runnable, compare):
    runnable("unit_products", dtype, CASES[case][-1])
    # 16-bit results are rounded once, from float32: nothing cancels in their own precision
    wide = dtype in (torch.float32, torch.float64) and 0 not in CASES[case]
    compare(ops.unit_products, draw(case, dtype), cancelling if wide else None, scale=100.0)


def test_any_strides(layout, impl, runnable, compare):
    runnable("unit_products", torch.float32, 59)
    compare(ops.unit_products, {name: layout(t) for name, t in draw("odd").items()}, scale=2.0)


def test_equals_its_equation(inputs, impl):
    image, text = inputs.values()
    v, t, products = ops.unit_products(image, text, scale=9.0, impl=impl)
    torch.testing.assert_close(v, 3 * F.normalize(image, dim=-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(t, 3 * F.normalize(text, dim=-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(products, v[:, None] * t, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30, 3e38])
def test_lengths_whose_squares_leave_the_range(size, inputs, impl):
    image, text = inputs.values()
    image = image / image.abs().amax(dim=-1, keepdim=True)
    want = ops.unit_products(image, text, impl=impl)
    found = ops.unit_products(image * size, text, impl=impl)
    for name, one, two in zip(want._fields, want, found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("size", [6e-8, 65504.0])
def test_float16_rows_of_the_smallest_and_largest_entries(size, impl, device, runnable):
    runnable("unit_products", torch.float16, 64)
    signs = [rows.sign() for rows in draw("ordinary").values()]
    image, text = ((size * rows).half().to(device) for rows in signs)
    v, t, products = ops.unit_products(image, text, scale=64.0, impl=impl)
    # 64 entries of one size: each of a row of length 8 is 1
    assert torch.equal(v.cpu(), signs[0].half())
    assert torch.equal(t.cpu(), signs[1].half())
    assert torch.equal(products.cpu(), (signs[0][:, None] * signs[1]).half())


def test_a_zero_row_stays_zero_without_a_gradient(inputs, impl):
    image, text = inputs.values()
    image[1] = 0
    text[4] = 0
    leaves = image.requires_grad_(), text.requires_grad_()
    v, t, products = ops.unit_products(*leaves, scale=4.0, impl=impl)
    assert (v[1] == 0).all()
    assert (t[4] == 0).all()
    assert (products[1] == 0).all()
    assert (products[:, 4] == 0).all()
    d_image, d_text = torch.autograd.grad(v.sum() + t.sum() + products.sum(), leaves)
    assert (d_image[1] == 0).all()
    assert (d_text[4] == 0).all()
    assert bool(d_image.isfinite().all())
    assert bool(d_text.isfinite().all())


def test_nan_stays_in_its_row(inputs, impl):
    image, text = inputs.values()
    image[2, 5] = torch.nan
    text[3, 1] = torch.nan
    v, t, products = ops.unit_products(image, text, impl=impl)
    assert v.isnan().any(dim=1).tolist() == [False, False, True, False]
    assert t.isnan().any(dim=1).tolist() == [i == 3 for i in range(7)]
    there = products.isnan().any(dim=2)
    assert bool(there[2].all())
    assert bool(there[:, 3].all())
    assert int(there.sum()) == 7 + 4 - 1


def test_gradients_lie_along_the_sphere(impl, device, runnable):
    """The length of a row changes nothing, so the gradient is orthogonal to the row."""
    runnable("unit_products", torch.float32, 64)
    leaves = [tensor.to(device).requires_grad_() for tensor in draw("ordinary").values()]
    outputs = ops.unit_products(*leaves, scale=50.0, impl=impl)
    seeds = [torch.randn(out.shape).to(device) for out in outputs]
    for row, grad in zip(leaves, torch.autograd.grad(outputs, leaves, seeds), strict=True):
        along = (row.detach() * grad).sum(dim=-1)
        size = (row.detach() * grad).abs().sum(dim=-1)
        assert bool((size > 0.1).all())
        allowed = 1e-5 * float(size.max())
        torch.testing.assert_close(along, torch.zeros_like(along), rtol=0, atol=allowed)


def test_unused_outputs_cost_no_gradient(impl, device, runnable):
    runnable("unit_products", torch.float32, 64)
    image, text = (tensor.to(device).requires_grad_() for tensor in draw("ordinary").values())
    v = ops.unit_products(image, text, impl=impl).image
    d_image, d_text = torch.autograd.grad(v.square().sum(), (image, text))
    torch.testing.assert_close(d_image, torch.zeros_like(d_image), rtol=0, atol=1e-5)
    assert (d_text == 0).all()
