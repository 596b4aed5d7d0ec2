# SPDX-License-Identifier: Apache-2.0
"""Every public op and both heads in a CUDA graph, forward and backward.

A graph is captured once and replayed with other inputs copied into place; the results are those of
eager calls on these inputs, bit by bit where kernels of this package run.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vtclip import heads, ops
from vtclip.ops._select import Problem, select
from vtclip.testing import GRADIENT_FACTOR, assert_within_budget

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
IMPLS = ("triton", "cuda", "reference")
DTYPES = (torch.float32, torch.bfloat16)
B, H, K, L, d = 3, 2, 50, 49, 64
D = H * d
QUERY, KEY, PAIR, ONE = (1, H, K, d), (B, H, L, d), (B, H, K, d), (B, H, 1, d)
PACKED = (B, K, 3, H, d)
IMAGE, TEXT, ROWS, SQUARE, VECTOR = (B, D), (K, D), (B, K, D), (D, D), (D,)

Call = Callable[..., tuple[Tensor, ...]]
# name: (op whose support counts, shapes of the leaves, the call)
CASES: dict[str, tuple[str, tuple[tuple[int, ...], ...], Call]] = {
    "cross_attn": (
        "cross_attn",
        (QUERY, KEY, KEY),
        lambda *t, impl: (ops.cross_attn(*t, impl=impl),),
    ),
    "cross_attn_lse": (
        "cross_attn",
        (PAIR, KEY, KEY),
        lambda *t, impl: tuple(ops.cross_attn_lse(*t, impl=impl)),
    ),
    "cross_attn_weights": (
        "cross_attn_weights",
        (QUERY, KEY),
        lambda *t, impl: (ops.cross_attn_weights(*t, impl=impl),),
    ),
    "cosine_logits": (
        "cosine_logits",
        (IMAGE, TEXT),
        lambda *t, impl: (ops.cosine_logits(*t, scale=100.0, impl=impl),),
    ),
    "cosine_logits, paired": (
        "cosine_logits",
        (IMAGE, ROWS),
        lambda *t, impl: (ops.cosine_logits(*t, scale=100.0, impl=impl),),
    ),
    "norm_cosine_logits": (
        "norm_cosine_logits",
        (ROWS, VECTOR, VECTOR, TEXT, IMAGE),
        lambda *t, impl: (ops.norm_cosine_logits(*t, scale=100.0, impl=impl),),
    ),
    "ffn_cosine_logits": (
        "ffn_cosine_logits",
        (ROWS, SQUARE, VECTOR, ROWS, VECTOR, VECTOR, TEXT, IMAGE),
        lambda *t, impl: (ops.ffn_cosine_logits(*t, scale=100.0, impl=impl),),
    ),
    "rational_attn": (
        "rational_attn",
        (ONE, QUERY, PAIR, PAIR, PAIR),
        lambda *t, impl: (ops.rational_attn(*t, impl=impl),),
    ),
    "rational_attn_packed": (
        "rational_attn",
        (ONE, QUERY, PACKED),
        lambda *t, impl: (ops.rational_attn_packed(*t, impl=impl),),
    ),
    "unit_products": (
        "unit_products",
        (IMAGE, TEXT),
        lambda *t, impl: tuple(ops.unit_products(*t, scale=100.0, impl=impl)),
    ),
    "rational_logits": (
        "rational_logits",
        (IMAGE, TEXT, ROWS),
        lambda *t, impl: (ops.rational_logits(*t, impl=impl),),
    ),
    **{
        f"rational_head, {penalty}": (
            "rational_head",
            (ROWS, SQUARE, VECTOR, IMAGE, TEXT),
            lambda *t, impl, penalty=penalty: tuple(
                ops.rational_head(*t, penalty=penalty, impl=impl)
            ),
        )
        for penalty in ("none", "l1", "mse", "linf")
    },
}


def drawn(shapes: tuple[tuple[int, ...], ...], device: str, dtype: torch.dtype) -> list[Tensor]:
    """Rows of length about 1, so that no score saturates a softmax."""
    return [(torch.randn(s) / s[-1] ** 0.25).to(device, dtype).requires_grad_() for s in shapes]


def step(call: Callable[[], tuple[Tensor, ...]], wanted: list[Tensor]) -> list[Tensor]:
    """Outputs, and gradients of `wanted` for output gradients that are not all alike."""
    outputs = call()
    grads = [torch.cos(out.detach().float()).to(out.dtype) for out in outputs]
    kept = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if out.requires_grad]
    found = torch.autograd.grad([o for o, _ in kept], wanted, [g for _, g in kept])
    return [*(out.detach() for out in outputs), *found]


def replayed(
    call: Callable[[], tuple[Tensor, ...]],
    wanted: list[Tensor],
    static: list[Tensor],
    inputs: list[list[Tensor]],
) -> list[list[Tensor]]:
    """Results of one captured step for each list of `inputs`, which are copied into `static`."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, and fills cuBLAS's workspaces
            step(call, wanted)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(call, wanted)
    rounds = []
    for fresh in inputs:
        with torch.no_grad():
            for place, tensor in zip(static, fresh, strict=True):
                place.copy_(tensor)
        for result in results:  # what a replay does not write must not pass
            result.fill_(float("nan"))
        graph.replay()
        rounds.append([result.clone() for result in results])
    return rounds


