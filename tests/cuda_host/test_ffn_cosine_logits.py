# SPDX-License-Identifier: Apache-2.0
"""The block code of the CUDA ffn_cosine_logits kernels on the host, against the reference."""

from __future__ import annotations

import ffn_tail
import pytest
import torch
import torch.nn.functional as F
from block_results import compare
from ffn_tail import NAMES

from vtclip import ops
from vtclip.reference._dtypes import acc_dtype

# name -> (B, K, C, F), images per chunk
CASES = {
    "odd": ((5, 11, 37, 29), 2),
    "whole groups": ((3, 9, 64, 96), 3),
    "one class": ((3, 1, 8, 16), 2),
    "one image": ((1, 3, 5, 1), 1),
    "many units": ((2, 40, 264, 33), 1),
    "no hidden unit": ((2, 3, 8, 0), 1),
    "no image": ((0, 3, 8, 16), 1),
}


def draw(case, dtype):
    (B, K, C, width), _ = CASES[case]
    tensors = [*ffn_tail.draw(B, K, C, width), torch.randn(B, K)]
    return [t.to(dtype) for t in tensors]


def run(program, tensors, images, features=True, eps=1e-5):
    return program(tensors, ints=(images, features), numbers=(0.5, 10.0, eps))


def centred(weight):
    wide = weight.to(acc_dtype(weight.dtype))
    return (wide - wide.mean(0)).to(weight.dtype)


def check(program, tensors, images, eps=1e-5):
    logits, _, d_bias, d_z, *others = run(program, tensors, images, eps=eps)
    rows = d_z.flatten(0, 1)
    d_hidden, d_weight = d_z @ centred(tensors[1]), rows.T @ tensors[0].flatten(0, 1)
    grads = d_hidden, d_weight, d_bias, d_z, *others
    step = torch.finfo(tensors[0].dtype).eps
    largest = ffn_tail.largest_terms([t.double() for t in tensors[:8]], 0.5, 10.0)
    results = {f"d_{name}": grad for name, grad in zip(NAMES, grads, strict=True)}
    compare(
        {"logits": logits, **results},
        ops.ffn_cosine_logits,
        tensors[:8],
        tensors[8:],
        {"logits": step * largest},
        residual=0.5,
        scale=10.0,
        eps=eps,
    )


@pytest.mark.parametrize("case", CASES)
def test_block_code_matches_the_reference(program, case, dtype):
    check(program, draw(case, dtype), CASES[case][1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_any_strides(program, layout, dtype):
    check(program, [layout(t) for t in draw("odd", dtype)], 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("where", ["residual_input", "bias", "weight"])
def test_mean_far_from_zero_keeps_its_variance(program, where, dtype):
    """mean / std = 1000: sums of squares around 0 would lose a quarter of the variance."""
    tensors = draw("whole groups", torch.float32)
    tensors[NAMES.index(where)] += 30.0 if where == "weight" else 1000.0
    z = tensors[3] + tensors[0] @ tensors[1].T + tensors[2]
    assert (z.mean(-1) / z.std(-1)).min() > 400
    check(program, [t.to(dtype) for t in tensors], 3)


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_rows_whose_squares_leave_the_range(program, size):
    tensors = draw("odd", torch.float32)
    check(program, tensors[:4] + [size * t for t in tensors[4:8]] + tensors[8:], 2)


def test_no_eps(program):
    check(program, draw("odd", torch.float32), 2, eps=0.0)


def test_one_column_leaves_signs_and_no_gradient(program, dtype):
    """Nothing but rounding in the accumulation's dtype may be left of a gradient."""
    shapes = (2, 3, 4), (1, 4), (1,), (2, 3, 1), (1,), (1,), (3, 1), (2, 1), (2, 3)
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    logits, _, *grads = run(program, tensors, 1)
    norm_weight, norm_bias, text, image, seed = (t.double() for t in tensors[4:])
    y = text + 0.5 * norm_bias
    signs = (image * y.T).sign()
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(logits.double(), 10.0 * signs, rtol=step, atol=0.0)
    # rstd = eps^(-1/2) multiplies what is left in d_z; d_y and that of |image| lack it
    largest = 10.0 * seed.abs() / torch.minimum(y.abs().T, image.abs())
    largest *= 1 + 0.5 * norm_weight.abs() * 1e-5**-0.5
    step = torch.finfo(acc_dtype(dtype)).eps
    for grad in grads:
        assert grad.abs().max() <= 2 * step * largest.sum()


def test_statistics_of_rows(program):
    tensors = draw("odd", torch.float64)
    hidden, weight, bias, x, norm_weight, norm_bias, text, image, _ = tensors
    z = x + hidden @ weight.T + bias
    variance, mean = torch.var_mean(z, -1, correction=0)
    rstd = (variance + 1e-5).rsqrt()
    zh = (z - mean[..., None]) * rstd[..., None]
    y = text + 0.5 * (norm_weight * zh + norm_bias)
    v = F.normalize(image, dim=-1)[:, None]
    cosine = F.cosine_similarity(v, y, dim=-1)
    g = 0.5 * norm_weight * (v - cosine[..., None] * F.normalize(y, dim=-1))
    wanted = rstd, 1 / y.norm(dim=-1), cosine, g.mean(-1), (g * zh).mean(-1)
    stats = run(program, tensors, 2)[1]
    # of the rows that the kernel norms, whose product has mean 0
    kept = (x + bias).mean(-1)
    torch.testing.assert_close(stats[0] + stats[1], kept, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(stats[2:], torch.stack(wanted), rtol=1e-12, atol=1e-13)


def test_gradients_of_the_features_are_made_only_when_asked_for(program):
    tensors = draw("odd", torch.float32)
    every = run(program, tensors, 2)
    some = run(program, tensors, 2, features=False)
    assert all(torch.equal(a, b) for a, b in zip(every[:6], some[:6], strict=True))
    assert some[6].numel() == some[7].numel() == 0


def test_zero_vectors_give_zero_and_no_gradient(program):
    tensors = draw("odd", torch.float32)
    tensors[7][1] = 0
    logits, _, _, d_z, *_, d_image = run(program, tensors, 2)
    assert (logits[1] == 0).all()
    assert (d_z[1] == 0).all()
    assert (d_image[1] == 0).all()
    tensors = [torch.zeros_like(t) if i in (4, 5) else t for i, t in enumerate(tensors)]
    tensors[6][4] = 0  # y = 0 for class 4
    logits, _, *grads = run(program, tensors, 2)
    assert (logits[:, 4] == 0).all()
    assert (grads[-2][4] == 0).all()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("name", ["hidden", "residual_input"])
def test_nan_spoils_its_row_only(program, name):
    tensors = draw("odd", torch.float32)
    tensors[NAMES.index(name)][2, 5, 7] = torch.nan
    logits, _, _, d_z, *_ = run(program, tensors, 2)
    assert logits.isnan().nonzero().tolist() == [[2, 5]]
    assert d_z.isnan().any(-1).nonzero().tolist() == [[2, 5]]
