# SPDX-License-Identifier: Apache-2.0
"""rational_head against its reference, every penalty, and its identities."""

from __future__ import annotations

import functools
from typing import get_args

import pytest
import row_cases
import torch
import torch.nn.functional as F
from torch import Tensor

from vtclip import ops
from vtclip.names import PENALTIES
from vtclip.ops.rational_head import Penalty

CASES = row_cases.CASES | {"wide": (2, 3, 261), "many-classes": (3, 131, 24)}
each_penalty = pytest.mark.parametrize("penalty", PENALTIES)


def test_the_type_lists_the_known_penalties():
    assert get_args(Penalty) == PENALTIES


def draw(case: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    B, K, D = CASES[case]
    shapes = {
        "context": (B, K, D),
        "weight": (D, D),
        "bias": (D,),
        "image": (B, D),
        "text": (K, D),
    }
    spread = {"weight": max(D, 1) ** -0.5, "bias": 0.5}  # about a quarter of the mask is closed
    return {
        name: (spread.get(name, 1.0) * torch.randn(shape)).to(dtype)
        for name, shape in shapes.items()
    }


def edges(inputs, seeds, fixed) -> dict[str, float]:
    """Room for elements whose M lies within a rounding step of -1, where the slope jumps."""
    context, weight, bias, image, text = inputs.values()
    M = context @ weight.T + bias
    if M.numel() == 0:
        return {}
    size = context.abs() @ weight.abs().T + bias.abs()
    slope = (fixed["scale"] * seeds[0].double()[..., None] * image[:, None] * text).abs()
    per_element = seeds[1].double().abs()[:, None, None] * 2 * (1 + M.abs())
    d_mask = slope + (per_element if fixed["penalty"] == "linf" else per_element / M[0].numel())
    step = torch.finfo(seeds[0].dtype).eps
    jump = d_mask * ((M + 1).abs() <= 4 * step * size) / step  # the caller multiplies by the step
    return {
        "context": float((jump @ weight.abs()).amax()),
        "weight": float((jump.flatten(0, 1).T @ context.abs().flatten(0, 1)).amax()),
        "bias": float(jump.sum((0, 1)).amax()),
    }


@each_penalty
@pytest.mark.parametrize("case", CASES)
def test_every_dtype(case, penalty, dtype, impl, runnable, compare):
    runnable("rational_head", dtype, CASES[case][-1])
    compare(ops.rational_head, draw(case, dtype), edges, scale=10.0, penalty=penalty)


def test_any_strides(layout, impl, runnable, compare):
    runnable("rational_head", torch.float32, 59)
    inputs = {name: layout(tensor) for name, tensor in draw("odd").items()}
    compare(ops.rational_head, inputs, edges, scale=1.0, penalty="mse")


@each_penalty
def test_zero_projection_is_zero_shot_without_penalty(penalty, inputs, impl):
    inputs["weight"].zero_()
    inputs["bias"].zero_()
    leaves = {name: tensor.requires_grad_() for name, tensor in inputs.items()}
    logits, size = ops.rational_head(**leaves, scale=3.0, penalty=penalty, impl=impl)
    plain = 3 * inputs["image"] @ inputs["text"].T
    torch.testing.assert_close(logits, plain, rtol=1e-5, atol=1e-4)
    assert (size == 0).all()
    grads = torch.autograd.grad(size.sum(), list(leaves.values()), allow_unused=True)
    assert all(grad is None or (grad == 0).all() for grad in grads)


def test_linf_gradient_goes_to_the_first_of_equal_maxima(impl, device, runnable):
    runnable("rational_head", torch.float32, 8)
    B, K, D = 2, 3, 8
    context = torch.zeros(B, K, D, device=device)
    weight = torch.eye(D, device=device)
    context[0, 1, 5] = context[0, 2, 1] = 0.75
    context[0, 2, 6] = -0.75  # the same distance from 1
    context[1, 0, 3] = -2.0  # closed: relu makes it a distance of 1, with no slope
    leaf = context.requires_grad_()
    features = torch.ones(B, D, device=device), torch.ones(K, D, device=device)
    zero = torch.zeros(D, device=device)
    _, penalty = ops.rational_head(leaf, weight, zero, *features, penalty="linf", impl=impl)
    assert penalty.tolist() == [0.75, 1.0]
    (grad,) = torch.autograd.grad(penalty.sum(), leaf)
    assert grad.nonzero().tolist() == [[0, 1, 5]]
    assert grad[0, 1, 5] == 1


def test_nan_spoils_its_image_only(inputs, impl):
    inputs["context"][2, 5, 7] = torch.nan
    for penalty in PENALTIES[1:]:
        logits, size = ops.rational_head(**inputs, penalty=penalty, impl=impl)
        assert logits[2, 5].isnan()
        assert logits.isnan().sum() == 1
        assert size.isnan().tolist() == [False, False, True, False], penalty


@each_penalty
def test_reference_is_the_released_end_of_the_layer(penalty):
    inputs = draw("odd", torch.float64)
    mask = torch.relu(1 + F.linear(inputs["context"], inputs["weight"], inputs["bias"]))
    off = (mask - 1).abs().flatten(1)
    expected = {
        "none": torch.zeros(3, dtype=torch.float64),
        "l1": off.mean(1),
        "mse": off.square().mean(1),
        "linf": torch.max(off, dim=1)[0],
    }[penalty]
    R = torch.einsum("bd,kd->bkd", inputs["image"], inputs["text"])
    logits, size = ops.rational_head(**inputs, scale=9.0, penalty=penalty, impl="reference")
    torch.testing.assert_close(logits, 9 * (mask * R).sum(-1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(size, expected, rtol=1e-12, atol=0)
    assert 0.05 < (mask == 0).double().mean() < 0.5  # the case has closed elements


def test_penalty_keeps_its_precision_in_half_types(impl, device, runnable):
    runnable("rational_head", torch.bfloat16, 64)
    inputs = {name: t.to(device) for name, t in draw("ordinary", torch.bfloat16).items()}
    logits, size = ops.rational_head(**inputs, penalty="mse", impl=impl)
    assert logits.dtype == torch.bfloat16
    assert size.dtype == torch.float32


def test_only_some_gradients_are_asked_for(inputs, impl):
    every = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    loss = functools.partial(ops.rational_head, scale=2.0, penalty="mse", impl=impl)
    full = torch.autograd.grad(sum(t.sum() for t in loss(**every)), list(every.values()))
    for wanted, expected in zip(inputs, full, strict=True):
        some = {name: tensor.clone() for name, tensor in inputs.items()}
        some[wanted].requires_grad_()
        (grad,) = torch.autograd.grad(sum(t.sum() for t in loss(**some)), [some[wanted]])
        torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-6)
