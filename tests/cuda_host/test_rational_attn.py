# SPDX-License-Identifier: Apache-2.0
"""The block code of the CUDA rational_attn kernels on the host, against the reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from block_results import compare
from layouts import ATTENTION_LAYOUTS

from vtclip import ops, testing

KINDS = ("image", "text", "pair")
NAMES = (*KINDS, "key", "value")
SUBSETS = [kinds for n in (1, 2, 3) for kinds in itertools.combinations(KINDS, n)]

# name -> (batch of the text query, B, H, K, d); a block has 64 rows
CASES = {
    "ordinary": (1, 3, 2, 20, 32),
    "own texts": (2, 2, 2, 20, 32),
    "odd": (1, 2, 3, 17, 20),
    "two tiles": (1, 3, 1, 67, 16),
    "own texts, two tiles": (2, 2, 1, 66, 16),
    "three tiles": (1, 1, 1, 131, 8),
    "one of each": (1, 1, 1, 1, 1),
    "one class": (1, 2, 2, 1, 8),
    "one full tile": (1, 1, 1, 64, 16),
    "two chunks of columns": (1, 2, 1, 9, 131),
    "two tiles and chunks": (1, 2, 1, 65, 130),
    "widest": (1, 1, 1, 5, 256),
    "no width": (1, 2, 2, 3, 0),
}


@pytest.fixture(scope="module")
def program(build):
    """out, stats and, where parts are kept, the gradients of all five inputs, None of no query."""
    run = build("rational_attn")

    def unpacked(tensors, ints=(), numbers=()):
        out, stats, *grads = run(tensors, ints, numbers)
        if not grads:
            return out, stats
        d_image, d_text, d_pairs = grads
        of_pairs = d_pairs.unbind(2)
        return out, stats, d_image, d_text, *(None,) * (3 - len(of_pairs)), *of_pairs

    return unpacked


@pytest.fixture(scope="module")
def shared_bytes(build):
    (sizes,) = build("rational_attn")(())
    return sizes


def drawn(case, dtype, kinds=KINDS):
    text, B, H, K, d = CASES[case]
    shapes = ((B, H, 1, d), (text, H, K, d), (B, H, K, d), (B, H, K, d), (B, H, K, d))
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    return [
        tensor if name in kinds or name in NAMES[3:] else None
        for name, tensor in zip(NAMES, tensors, strict=True)
    ]


def rows_inside(heads):
    """[B, rows, H, d] as a program writes it -> [B, H, rows, d]."""
    return heads.transpose(1, 2)


def cancelling(tensors, d_out, scale):
    """Largest sum of |terms| in every gradient: dA and c cancel where a map saturates.

    A = exp2(S log2(e) - base) has the rounding of the scores, so their size counts as well.
    """
    *queries, key, value = (None if t is None else t.detach().double() for t in tensors)
    K = key.shape[2]
    share = 1 / sum(query is not None for query in queries)
    seed = d_out.double().abs() * share
    of_pair = seed @ value.abs().transpose(-1, -2)
    sizes, d_key, weight = [], torch.zeros_like(key), torch.zeros_like(of_pair)
    for kind, query in enumerate(queries):
        if query is None:
            sizes.append(0.0)
            continue
        scores = scale * query @ key.transpose(-1, -2)
        A = scores.flatten(2).softmax(-1).view(scores.shape) * (K if kind else 1)
        terms = seed.sum(2, keepdim=True) @ value.abs().transpose(-1, -2) if kind == 0 else of_pair
        c = (A * terms).sum((-1, -2), keepdim=True) / (K if kind else 1)
        step = 1 + float(scores.abs().amax())
        terms = A * (terms + c) * abs(scale) * step
        d_query = terms @ key.abs()
        sizes.append(float((d_query.sum(0) if query.shape[0] == 1 else d_query).amax()))
        d_key += terms.transpose(-1, -2) @ query.abs()
        weight = weight + A * step
    sizes += [float(d_key.amax()), float((weight.transpose(-1, -2) @ seed).amax())]
    return sizes, float((weight @ value.abs()).amax()) * share


def check(program, tensors, d_out, scale=0.4, images=1):
    out, _, *grads = program((*tensors, d_out), (1, images), (scale,))
    names = ("out", *(f"d_{name}" for name in NAMES))
    rows = (t if t is None else rows_inside(t) for t in (out, *grads))
    floors = {}
    if out.numel():
        sizes, of_out = cancelling(tensors, d_out, scale)
        eps = torch.finfo(d_out.dtype).eps
        floors = {n: eps * size for n, size in zip(names, (of_out, *sizes), strict=True)}
    results = dict(zip(names, rows, strict=True))
    compare(results, ops.rational_attn, tensors, (d_out,), floors, scale=scale)
    return out


@pytest.mark.parametrize("case", CASES)
def test_block_code_matches_the_reference(program, case, dtype):
    tensors = drawn(case, dtype)
    check(program, tensors, torch.randn(tensors[3].shape).to(dtype))


@pytest.mark.parametrize("kinds", SUBSETS, ids="-".join)
@pytest.mark.parametrize("case", ["odd", "two tiles", "one of each", "two tiles and chunks"])
def test_some_of_the_queries(program, case, kinds):
    tensors = drawn(case, torch.float32, kinds)
    check(program, tensors, torch.randn(tensors[3].shape))


@pytest.mark.parametrize("case", ["ordinary", "two tiles"])
@pytest.mark.parametrize("images", [1, 2, 3])
def test_the_text_gradient_is_summed_over_images(program, case, images, dtype):
    tensors = drawn(case, dtype, ("text",))
    check(program, tensors, torch.randn(tensors[3].shape).to(dtype), images=images)


@pytest.mark.parametrize("layout", ATTENTION_LAYOUTS)
@pytest.mark.parametrize("case", ["odd", "two tiles"])
def test_any_strides(program, case, layout):
    tensors = [ATTENTION_LAYOUTS[layout](tensor) for tensor in drawn(case, torch.float16)]
    check(program, tensors, ATTENTION_LAYOUTS[layout](torch.randn(tensors[3].shape).half()))


@pytest.mark.parametrize("scale", [-0.7, 0.0, 40.0, -40.0])
@pytest.mark.parametrize("case", ["odd", "two tiles"])
def test_scales(program, case, dtype, scale):
    tensors = drawn(case, dtype)
    check(program, tensors, torch.randn(tensors[3].shape).to(dtype), scale)


@pytest.mark.parametrize("case", ["odd", "two tiles"])
@pytest.mark.parametrize("kinds", SUBSETS, ids="-".join)
def test_saved_statistics(program, case, kinds):
    """base = max(S) log2(e) and the sum of powers of two over it; 0 for what is absent."""
    tensors = drawn(case, torch.float32, kinds)
    _, stats, *_ = program((*tensors, tensors[3]), (1, 1), (0.4,))
    for kind, query in enumerate(tensors[:3]):
        if query is None:
            assert (stats[kind] == 0).all()
            continue
        scores = (0.4 * query.double() @ tensors[3].double().transpose(-1, -2)).flatten(2)
        scores = scores.expand(tensors[3].shape[0], -1, -1) * 1.4426950408889634
        base, total = stats[kind].double()
        eps = 8 * torch.finfo(torch.float32).eps
        torch.testing.assert_close(base, scores.amax(-1), rtol=eps, atol=eps)
        wanted = (scores - scores.amax(-1, keepdim=True)).exp2().sum(-1)
        torch.testing.assert_close(total, wanted, rtol=8 * eps, atol=0)


@pytest.mark.parametrize("case", ["odd", "two tiles", "three tiles"])
def test_out_is_the_same_without_parts(program, case, dtype):
    tensors = drawn(case, dtype)
    kept, stats, *_ = program((*tensors, tensors[3]), (1, 1), (0.4,))
    out, other, *rest = program((*tensors, tensors[3]), (0, 1), (0.4,))
    assert torch.equal(out, kept)
    assert torch.equal(other, stats)
    assert not rest


@pytest.mark.parametrize("case", ["odd", "two tiles"])
def test_nan_spoils_its_image_and_head_only(program, case):
    tensors = drawn(case, torch.float32)
    d_out = torch.randn(tensors[3].shape)
    clean = program((*tensors, d_out), (1, 1), (0.4,))
    b, h = tensors[3].shape[0] - 1, tensors[3].shape[1] - 1
    for spoiled in (0, 2, 3, 4):
        with_nan = [tensor.clone() for tensor in tensors]
        with_nan[spoiled][b, h, -1, :] = float("nan")
        results = program((*with_nan, d_out), (1, 1), (0.4,))
        assert results[0][b, :, h].isnan().all()
        for i in (0, 2, 4, 5, 6):  # out and all gradients but the shared text's
            spots = torch.ones(clean[i].shape, dtype=torch.bool)
            spots[b, :, h] = False
            assert torch.equal(results[i][spots], clean[i][spots])


@pytest.mark.parametrize("case", ["odd", "two tiles"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_infinite_scores(program, case, dtype):
    """A class whose scores are -inf weighs 0, in every row and in the image's."""
    tensors = drawn(case, dtype)
    for query in tensors[:3]:
        query[..., 0] = 1
    tensors[3][:, :, 2] = 0
    tensors[3][:, :, 2, 0] = -torch.inf
    d_out = torch.randn(tensors[3].shape).to(dtype)
    out, *_ = program((*tensors, d_out), (1, 1), (0.4,))
    oracle = ops.rational_attn(*(t.double() for t in tensors), scale=0.4, impl="reference")
    peer = ops.rational_attn(*tensors, scale=0.4, impl="reference")
    assert oracle.isfinite().all()
    tensors[3][:, :, 2] = 0
    _, terms = cancelling(tensors, d_out, 0.4)
    floor = torch.finfo(dtype).eps * terms
    testing.assert_within_budget(rows_inside(out), oracle, peer, floor=floor)


@pytest.mark.parametrize("K", [20, 70])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_values_near_the_largest_do_not_overflow(program, dtype, K):
    value = torch.full((1, 1, K, 8), 6e4).to(dtype)
    query, key = torch.zeros(1, 1, K, 8).to(dtype), torch.randn(1, 1, K, 8).to(dtype)
    out, *_ = program((None, query, None, key, value, key), (1, 1), (1.0,))
    assert (out == value[0, 0, 0, 0]).all()


def test_every_block_fits_into_64_kibibytes(shared_bytes):
    assert shared_bytes.min() > 0
    assert shared_bytes.max() <= 64 * 1024
