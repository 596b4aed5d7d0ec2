# SPDX-License-Identifier: Apache-2.0
"""The block code of the CUDA unit_products kernels on the host, against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from block_results import compare

from vtclip import ops

# name -> (B, K, D, images of a forward block, images of a chunk)
CASES = {
    "odd": (5, 11, 37, 2, 2),
    "whole groups": (3, 9, 64, 3, 3),
    "one": (1, 1, 1, 1, 1),
    "many units": (2, 70, 136, 1, 2),
    "many texts of a block": (2, 600, 3, 2, 1),
    "most images": (65, 2, 8, 16, 64),
    "no image": (0, 3, 4, 1, 1),
    "no class": (2, 0, 4, 1, 1),
    "nothing": (0, 0, 4, 1, 1),
    "no width": (2, 3, 0, 1, 1),
}
NAMES = ("image", "text", "products", "d_image", "d_text")


def draw(case, dtype):
    B, K, D, *_ = CASES[case]
    shapes = (B, D), (K, D), (B, D), (K, D), (B, K, D)
    return [torch.randn(shape).to(dtype) for shape in shapes]


def floors(tensors, scale):
    """eps times the largest sum of |terms| in both gradients: g and xhat <g, xhat> cancel."""
    image, text, d_v, d_t, d_products = (t.double() for t in tensors)
    root, eps = math.sqrt(scale), torch.finfo(tensors[0].dtype).eps
    x, y = (torch.nn.functional.normalize(rows, dim=-1).abs() for rows in (image, text))
    to_image = d_v.abs() + root * (d_products.abs() * y).sum(1)
    to_text = d_t.abs() + root * (d_products.abs() * x[:, None]).sum(0)
    found = {}
    for name, rows, unit, grad in (("image", image, x, to_image), ("text", text, y, to_text)):
        terms = grad + unit * (grad * unit).sum(-1, keepdim=True)
        terms = terms * root / rows.norm(dim=-1, keepdim=True)
        found[f"d_{name}"] = eps * float(terms.nan_to_num().amax()) if terms.numel() else 0.0
    return found


def check(program, tensors, images=1, chunk=1, first=False, scale=3.0):
    results = program(tensors, ints=(images, chunk, first), numbers=(scale,))
    named = dict(zip(NAMES, results, strict=True))
    floor = floors(tensors, scale)
    compare(named, ops.unit_products, tensors[:2], tensors[2:], floor, scale=scale)
    return results


@pytest.mark.parametrize("first", [False, True], ids=["rows", "columns first"])
@pytest.mark.parametrize("case", CASES)
def test_block_code_matches_the_reference(program, case, dtype, first):
    check(program, draw(case, dtype), *CASES[case][3:], first)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_any_strides(program, layout, dtype):
    check(program, [layout(t) for t in draw("odd", dtype)], 2, 2)


@pytest.mark.parametrize("images", [1, 2, 5])
def test_the_split_changes_no_output_and_the_order_of_sums_only(program, images):
    tensors = draw("odd", torch.float32)
    one = check(program, tensors)
    other = check(program, tensors, images, images)
    assert all(torch.equal(*pair) for pair in zip(one[:3], other[:3], strict=True))
    assert torch.equal(one[3], other[3])


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e30, 3e38])
def test_lengths_whose_squares_leave_the_range(program, size):
    image, text, *seeds = draw("odd", torch.float32)
    image = image / image.abs().amax(dim=-1, keepdim=True)
    text = text / text.abs().amax(dim=-1, keepdim=True)
    want = program((image, text, *seeds), (2, 2, 0), (3.0,))
    found = program((image * size, text * size, *seeds), (2, 2, 0), (3.0,))
    for one, two in zip(want[:3], found[:3], strict=True):
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)
    for one, two in zip(want[3:], found[3:], strict=True):
        near = (one.double() / size).float()
        torch.testing.assert_close(two, near, rtol=1e-4, atol=1e-4 / size)


def test_a_zero_row_stays_zero_without_a_gradient(program):
    tensors = draw("odd", torch.float32)
    tensors[0][1] = 0
    tensors[1][4] = 0
    v, t, products, d_image, d_text = program(tensors, (2, 2, 0), (3.0,))
    assert (v[1] == 0).all()
    assert (t[4] == 0).all()
    assert (products[1] == 0).all()
    assert (products[:, 4] == 0).all()
    assert (d_image[1] == 0).all()
    assert (d_text[4] == 0).all()
    assert bool(d_image.isfinite().all() and d_text.isfinite().all())


def test_nan_stays_in_its_row(program):
    tensors = draw("odd", torch.float32)
    tensors[0][2, 5] = torch.nan
    tensors[1][3, 1] = torch.nan
    v, t, products, *_ = program(tensors, (2, 2, 0), (3.0,))
    assert v.isnan().any(dim=1).tolist() == [i == 2 for i in range(5)]
    assert t.isnan().any(dim=1).tolist() == [i == 3 for i in range(11)]
    there = products.isnan().any(dim=2)
    assert there[2].all()
    assert there[:, 3].all()
    assert int(there.sum()) == 11 + 5 - 1
