# SPDX-License-Identifier: Apache-2.0
"""Tensors of other kinds, views of other memory, calls side by side, and calls that fail."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from vtclip import ops
from vtclip.backends import native
from vtclip.machine import why_out_of_memory
from vtclip.ops._select import Problem, select
from vtclip.testing.problems import FUNCTIONS, Function

SIZES = {"B": 2, "K": 5, "L": 7, "H": 2, "d": 8, "D": 8, "C": 8, "F": 4}
DTYPES = ("bool", "uint8", "int16", "int32", "int64", "complex64", "complex128")
DTYPES += ("float8_e4m3fn", "float8_e5m2")
each_function = pytest.mark.parametrize("call", FUNCTIONS.values(), ids=FUNCTIONS)
needs_kernels = pytest.mark.skipif(bool(native.load_cpu()), reason="vtclip._C is not built")


@each_function
@pytest.mark.parametrize("dtype", DTYPES)
def test_other_dtypes_are_refused_by_name(call, dtype):
    tensors = [tensor.detach() for tensor in call.draw(SIZES)]
    message = rf"^\w+: \w+ must be one of float16, bfloat16, float32, float64, got {dtype}$"
    for i, tensor in enumerate(tensors):
        with pytest.raises(TypeError, match=message):
            call(*tensors[:i], tensor.to(getattr(torch, dtype)), *tensors[i + 1 :])


LAYOUTS = {
    "torch.sparse_coo": lambda t: t.to_sparse(),
    "torch.sparse_csr": lambda t: t.to_sparse_csr(),
    "torch._mkldnn": lambda t: t.to_mkldnn(),
    "nested, jagged": lambda t: torch.nested.nested_tensor([*t], layout=torch.jagged),
    "nested": lambda t: torch.nested.nested_tensor([*t]),
    "qint8": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", LAYOUTS)
def test_other_layouts_are_refused_by_name(kind):
    image, text = torch.randn(3, 8), torch.randn(4, 8)
    odd = LAYOUTS[kind](text)
    for name, pair in ("image", (odd, image)), ("text", (image, odd)):
        with pytest.raises(TypeError) as caught:
            ops.cosine_logits(*pair)
        said = kind.partition(",")[0]
        assert re.fullmatch(rf"cosine_logits: {name} must be .* got .*{said}.*", str(caught.value))


def results(call: Function, leaves: list[Tensor], impl: str) -> list[Tensor]:
    """The outputs of a call and the gradients of a sum of them."""
    outputs = call.outputs(*leaves, impl=impl)
    seeds = [torch.cos(out.detach().float()).to(out.dtype) for out in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, seeds)]


def assert_alike(found: list[Tensor], wanted: list[Tensor]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def negated(t: Tensor) -> Tensor:
    """The values of `t` as a view whose sign is still to be turned."""
    view = torch.complex(t, -t).conj().imag
    assert view.is_neg()
    return view


def overlapping(t: Tensor) -> Tensor:
    """Rows that share all elements but one with the next."""
    return torch.randn(sum(t.shape)).as_strided(t.shape, [1] * t.dim())


def channels_last(t: Tensor) -> Tensor:
    return t.to(memory_format=torch.channels_last) if t.dim() == 4 else t.mT.contiguous().mT


def repeated_row(t: Tensor) -> Tensor:
    """Stride 0 along the first axis."""
    return t[:1].expand_as(t)


def one_number(t: Tensor) -> Tensor:
    """Stride 0 along every axis but the first, where there is another."""
    return t.reshape(len(t), -1)[:, 0].view(len(t), *[1] * (t.dim() - 1)).expand_as(t)


# views are resolved before an implementation is chosen: two operators stand for all of Triton's
VIEWED = [("cpu", name) for name in FUNCTIONS]
VIEWED += [("triton", name) for name in ("cosine_logits", "cross_attn")]


@pytest.mark.parametrize(("impl", "name"), VIEWED)
@pytest.mark.parametrize("view", [negated, overlapping, channels_last, repeated_row, one_number])
def test_views_are_read_as_what_they_say(view, impl, name):
    call = FUNCTIONS[name]
    try:
        select(Problem(call.op.name, "cpu", torch.float32, SIZES["d"]), impl)
    except NotImplementedError as refused:
        pytest.skip(str(refused))
    drawn = [tensor.detach() for tensor in call.draw(SIZES)]
    repeats = view is repeated_row  # of a vector too
    views = [view(tensor) if tensor.dim() > 1 or repeats else tensor for tensor in drawn]
    plain = [tensor.clone(memory_format=torch.contiguous_format) for tensor in views]
    plain = [tensor.resolve_neg().requires_grad_() for tensor in plain]
    odd = [tensor.detach().requires_grad_() for tensor in views]
    assert_alike(results(call, odd, impl), results(call, plain, impl))


@needs_kernels
def test_threads_side_by_side_get_the_bits_of_one():
    sizes = {**SIZES, "B": 9, "K": 40, "L": 33}
    drawn = [(call, call.draw(sizes)) for call in FUNCTIONS.values()]

    def everything() -> list[Tensor]:
        return [part for call, leaves in drawn for part in results(call, leaves, "cpu")]

    alone = everything()
    with ThreadPoolExecutor(8) as pool:
        found = [job.result() for job in [pool.submit(everything) for _ in range(24)]]
    assert all(torch.equal(a, b) for one in found for a, b in zip(one, alone, strict=True))


@needs_kernels
def test_memory_that_is_not_there_is_torchs_error_and_the_next_call_works(capfd):
    image, text = torch.randn(3, 8), torch.randn(4, 8)
    before = ops.cosine_logits(image, text, impl="cpu")
    rows = torch.ones(2**23, 1)  # 2^48 bytes of logits, more than any address space of programs
    with pytest.raises(RuntimeError, match="allocate|aten::new_empty") as caught:
        ops.cosine_logits(rows, rows, impl="cpu")
    assert why_out_of_memory(caught.value)
    assert torch.equal(ops.cosine_logits(image, text, impl="cpu"), before)
    capfd.readouterr()  # torch prints where it happened


@needs_kernels
def test_a_kernel_that_fails_is_not_replaced_by_another(monkeypatch):
    image, text = torch.randn(3, 8), torch.randn(4, 8)
    ops.cosine_logits(image, text)

    def function(name: str) -> Any:
        def fails(*_: Any) -> None:
            raise RuntimeError("an illegal memory access was encountered")

        return fails

    monkeypatch.setattr(native.CPU, "function", function)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        ops.cosine_logits(image, text)


@needs_kernels
@each_function
def test_a_second_backward_is_an_error_or_the_same_again(call):
    leaves = call.draw(SIZES)
    loss = call(*leaves, impl="cpu").square().sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("impl", ["reference", pytest.param("cpu", marks=needs_kernels)])
@each_function
def test_a_sum_over_nothing_has_a_gradient(call, impl):
    """Of every input alone, whichever axis is 0: a network with such a layer can be trained."""
    for letter in call.op.sizes:
        drawn = call.draw({**SIZES, letter: 0})
        for wanted in drawn:
            leaves = [t.detach().requires_grad_(t is wanted) for t in drawn]
            asked = [leaf for leaf in leaves if leaf.requires_grad]
            outputs = [out for out in call.outputs(*leaves, impl=impl) if out.requires_grad]
            (grad,) = torch.autograd.grad(outputs, asked, [torch.ones_like(out) for out in outputs])
            assert grad.shape == wanted.shape
            assert grad.isfinite().all()