@pytest.mark.needs_cuda
@on_gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CASES)
def test_replay_is_eager(name, impl, dtype):
    op, shapes, call = CASES[name]
    try:
        select(Problem(op, "cuda", dtype, shapes[0][-1]), impl)
    except NotImplementedError as refused:
        pytest.skip(str(refused))
    static = drawn(shapes, "cuda", dtype)
    inputs = [drawn(shapes, "cuda", dtype) for _ in range(3)]
    rounds = replayed(lambda: call(*static, impl=impl), static, static, inputs)
    for leaves, got in zip(inputs, rounds, strict=True):
        eager = step(lambda: call(*leaves, impl=impl), leaves)  # noqa: B023
        if impl != "reference":
            assert all(torch.equal(a, b) for a, b in zip(got, eager, strict=True))
            continue
        wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
        oracle = step(lambda: call(*wide, impl=impl), wide)  # noqa: B023
        for actual, exact, peer in zip(got, oracle, eager, strict=True):
            # cuBLAS may choose another algorithm while a graph is captured
            assert_within_budget(actual, exact.double(), peer, factor=GRADIENT_FACTOR, name=name)


@pytest.mark.needs_cuda
@on_gpu
@pytest.mark.parametrize("method", ["rada", "vtclip"])
def test_a_head_in_a_graph(method):
    text = F.normalize(torch.randn(K, D), dim=-1).cuda()
    image, spatial = (B, D), (B, L, D)
    if method == "rada":
        head, shapes = heads.RAda(text, num_heads=H), (image,)
        torch.nn.init.normal_(head.out.weight, std=0.02)
    else:
        head, shapes = heads.VTCLIP(text, num_heads=H, init="torch"), (image, spatial)
    wanted = list(head.parameters())
    static = [tensor.detach() for tensor in drawn(shapes, "cuda", torch.float32)]
    inputs = [[t.detach() for t in drawn(shapes, "cuda", torch.float32)] for _ in range(3)]
    rounds = replayed(lambda: (head(*static),), wanted, static, inputs)
    for fresh, got in zip(inputs, rounds, strict=True):
        eager = step(lambda: (head(*fresh),), wanted)  # noqa: B023
        for actual, peer in zip(got, eager, strict=True):
            # products of cuBLAS lie between the kernels
            torch.testing.assert_close(actual, peer)


@pytest.mark.parametrize("name", CASES)
def test_the_cases_are_what_they_say(name):
    """Runs anywhere: each case has finite outputs and a gradient for every leaf."""
    op, shapes, call = CASES[name]
    assert name.startswith(op)
    assert op in ops.__all__
    leaves = drawn(shapes, "cpu", torch.float32)
    results = step(lambda: call(*leaves, impl="reference"), leaves)
    assert all(result.isfinite().all() for result in results)
    assert [tuple(g.shape) for g in results[-len(shapes) :]] == list(shapes)
    assert sum(bool(grad.any()) for grad in results[-len(shapes) :]) == len(shapes)


def test_every_public_op_is_captured():
    public = {name for name in ops.__all__ if name.islower()}
    assert {name.partition(",")[0] for name in CASES} == public
