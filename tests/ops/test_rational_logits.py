# SPDX-License-Identifier: Apache-2.0
"""rational_logits against its reference, and its identities."""

from __future__ import annotations

import pytest
import torch
from row_cases import CASES
from torch import Tensor

from vtclip import ops


def draw(case: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    B, K, D = CASES[case]
    shapes = {"image": (B, D), "text": (K, D), "mask": (B, K, D)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("case", CASES)
def test_every_dtype(case, dtype, impl, runnable, compare):
    runnable("rational_logits", dtype, CASES[case][-1])
    compare(ops.rational_logits, draw(case, dtype), scale=10.0)


def test_any_strides(layout, impl, runnable, compare):
    runnable("rational_logits", torch.float32, 59)
    compare(ops.rational_logits, {name: layout(t) for name, t in draw("odd").items()})


def test_zero_mask_gives_plain_products(inputs, impl):
    image, text, mask = inputs.values()
    logits = ops.rational_logits(image, text, torch.zeros_like(mask), scale=3.0, impl=impl)
    torch.testing.assert_close(logits, 3 * image @ text.T, rtol=1e-5, atol=1e-4)


def test_mask_below_minus_one_closes_and_has_no_gradient(inputs, impl):
    image, text, mask = inputs.values()
    mask = torch.where(mask > 0, -1.0, -2.0).requires_grad_()  # at -1 the slope is 0 as well
    logits = ops.rational_logits(image, text, mask, impl=impl)
    assert (logits == 0).all()
    assert (torch.autograd.grad(logits.sum(), mask)[0] == 0).all()


def test_nan_stays_in_its_logit(inputs, impl):
    image, text, mask = inputs.values()
    mask[2, 5, 7] = torch.nan
    nan = ops.rational_logits(image, text, mask, impl=impl).isnan()
    assert nan[2, 5]
    assert nan.sum() == 1
