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
from vtclip.testing.problems import FUNCTIONS

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
IMPLS = ("triton", "cuda", "reference")
DTYPES = (torch.float32, torch.bfloat16)
B, H, K, L, d = 3, 2, 50, 49, 64
D = H * d
SIZES = {"B": B, "H": H, "K": K, "L": L, "d": d, "D": D, "C": D, "F": D}
CASES = {
    ", ".join(filter(None, (name, variant))): function
    for name, usual in FUNCTIONS.items()
    for variant, function in (("", usual), *usual.variants())
}


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
    function = CASES[name]
    call = function.outputs
    static, *inputs = (
        function.draw(SIZES, dtype=dtype, device="cuda", seed=seed) for seed in range(4)
    )
    try:
        select(Problem(function.op.name, "cuda", dtype, static[0].shape[-1]), impl)
    except NotImplementedError as refused:
        pytest.skip(str(refused))
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
    shapes = [(B, D), (B, L, D)]  # image and spatial
    if method == "rada":
        head, shapes = heads.RAda(text, num_heads=H), shapes[:1]
        torch.nn.init.normal_(head.out.weight, std=0.02)
    else:
        head = heads.VTCLIP(text, num_heads=H, init="torch")
    wanted = list(head.parameters())
    static, *inputs = (  # rows of length about 1
        [(torch.randn(shape) / D**0.25).cuda() for shape in shapes] for _ in range(4)
    )
    rounds = replayed(lambda: (head(*static),), wanted, static, inputs)
    for fresh, got in zip(inputs, rounds, strict=True):
        eager = step(lambda: (head(*fresh),), wanted)  # noqa: B023
        for actual, peer in zip(got, eager, strict=True):
            # products of cuBLAS lie between the kernels
            torch.testing.assert_close(actual, peer)


@pytest.mark.parametrize("name", CASES)
def test_the_cases_are_what_they_say(name):
    """Runs anywhere: each case has finite outputs and a gradient for every leaf."""
    function = CASES[name]
    assert function.op.name in ops.__all__
    leaves = function.draw(SIZES)
    results = step(lambda: function.outputs(*leaves, impl="reference"), leaves)
    assert all(result.isfinite().all() for result in results)
    grads = results[-len(leaves) :]
    assert [g.shape for g in grads] == [leaf.shape for leaf in leaves]
    assert all(bool(grad.any()) for grad in grads)


def test_every_public_op_is_captured():
    public = {name for name in ops.__all__ if name.islower()}
    assert {name.partition(",")[0] for name in CASES} == public
