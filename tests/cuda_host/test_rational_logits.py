# SPDX-License-Identifier: Apache-2.0
"""The block code of the CUDA rational_logits kernels on the host, against the reference."""

from __future__ import annotations

import pytest
import torch
from block_results import compare

from vtclip import ops

# name -> (B, K, D, images per chunk)
CASES = {
    "odd": (5, 11, 37, 2),
    "whole groups": (3, 9, 64, 3),
    "one": (1, 1, 1, 1),
    "many units": (2, 70, 136, 2),
    "no image": (0, 3, 4, 1),
    "no class": (2, 0, 4, 1),
    "no width": (2, 3, 0, 1),
}


def draw(case, dtype):
    B, K, D, _ = CASES[case]
    shapes = (B, D), (K, D), (B, K, D), (B, K)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def check(program, tensors, images):
    results = program(tensors, ints=(images,), numbers=(3.0,))
    assert len(results) == (4 if tensors[2].numel() else 1)  # the launcher zeroes what is empty
    named = dict(zip(("logits", "d_image", "d_text", "d_mask"), results, strict=False))
    compare(named, ops.rational_logits, tensors[:3], tensors[3:], scale=3.0)


@pytest.mark.parametrize("case", CASES)
def test_block_code_matches_the_reference(program, case, dtype):
    check(program, draw(case, dtype), CASES[case][3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_any_strides(program, layout, dtype):
    check(program, [layout(t) for t in draw("odd", dtype)], 2)


def test_a_closed_element_has_no_slope(program):
    image, text, mask, d_logits = draw("odd", torch.float32)
    mask[..., ::2] = -1.0
    results = program((image, text, mask, d_logits), ints=(2,), numbers=(1.0,))
    assert (results[3][..., ::2] == 0).all()
    check(program, [image, text, mask, d_logits], 2)


def test_nan_spoils_its_row_only(program):
    image, text, mask, d_logits = draw("odd", torch.float32)
    mask[2, 5, 7] = torch.nan
    logits, d_image, d_text, d_mask = program(
        (image, text, mask, d_logits), ints=(2,), numbers=(1.0,)
    )
    assert logits.isnan().nonzero().tolist() == [[2, 5]]
    assert d_image.isnan().nonzero().tolist() == [[2, 7]]
    assert d_text.isnan().nonzero().tolist() == [[5, 7]]
    assert not d_mask.isnan().any()
