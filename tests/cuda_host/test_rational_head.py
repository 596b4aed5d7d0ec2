# SPDX-License-Identifier: Apache-2.0
"""The block code of the CUDA rational_head kernels on the host, against the reference."""

from __future__ import annotations

import pytest
import torch
from block_results import compare

from vtclip import ops
from vtclip.reference._dtypes import PENALTY_CODES, acc_dtype

NAMES = ("logits", "penalty", "d_context", "d_weight", "d_bias", "d_image", "d_text")
# name -> (B, K, D), images per chunk
CASES = {
    "odd": ((3, 17, 59), 2),
    "tiles": ((2, 33, 136), 1),
    "one class": ((3, 1, 8), 2),
    "one of each": ((1, 1, 1), 1),
}


def draw(case, dtype):
    (B, K, D), _ = CASES[case]
    tensors = [torch.randn(B, K, D), D**-0.5 * torch.randn(D, D), 0.5 * torch.randn(D)]
    tensors += [torch.randn(B, D), torch.randn(K, D), torch.randn(B, K)]
    return [t.to(dtype) for t in tensors] + [torch.randn(B).to(acc_dtype(dtype))]


def run(program, tensors, case, penalty, features=True):
    ints = (PENALTY_CODES[penalty], CASES[case][1], features)
    return program(tensors, ints=ints, numbers=(10.0,))


def floors_of(tensors, penalty):
    """Room for elements whose M lies within a rounding step of -1, where the slope jumps.

    The largest |E| is one element: a rounding step of the terms that cancel in it.
    """
    context, weight, bias, image, text, d_logits, d_penalty = (t.double() for t in tensors)
    M = context @ weight.T + bias
    size = context.abs() @ weight.abs().T + bias.abs()
    slope = (10 * d_logits[..., None] * image[:, None] * text).abs()
    extra = d_penalty.abs()[:, None, None] * 2 * (1 + M.abs())
    slope = slope + (extra if penalty == "linf" else extra / M[0].numel())
    step = torch.finfo(acc_dtype(tensors[0].dtype)).eps
    jump = slope * ((M + 1).abs() <= 4 * step * size)
    return {
        "penalty": step * float(size.amax()) if penalty == "linf" else 0.0,
        "d_context": float((jump @ weight.abs()).amax()),
        "d_weight": float((jump.flatten(0, 1).T @ context.abs().flatten(0, 1)).amax()),
        "d_bias": float(jump.sum((0, 1)).amax()),
    }


def check(program, tensors, case, penalty):
    logits, size, _, d_m, d_bias, d_image, d_text = run(program, tensors, case, penalty)
    rows = d_m.flatten(0, 1)
    d_context, d_weight = d_m @ tensors[1], rows.T @ tensors[0].flatten(0, 1)
    results = (logits, size, d_context, d_weight, d_bias, d_image, d_text)
    compare(
        dict(zip(NAMES, results, strict=True)),
        ops.rational_head,
        tensors[:5],
        tensors[5:],
        floors_of(tensors, penalty),
        scale=10.0,
        penalty=penalty,
    )


@pytest.mark.parametrize("penalty", PENALTY_CODES)
@pytest.mark.parametrize("case", CASES)
def test_block_code_matches_the_reference(program, case, penalty, dtype):
    check(program, draw(case, dtype), case, penalty)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_any_strides(program, layout, dtype):
    check(program, [layout(t) for t in draw("odd", dtype)], "odd", "mse")


def test_gradients_of_the_features_are_made_only_when_asked_for(program):
    tensors = draw("odd", torch.float32)
    every = run(program, tensors, "odd", "l1")
    some = run(program, tensors, "odd", "l1", features=False)
    assert all(torch.equal(a, b) for a, b in zip(every[:5], some[:5], strict=True))
    assert some[5].numel() == some[6].numel() == 0


def identity(B, K, D):
    """Inputs with which M is the context."""
    tensors = [torch.zeros(B, K, D), torch.eye(D), torch.zeros(D), torch.ones(B, D)]
    return [*tensors, torch.ones(K, D), torch.zeros(B, K), torch.ones(B)]


def test_the_first_of_equal_maxima_is_the_peak(program):
    tensors = identity(2, 33, 136)
    context = tensors[0]
    context[0, 11, 75] = context[0, 21, 3] = 0.75
    context[0, 11, 100] = -0.75  # the same distance from 1
    context[1, 5, 30] = -2.0  # closed: relu makes it a distance of 1, with no slope
    _, size, peak, d_m, *_ = run(program, tensors, "tiles", "linf")
    assert size.tolist() == [0.75, 1.0]
    assert peak.tolist() == [11 * 136 + 75, 5 * 136 + 30]
    assert d_m.nonzero().tolist() == [[0, 11, 75]]


def test_nan_spoils_its_image_only_and_is_the_peak(program):
    tensors = identity(2, 33, 136)
    tensors[0][1, 20, 70:] = torch.nan
    tensors[0][1, 3, 7] = torch.inf
    for penalty in ("l1", "mse", "linf"):
        logits, size, peak, *_ = run(program, tensors, "tiles", penalty)
        assert size.isnan().tolist() == [False, True]
        assert logits[1, 20].isnan()
        assert logits[0].isfinite().all()
    # NaN reaches every product of its row, also with the zeros of the weight
    assert peak.tolist() == [0, 3 * 136]
