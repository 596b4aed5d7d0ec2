# SPDX-License-Identifier: Apache-2.0
"""Every operator on a device: sizes of real use, repeats, streams, devices, offsets, memory."""

from __future__ import annotations

import gc

import pytest
import torch

pytestmark = pytest.mark.needs_cuda

REPEATS = 250
# several tiles in every dimension, none of them full
ODD = {"B": 9, "K": 70, "L": 131, "H": 2, "d": 72, "C": 200}
REAL = {"B": 4, "K": 1000, "L": 196, "H": 8, "d": 64, "C": 512}
SMALL = {"B": 5, "K": 33, "L": 49, "H": 2, "d": 64, "C": 128}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(params=["bfloat16", "float16", "float32", "float32-tf32"])
def dtype(request):
    """Dtypes of device kernels; float32 a second time with TF32 allowed."""
    before = torch.backends.cuda.matmul.fp32_precision
    tf32 = request.param.endswith("tf32")
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    yield DTYPES[request.param.removesuffix("-tf32")]
    torch.backends.cuda.matmul.fp32_precision = before


def same(first, other) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("width", [64, 128, 256])
def test_real_sizes(call, dtype, width):
    leaves = call.draw(dtype, {**REAL, "d": width})
    call.within_budget(call.run(leaves), leaves)


def test_repeats_are_bitwise_equal(call, dtype):
    leaves = call.draw(dtype, ODD)
    first = call.run(leaves)
    for i in range(REPEATS if call.device.type == "cuda" else 2):
        # memory handed out again holds something else each time
        junk = [torch.full_like(tensor, float(i)) for tensor in first for _ in range(1 + i % 3)]
        del junk
        assert same(call.run(leaves), first), f"repeat {i}"


@on_cuda
def test_side_stream_waits_for_its_own_inputs(call):
    ready = call.draw(sizes=SMALL)
    expected = call.run(ready)
    late = [torch.zeros_like(leaf).requires_grad_() for leaf in ready]
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # cycles; what runs on another stream reads zeros
        with torch.no_grad():
            for leaf, value in zip(late, ready, strict=True):
                leaf.copy_(value)
        found = call.run(late)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    assert same(found, expected)


@on_cuda
def test_second_device_while_the_first_is_current(call):
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device only")
    call.device = torch.device("cuda", 1)
    leaves = call.draw(sizes=SMALL)
    assert torch.cuda.current_device() == 0
    found = call.run(leaves)
    assert {tensor.device.index for tensor in found} == {1}
    call.within_budget(found, leaves)


