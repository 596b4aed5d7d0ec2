# SPDX-License-Identifier: Apache-2.0
"""The block code of the CUDA cosine_logits kernels on the host, against the reference."""

from __future__ import annotations

import pytest
import torch
from block_results import compare

from vtclip import ops, testing
from vtclip.reference._dtypes import acc_dtype

# name -> (B, K, D, rows of a range of the backward's sums, 0 for the launcher's)
CASES = {
    "odd": (3, 5, 17, 0),
    "one": (1, 1, 1, 0),
    "wider than a step": (2, 3, 301, 0),
    "whole vectors": (33, 40, 72, 0),
    "several tiles": (70, 67, 21, 0),
    "several ranges": (70, 67, 65, 32),
    "ranges of odd rows": (11, 50, 8, 7),
    "one image": (1, 9, 520, 0),
    "no image": (0, 3, 4, 0),
    "no class": (2, 0, 4, 0),
    "no width": (2, 3, 0, 0),
}
# the largest entries of float16 are not larger
SIZES = {torch.float16: (1e-6, 1e4)}
OTHER_SIZES = (1e-30, 1e30)

per_image = pytest.mark.parametrize("per_image", [False, True], ids=["shared", "per-image"])


def rnorms(vectors):
    """1 / |vector| in at least float32, 0 for a zero vector."""
    norm = vectors.detach().double().norm(dim=-1)
    rnorm = norm.reciprocal().masked_fill(norm == 0, 0.0)
    return rnorm if vectors.dtype == torch.float64 else rnorm.float()


def draw(case, per_image, dtype):
    B, K, D, rows = CASES[case]
    text = torch.randn((B, K, D) if per_image else (K, D)).to(dtype)
    return torch.randn(B, D).to(dtype), text, torch.randn(B, K).to(dtype), rows


def run(program, image, text, d_logits, rows=0, scale=3.0):
    """{name: result}; of shared texts the logits by large and by small tiles."""
    results = program((image, text, d_logits), ints=(rows,), numbers=(scale,))
    names = ["logits", "image_rnorm", "text_rnorm"]
    if image.numel() * text.numel():
        names += ["d_image", "d_text"]  # the launcher zeroes what is empty
    if text.dim() == 2:
        names += ["logits by small tiles"]
    return dict(zip(names, results, strict=True))


def check(program, image, text, d_logits, rows=0, cancels=False):
    results = run(program, image, text, d_logits, rows)
    # a step of the sum of |terms|: a peer may be exact in nine numbers by luck
    lengths = [torch.nn.functional.normalize(t.double(), dim=-1).abs() for t in (image, text)]
    terms = (lengths[0][:, None] * lengths[1]).sum(-1)
    step = torch.finfo(acc_dtype(image.dtype)).eps
    floors = {"logits": 3 * step * terms.max().item() if terms.numel() else 0.0}
    for name, vectors, axis in (("image", image, 1), ("text", text, 0)):
        rnorm = rnorms(vectors)
        torch.testing.assert_close(results.pop(f"{name}_rnorm"), rnorm, rtol=1e-6, atol=0)
        if cancels:  # 3 |g| / |x|, of which little is left
            taken_off = 3 * d_logits.double().abs().sum(axis) * rnorm
            floors[f"d_{name}"] = step * taken_off.max().item()
    by_small_tiles = results.pop("logits by small tiles", None)
    problem = ops.cosine_logits, (image, text), (d_logits,), floors
    compare(results, *problem, scale=3.0)
    if by_small_tiles is not None:
        compare({"logits": by_small_tiles}, *problem, scale=3.0)


@per_image
@pytest.mark.parametrize("case", CASES)
def test_block_code_matches_the_reference(program, case, per_image, dtype):
    image, text, d_logits, rows = draw(case, per_image, dtype)
    if len(image) > 1:
        image[0] = 0
    check(program, image, text, d_logits, rows)


@per_image
@pytest.mark.parametrize("large", [False, True], ids=["tiny", "huge"])
def test_vectors_whose_squares_leave_the_range(program, large, per_image, dtype):
    B, K, D = 3, 7, 33
    size = SIZES.get(dtype, OTHER_SIZES)[large]
    image = (size * torch.randn(B, D)).to(dtype)
    text = (size * torch.randn((B, K, D) if per_image else (K, D))).to(dtype)
    # gradients as large as 1 / size would overflow
    d_logits = (min(size, 1.0) * torch.randn(B, K)).to(dtype)
    check(program, image, text, d_logits)


