# SPDX-License-Identifier: Apache-2.0
"""What is asked of the operators alike: exact gradients, and errors that name the argument."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from vtclip import ops
from vtclip.names import PENALTIES
from vtclip.testing.problems import FUNCTIONS, tensors_of

MASK = torch.tensor([[True, True, False, True], [True, False, True, True]])
MASKED = {"key_mask": MASK, "scale": 0.3}
# operator, shapes of its tensors ("-" is None), fixed arguments
GRADCHECKS = [
    ("cosine_logits", "3 5, 4 5", {"scale": 2.0}),
    ("cosine_logits", "3 5, 3 4 5", {"scale": 2.0}),
    ("cross_attn_lse", "1 2 3 5, 2 2 4 5, 2 2 4 5", MASKED),
    ("cross_attn_lse", "2 2 3 5, 2 2 4 5, 2 2 4 5", MASKED),
    ("cross_attn_weights", "1 2 3 5, 2 2 4 5", {"key_mask": MASK}),
    ("norm_cosine_logits", "2 3 5, 5, 5, 3 5, 2 5", {"residual": 0.7}),
    ("ffn_cosine_logits", "2 3 4, 5 4, 5, 2 3 5, 5, 5, 3 5, 2 5", {"residual": 0.7}),
    ("rational_attn", "2 2 1 3, 1 2 4 3, 2 2 4 3, 2 2 4 3, 2 2 4 3", {"scale": 0.8}),
    ("rational_attn", "2 2 1 3, -, -, 2 2 4 3, 2 2 4 3", {"scale": 0.8}),
    ("rational_attn", "-, 1 2 4 3, -, 2 2 4 3, 2 2 4 3", {"scale": 0.8}),
    ("rational_attn", "-, -, 2 2 4 3, 2 2 4 3, 2 2 4 3", {"scale": 0.8}),
    *(
        ("rational_head", "2 3 4, 4 4, 4, 2 4, 3 4", {"scale": 0.7, "penalty": penalty})
        for penalty in PENALTIES
    ),
    ("rational_logits", "2 5, 3 5, 2 3 5", {"scale": 0.7}),
    ("unit_products", "2 5, 3 5", {"scale": 0.7}),
]


@pytest.mark.parametrize(("op", "shapes", "fixed"), GRADCHECKS)
def test_gradcheck(exact_impl, op, shapes, fixed):
    tensors = [
        None
        if shape == "-"
        else torch.randn(*map(int, shape.split()), dtype=torch.float64, requires_grad=True)
        for shape in shapes.split(", ")
    ]

    def call(*leaves: Tensor) -> tuple[Tensor, ...]:
        left = iter(leaves)
        inputs = (t if t is None else next(left) for t in tensors)
        return tensors_of(getattr(ops, op)(*inputs, **fixed, impl=exact_impl))

    leaves = [t for t in tensors if t is not None]
    assert torch.autograd.gradcheck(call, leaves, check_undefined_grad=True)


@pytest.mark.parametrize(("name", "atol"), [("cross_attn", 1e-5), ("rational_attn", 2e-5)])
def test_expanded_output_gradient(name, atol, impl, device, runnable):
    runnable(name, torch.float32, 20)
    op = FUNCTIONS[name]
    leaves = op.draw({"B": 2, "H": 3, "K": 17, "L": 51, "d": 20}, device=device)
    actual = torch.autograd.grad(op(*leaves, impl=impl).sum(), leaves)
    expected = torch.autograd.grad(op(*leaves, impl="reference").sum(), leaves)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, atol=atol, rtol=1e-5)


SIZES = {"B": 4, "K": 7, "D": 64, "C": 64, "F": 96}


@pytest.mark.parametrize("op", ["norm_cosine_logits", "ffn_cosine_logits"])
def test_zero_affine_gives_plain_cosine_logits(op, impl, device, runnable):
    runnable(op, torch.float32, 64)
    with torch.no_grad():
        *_, weight, bias, text, image = tensors = FUNCTIONS[op].draw(SIZES, device=device)
        for affine in (weight, bias):
            affine.zero_()
        expected = ops.cosine_logits(image, text, scale=100.0, impl=impl)
        actual = getattr(ops, op)(*tensors, scale=100.0, impl=impl)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-6)


INT8 = torch.zeros(4, 64, dtype=torch.int8)
# operator -> (argument, a shape or a value that it must not have, error, what is said)
REFUSED = {
    "ffn_cosine_logits": [
        ("weight", (64, 95), ValueError, r"weight must be \[C, F\] = \[64, 96\]"),
        ("residual_input", (4, 7, 63), ValueError, r"residual_input must be \[B, K, "),
        ("text", (6, 64), ValueError, r"text must be \[K, C\] = \[7, 64\]"),
        ("eps", -1.0, ValueError, "eps must be at least 0, got -1.0"),
        ("scale", math.nan, ValueError, "scale must be finite, got nan"),
        ("bias", [0.0], TypeError, "bias must be a Tensor, got list"),
    ],
    "rational_head": [
        ("penalty", "l2", ValueError, "penalty must be one of none, l1, mse, linf, got 'l2'"),
        ("weight", (64, 63), ValueError, r"weight must be \[D, D\] = \[64, 64\]"),
        ("text", (6, 64), ValueError, r"text must be \[K, D\] = \[7, 64\]"),
        ("scale", math.inf, ValueError, "scale must be finite, got inf"),
        ("bias", [0.0], TypeError, "bias must be a Tensor, got list"),
    ],
    "rational_logits": [
        ("mask", (4, 7, 63), ValueError, r"mask must be \[B, K, D\] = \[4, 7, 64\]"),
        ("text", (7, 63), ValueError, r"text must be \[K, D\] = \[7, 64\]"),
        ("image", INT8, TypeError, "image must be one of"),
        ("scale", math.nan, ValueError, "scale must be finite, got nan"),
    ],
    "unit_products": [
        ("text", (7, 63), ValueError, r"text must be \[K, D\] = \[7, 64\]"),
        ("image", INT8, TypeError, "image must be one of"),
        ("scale", math.nan, ValueError, "scale must be finite, got nan"),
        ("scale", 0.0, ValueError, r"scale must be above 0, got 0\.0"),
        ("scale", -1.0, ValueError, r"scale must be above 0, got -1\.0"),
    ],
}


@pytest.mark.parametrize(
    ("op", "name", "value", "error", "message"),
    [(op, *case) for op, cases in REFUSED.items() for case in cases],
)
def test_bad_input_is_refused_by_name(op, name, value, error, message, refuses):
    function = FUNCTIONS[op]
    inputs = dict(zip(function.op.differentiable, function.draw(SIZES), strict=True))
    inputs[name] = torch.zeros(value) if isinstance(value, tuple) else value
    refuses(error, message, getattr(ops, op), **inputs)