def test_offsets_above_two_to_the_31(call, need_memory):
    """Each argument in turn, its last row more than 2^31 elements behind its first."""
    need_memory(6.0)
    leaves = call.draw(torch.bfloat16, SMALL)
    holder = torch.empty(2**31 + 2**22, dtype=torch.bfloat16, device=call.device)
    seen = 0
    for i, leaf in enumerate(leaves):
        axis = next((a for a, size in enumerate(leaf.shape[:-1]) if size > 1), None)
        if axis is None:
            continue
        strides = list(leaf.detach().contiguous().stride())
        strides[axis] = -(-(2**31) // (leaf.shape[axis] - 1)) + 8
        dense = [size for a, size in enumerate(leaf.shape) if a != axis]
        assert torch.Size(dense).numel() < strides[axis]
        far = holder.as_strided(leaf.shape, strides)
        far.copy_(leaf.detach())
        moved = [far.detach().requires_grad_() if j == i else x for j, x in enumerate(leaves)]
        call.within_budget(call.run(moved), leaves, f", argument {i}")
        seen += 1
    assert seen


def test_outputs_above_two_to_the_31_elements(device, impl, need_memory):
    """Real memory: the last image of a result that 32 bits cannot count."""
    from vtclip import ops
    from vtclip.testing import FORWARD_FACTOR, GRADIENT_FACTOR, assert_within_budget

    need_memory(20.0)
    H, K, L, d = 8, 1000, 16, 64
    B = 2**31 // (H * K * d) + 2
    shapes = ((1, H, K, d), (B, H, L, d), (B, H, L, d))
    leaves = [torch.randn(s, device=device, dtype=torch.bfloat16).requires_grad_() for s in shapes]
    try:
        out = ops.cross_attn(*leaves, impl=impl)
    except NotImplementedError as refused:
        pytest.skip(str(refused))
    assert out.numel() > 2**31
    found = [out[-1:].detach(), *torch.autograd.grad(out, leaves[1:], torch.ones_like(out))]
    found[1:] = [grad[-1:] for grad in found[1:]]
    last = [leaves[0].detach(), leaves[1][-1:].detach(), leaves[2][-1:].detach()]
    results = []
    for dtype in (torch.float64, torch.bfloat16):
        own = [tensor.to(dtype).requires_grad_() for tensor in last]
        one = ops.cross_attn(*own, impl="reference")
        grads = torch.autograd.grad(one, own[1:], torch.ones_like(one))
        results.append([one.detach(), *grads])
    for i, (actual, oracle, peer) in enumerate(zip(found, *results, strict=True)):
        factor = GRADIENT_FACTOR if i else FORWARD_FACTOR
        assert_within_budget(actual, oracle, peer, factor=factor, name=f"part {i}")


@on_cuda
def test_repeated_calls_hold_no_memory(call):
    leaves = call.draw(sizes=SMALL)
    gc.collect()
    gc.disable()  # a cycle through a graph would hold its tensors
    try:
        for _ in range(3):
            call.run(leaves)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        for _ in range(100):
            call.run(leaves)
        assert torch.cuda.memory_allocated() == before
    finally:
        gc.enable()


@on_cuda
def test_gradient_of_a_shared_query_needs_no_memory_of_the_batch(device, impl):
    from vtclip import ops

    B, H, K, L, d = 64, 8, 500, 49, 64
    shapes = ((1, H, K, d), (B, H, L, d), (B, H, L, d))
    leaves = [torch.randn(s, device=device, dtype=torch.bfloat16).requires_grad_() for s in shapes]
    try:
        out = ops.cross_attn(*leaves, impl=impl)
    except NotImplementedError as refused:
        pytest.skip(str(refused))
    grad = torch.ones_like(out)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = torch.autograd.grad(out, leaves, grad)
    torch.cuda.synchronize()
    assert grads[0].shape == leaves[0].shape
    expanded = out.numel() * out.element_size()
    assert torch.cuda.max_memory_allocated() - before < expanded


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_is_the_cast_call(call, low):
    leaves = call.draw(sizes=SMALL)
    cast = [leaf.detach().to(low) for leaf in leaves]
    expected = call.op(*cast, impl=call.impl)
    with torch.autocast(call.device.type, low):
        out = call.op(*leaves, impl=call.impl)
    assert out.dtype == expected.dtype
    assert torch.equal(out, expected)
    grads = torch.autograd.grad(out.float().sum(), leaves)
    assert all(grad.dtype == torch.float32 and grad.isfinite().all() for grad in grads)


def test_compiled_whole(call):
    torch.compiler.reset()
    leaves = call.draw(sizes=SMALL)

    def loss(*tensors):
        return call.op(*tensors, impl=call.impl).square().sum()

    backend = "inductor" if call.device.type == "cuda" else "aot_eager"
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=backend)
    found = torch.autograd.grad(compiled(*leaves), leaves)
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


PRODUCTS = ("cross_attn", "cross_attn_weights", "rational_attn", "rational_head")


@on_cuda
@pytest.mark.parametrize("name", PRODUCTS)
def test_tf32_switch_is_followed(call, device):
    if call.impl != "triton":
        pytest.skip(f"{call.impl}: float32 products are exact at either setting")
    if torch.cuda.get_device_capability(device) < (8, 0):
        pytest.skip("this device has no TF32")
    leaves = call.draw(sizes=SMALL)
    oracle = call.op(*(leaf.detach().double() for leaf in leaves), impl="reference")
    errors = []
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = precision
            call.within_budget(call.run(leaves), leaves, f" with {precision}")
            error = call.op(*leaves, impl=call.impl).detach().double() - oracle
            errors.append(float(error.abs().amax() / oracle.abs().amax()))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert errors[0] < 2.0**-17
    assert errors[1] > 8 * errors[0], errors
