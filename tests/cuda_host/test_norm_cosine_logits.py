# SPDX-License-Identifier: Apache-2.0
"""The block code of the CUDA norm_cosine_logits kernels on the host, against the reference."""

from __future__ import annotations

import pytest
import torch
from block_results import compare

from vtclip import ops, testing

NAMES = ("logits", "d_hidden", "d_weight", "d_bias", "d_text", "d_image")
# name -> (B, K, C, images per chunk)
CASES = {
    "odd": (5, 11, 37, 2),
    "whole groups": (3, 9, 64, 3),
    "one class": (3, 1, 8, 2),
    "many units": (2, 40, 264, 1),
    "no image": (0, 3, 8, 1),
    "no class": (3, 0, 8, 1),
    "no width": (2, 3, 0, 1),
}


def draw(case, dtype, size=1.0):
    B, K, C, _ = CASES[case]
    tensors = (
        3 * torch.randn(B, K, C) + 1,
        size * (1 + 0.3 * torch.randn(C)),
        size * 0.3 * torch.randn(C),
        size * torch.randn(K, C),
        size * torch.randn(B, C),
        torch.randn(B, K),
    )
    return [t.to(dtype) for t in tensors]


def run(program, tensors, images, residual=0.5, scale=10.0, eps=1e-5):
    return program(tensors, ints=(images,), numbers=(residual, scale, eps))


def check(program, tensors, images, eps=1e-5):
    results = run(program, tensors, images, eps=eps)
    assert len(results) == (6 if tensors[0].numel() else 1)  # the launcher zeroes what is empty
    named = dict(zip(NAMES, results, strict=False))
    fixed = {"residual": 0.5, "scale": 10.0, "eps": eps}
    compare(named, ops.norm_cosine_logits, tensors[:5], tensors[5:], **fixed)


@pytest.mark.parametrize("case", CASES)
def test_block_code_matches_the_reference(program, case, dtype):
    check(program, draw(case, dtype), CASES[case][3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", [testing.spread, testing.misaligned], ids=["gaps", "misaligned"])
def test_any_strides(program, layout, dtype):
    check(program, [layout(t) for t in draw("odd", dtype)], 2)


def test_shared_rows(program):
    tensors = draw("odd", torch.float32)
    tensors[0] = tensors[0][:1].expand_as(tensors[0])
    tensors[4] = tensors[4].t().contiguous().t()
    check(program, tensors, 2)


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_rows_whose_squares_leave_the_range(program, size):
    check(program, draw("odd", torch.float32, size), 2)


def test_mean_far_from_zero_keeps_its_variance(program):
    tensors = draw("whole groups", torch.float32)
    tensors[0] += 1000.0
    check(program, tensors, 3)


def test_no_eps(program):
    check(program, draw("odd", torch.float32), 2, eps=0.0)


def test_zero_vectors_give_zero_and_no_gradient(program):
    tensors = draw("odd", torch.float32)
    tensors[4][1] = 0
    logits, d_hidden, *grads = run(program, tensors, 2)
    assert (logits[1] == 0).all()
    assert (d_hidden[1] == 0).all()
    assert (grads[-1][1] == 0).all()
    tensors = [torch.zeros_like(t) if i in (1, 2) else t for i, t in enumerate(tensors)]
    tensors[3][4] = 0  # y = 0 for class 4
    logits, *grads = run(program, tensors, 2)
    assert (logits[:, 4] == 0).all()
    assert (grads[3][4] == 0).all()
    assert all(grad.isfinite().all() for grad in grads)


def test_nan_spoils_its_row_only(program):
    tensors = draw("odd", torch.float32)
    tensors[0][2, 5, 7] = torch.nan
    logits, d_hidden, *_ = run(program, tensors, 2)
    assert logits.isnan().nonzero().tolist() == [[2, 5]]
    assert d_hidden.isnan().any(-1).nonzero().tolist() == [[2, 5]]
