# SPDX-License-Identifier: Apache-2.0
"""What torch asks of an operator: opcheck, compile, export, autocast."""

from __future__ import annotations

import inspect
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from vtclip import ops
from vtclip.backends import native, schemas
from vtclip.ops._autograd import bound_once
from vtclip.ops._select import only_reference
from vtclip.testing.problems import FUNCTIONS, OPS, Op, tensors_of

needs_extension = pytest.mark.skipif(bool(native.load_cpu()), reason="vtclip._C is not built")


SIZES = {"B": 3, "K": 5, "L": 7, "H": 2, "d": 8, "D": 6, "C": 6, "F": 4}
SAMPLES = [(op, variant) for op in OPS.values() for variant in ("", *op.variants)]


def sample(op: Op, variant: str, way: str, empty: bool, strided: bool) -> tuple[object, ...]:
    """Arguments for one schema. Strided are heads as a projection leaves them, and a shared query
    expanded over the images."""
    B = 0 if empty else 3
    inputs = op.draw({**SIZES, "B": B}, variant=variant, heads_inside=strided)
    if strided:
        inputs |= {
            name: inputs[name].expand(B, -1, -1, -1)
            for name in ("query", "text_query")
            if name in inputs
        }
    if way == "fwd":
        if strided and "keep_parts" in inputs:
            inputs["keep_parts"] = False
        return op.forward_arguments(inputs)
    forward = getattr(torch.ops.vtclip, f"{op.name}_fwd")
    return op.backward_arguments(inputs, tensors_of(forward(*op.forward_arguments(inputs))))


def test_every_schema_has_samples():
    assert {f"{op.name}_{way}" for op, _ in SAMPLES for way in ("fwd", "bwd")} == set(
        schemas.SCHEMAS
    )


@needs_extension
@pytest.mark.parametrize("strided", [False, True], ids=["plain", "strided"])
@pytest.mark.parametrize("empty", [False, True], ids=["full", "empty"])
@pytest.mark.parametrize("way", ["fwd", "bwd"])
@pytest.mark.parametrize(
    ("op", "variant"), SAMPLES, ids=[", ".join(filter(None, (op.name, v))) for op, v in SAMPLES]
)
def test_opcheck(op, variant, way, empty, strided):
    registered = getattr(torch.ops.vtclip, f"{op.name}_{way}").default
    done = torch.library.opcheck(registered, sample(op, variant, way, empty, strided))
    assert len(done) == 4
    assert set(done.values()) == {"SUCCESS"}


each_call = pytest.mark.parametrize("op", FUNCTIONS.values(), ids=FUNCTIONS)


def test_every_public_function_is_in_the_table():
    functions = {name for name in ops.__all__ if callable(getattr(ops, name)) and name.islower()}
    assert functions == set(FUNCTIONS)


@each_call
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_compiles_whole_with_dynamic_shapes(op, impl):
    if impl == "cpu" and native.load_cpu():
        pytest.skip("vtclip._C is not built")

    def loss(*tensors: Tensor) -> Tensor:
        return op(*tensors, impl=impl).square().sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    tensors = op.draw(SIZES)
    expected, actual = loss(*tensors), compiled(*tensors)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(
        torch.autograd.grad(actual, tensors), torch.autograd.grad(expected, tensors), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@each_call
def test_exports(op):
    class Module(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return op(*tensors)

    tensors = tuple(tensor.detach() for tensor in op.draw(SIZES))
    program = torch.export.export(Module(), tensors)
    torch.testing.assert_close(program.module()(*tensors), op(*tensors))


@needs_extension
def test_only_the_reference_is_traced_where_it_was_asked_for():
    graphs: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(str(graph.graph))
        return graph

    image, text = torch.randn(3, 6), torch.randn(5, 6)
    for context, fused in ((only_reference(), False), (nullcontext(), True)):
        torch.compiler.reset()
        with context:
            torch.compile(ops.cosine_logits, fullgraph=True, backend=keep)(image, text)
        assert ("vtclip" in graphs[-1]) == fused


@needs_extension
@each_call
def test_a_call_without_gradients_can_be_traced(op):
    tensors = [tensor.detach() for tensor in op.draw(SIZES)]
    traced = torch.compile(getattr(ops, op.name), fullgraph=True, backend="eager")
    torch.testing.assert_close(traced(*tensors), getattr(ops, op.name)(*tensors))


@each_call
def test_autocast_casts_forward_and_returns_gradients_in_the_parameters_dtype(op):
    tensors = op.draw(SIZES)
    with torch.autocast("cpu", torch.bfloat16):
        out = op(*tensors)
    if op.name != "cross_attn_lse":  # a sum with the float32 lse there
        assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out.float().sum(), tensors)
    assert all(grad.dtype == torch.float32 for grad in grads)
    expected = op(*[tensor.detach() for tensor in tensors])
    torch.testing.assert_close(
        out.float(), expected, rtol=0.05, atol=0.05 * float(expected.abs().max())
    )


@each_call
def test_mixed_dtypes_are_promoted(op):
    first, *rest = (tensor.detach() for tensor in op.draw(SIZES))
    assert op(first.half(), *rest).dtype == torch.float32


@needs_extension
@each_call
def test_only_asked_for_gradients_come_and_inference_mode_works(op):
    tensors = op.draw(SIZES)
    with torch.inference_mode():
        plain = op(*tensors, impl="cpu")
    with torch.no_grad():
        torch.testing.assert_close(op(*tensors, impl="cpu"), plain.clone(), rtol=0, atol=0)
    first, *rest = tensors
    out = op(first, *(tensor.detach() for tensor in rest), impl="cpu")
    (grad,) = torch.autograd.grad(out.sum(), [first])
    full = torch.autograd.grad(op(*tensors, impl="cpu").sum(), tensors)
    torch.testing.assert_close(grad, full[0], rtol=0, atol=0)


@needs_extension
def test_input_changed_in_place_after_forward_raises_in_backward():
    query, key, value = FUNCTIONS["cross_attn"].draw(SIZES)
    held = key.clone()
    out = ops.cross_attn(query, held, value, impl="cpu")
    with torch.no_grad():
        held.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@needs_extension
def test_compiled_kernels_write_every_element():
    torch.use_deterministic_algorithms(True)  # torch then fills new memory with NaN
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for name, op in FUNCTIONS.items():
                tensors = op.draw(SIZES)
                out = op(*tensors, impl="cpu")
                grads = torch.autograd.grad(out.sum(), tensors)
                assert out.isfinite().all(), name
                assert all(grad.isfinite().all() for grad in grads), name
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_forward_is_bound_as_any_function_is():
    @bound_once
    def forward(x, scale=2.0):
        return x * scale

    signature = inspect.signature(forward)
    assert list(signature.parameters) == ["x", "scale"]
    for given, kwargs in (((1, 3.0), {}), ((1,), {}), ((1,), {"scale": 3.0})):
        bound = signature.bind(*given, **kwargs)
        bound.apply_defaults()
        plain = inspect.Signature(list(signature.parameters.values())).bind(*given, **kwargs)
        plain.apply_defaults()
        assert (bound.args, bound.kwargs) == (plain.args, plain.kwargs)
    for given in ((), (1, 2.0, 3)):
        with pytest.raises(TypeError):
            signature.bind(*given)