@per_image
def test_extreme_rows_among_others(program, per_image):
    image, text, d_logits, _ = draw("odd", per_image, torch.float32)
    image *= torch.tensor([1e30, 1.0, 1e-20])[:, None]
    text *= torch.tensor([1.0, 1e-18, 1e11, 1e30, 1e-11])[:, None]
    results = run(program, image, text, d_logits)
    wide = ops.cosine_logits(image.double(), text.double(), scale=3.0, impl="reference")
    for name in ("logits", "logits by small tiles")[: 2 - per_image]:
        torch.testing.assert_close(results[name].double(), wide, rtol=1e-5, atol=1e-6)


@per_image
def test_norms_beyond_the_range_of_their_type(program, per_image):
    image, text, d_logits, _ = draw("odd", per_image, torch.float32)
    image[:], text[:] = 3e38, 3e38
    logits = run(program, image, text, d_logits, scale=1.0)["logits"]
    # the reciprocal is below the smallest normal number: it has 17 bits left
    torch.testing.assert_close(logits, torch.ones(3, 5), rtol=1e-4, atol=0)
    image[:], text[:] = 1e-40, 1e-40
    logits = run(program, image, text, d_logits, scale=1.0)["logits"]
    # it is above the largest number, which takes its place
    assert (logits > 0).all()
    assert (logits < 1).all()


@per_image
def test_nan_and_infinity_stay_in_their_row(program, per_image, dtype):
    image, text, d_logits, _ = draw("whole vectors", per_image, dtype)
    image[1, 3] = float("nan")
    image[32, 71] = float("inf")
    text[..., 39, 0] = float("-inf")
    results = run(program, image, text, d_logits)
    wide = ops.cosine_logits(image.double(), text.double(), scale=3.0, impl="reference")
    expected = wide.isnan()
    assert expected.any()
    assert not expected.all()
    for name in ("logits", "logits by small tiles")[: 2 - per_image]:
        assert torch.equal(results[name].isnan(), expected)
        assert results[name][~expected].isfinite().all()


@per_image
def test_zero_vectors_have_no_gradient(program, per_image, dtype):
    image, text, d_logits, _ = draw("several tiles", per_image, dtype)
    image[2] = 0
    text[..., 66, :] = 0
    results = run(program, image, text, d_logits)
    assert (results["logits"][2] == 0).all()
    assert (results["logits"][:, 66] == 0).all()
    assert (results["d_image"][2] == 0).all()
    assert (results["d_text"][..., 66, :] == 0).all()
    assert (results["image_rnorm"] == 0).sum() == 1


def test_gradients_as_small_as_float16_has(program, dtype):
    image, text, d_logits, _ = draw("several tiles", False, dtype)
    check(program, image, text, (1e-5 * d_logits.double()).to(dtype))


@pytest.mark.parametrize("case", ["several tiles", "several ranges", "one image"])
def test_rows_that_are_nearly_alike(program, case, dtype):
    """Most of each sum is along the row and subtracted again."""
    image, text, d_logits, rows = draw(case, False, dtype)
    one = torch.randn(image.shape[1])
    near = [(one + 0.05 * t.float()).to(dtype) for t in (image, text)]
    check(program, *near, d_logits.abs(), rows, cancels=True)


@per_image
def test_any_strides(program, per_image, dtype):
    B, K, D = 3, 4, 24
    image = torch.randn(B, D).to(dtype)
    text = torch.randn((B, K, D) if per_image else (K, D)).to(dtype)
    d_logits = torch.randn(K, B).to(dtype).t()
    for layout in (testing.spread, testing.misaligned):
        check(program, layout(image), layout(text), layout(d_logits))
    check(program, image.t().contiguous().t(), text.mT.contiguous().mT, d_logits)
    padded = [torch.nn.functional.pad(t, (0, 8))[..., :23] for t in (image, text)]
    check(program, *padded, d_logits)
    one = torch.randn(1, 1).to(dtype).expand(B, K)
    check(program, image[:1].expand(B, D).detach(), text.detach(), one)
