# SPDX-License-Identifier: Apache-2.0
"""What torch asks of an operator: opcheck, compile, export, autocast, and honest refusals."""

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
from vtclip.reference._dtypes import PENALTY_CODES

needs_extension = pytest.mark.skipif(bool(native.load_cpu()), reason="vtclip._C is not built")


def sample(name: str, empty: bool, expanded: bool) -> tuple[object, ...]:
    """Arguments for one schema."""
    B, H, K, L, d, C = (0 if empty else 3), 2, 5, 7, 8, 6
    query, key = torch.randn(1, H, K, d), torch.randn(B, H, L, d)
    if expanded:
        query = query.expand(B, H, K, d)
        key = torch.randn(B, L, H, d).transpose(1, 2)
    value, mask = torch.randn(B, H, L, d), torch.ones(B, L, dtype=torch.bool)
    image, text = torch.randn(B, C), torch.randn(K, C)
    tail = torch.randn(B, K, C), torch.randn(C), torch.randn(C), text, image
    ref = torch.ops.vtclip
    if name == "cross_attn_fwd":
        return query, key, value, mask, 0.5
    if name == "cross_attn_bwd":
        out, lse = ref.cross_attn_fwd(query, key, value, mask, 0.5)
        grads = torch.randn(out.shape), torch.randn(lse.shape)
        return *grads, query, key, value, mask, out, lse, 0.5
    if name == "cross_attn_weights_fwd":
        return query, key, mask, 0.5
    if name == "cross_attn_weights_bwd":
        weights = ref.cross_attn_weights_fwd(query, key, None, 0.5)
        return torch.randn(weights.shape), weights, query, key, 0.5
    if name == "cosine_logits_fwd":
        return image, text, 2.0
    if name == "cosine_logits_bwd":
        logits, *rnorms = ref.cosine_logits_fwd(image, text, 2.0)
        return torch.randn(logits.shape), image, text, *rnorms, 2.0
    if name == "norm_cosine_logits_fwd":
        return *tail, 0.5, 2.0, 1e-5
    if name == "norm_cosine_logits_bwd":
        outputs = ref.norm_cosine_logits_fwd(*tail, 0.5, 2.0, 1e-5)
        return torch.randn(B, K), *tail, *outputs, 0.5, 2.0, 1e-5
    ffn = torch.randn(B, K, 4), torch.randn(C, 4), torch.randn(C), tail[0]
    if name == "ffn_cosine_logits_fwd":
        return *ffn, *tail[1:], 0.5, 2.0, 1e-5
    if name == "ffn_cosine_logits_bwd":
        _, *kept = ref.ffn_cosine_logits_fwd(*ffn, *tail[1:], 0.5, 2.0, 1e-5)
        return torch.randn(B, K), *ffn, *tail[1:], *kept, 0.5, 2.0, not expanded
    heads = torch.randn(B, H, K, d), torch.randn(B, H, K, d)
    asked = torch.randn(B, H, 1, d), query, torch.randn(B, H, K, d)
    if expanded:
        heads = tuple(torch.randn(B, K, H, d).transpose(1, 2) for _ in range(2))
        asked = None, query, None
    if name == "rational_attn_fwd":
        return *asked, *heads, 0.5, not expanded
    if name == "rational_attn_bwd":
        out, *kept = ref.rational_attn_fwd(*asked, *heads, 0.5, True)
        return torch.randn(out.shape), *asked, *heads, *kept, 0.5
    mask = torch.randn(B, K, C)
    if name == "rational_logits_fwd":
        return image, text, mask, 2.0
    if name == "rational_logits_bwd":
        return torch.randn(B, K), image, text, mask, 2.0
    ending = mask, torch.randn(C, C), torch.randn(C), image, text
    penalty = PENALTY_CODES["mse" if expanded else "linf"]
    if name == "rational_head_fwd":
        return *ending, 2.0, penalty
    if name == "rational_head_bwd":
        logits, size, peak = ref.rational_head_fwd(*ending, 2.0, penalty)
        grads = torch.randn(logits.shape), torch.randn(size.shape)
        return *grads, *ending, peak, 2.0, penalty, not expanded
    if name == "unit_products_fwd":
        return image, text, 2.0
    if name == "unit_products_bwd":
        outputs = ref.unit_products_fwd(image, text, 2.0)
        return *(torch.randn(out.shape) for out in outputs), image, text, 2.0
    raise KeyError(f"no sample for {name}: every schema needs one")


@needs_extension
@pytest.mark.parametrize("expanded", [False, True], ids=["plain", "strided"])
@pytest.mark.parametrize("empty", [False, True], ids=["full", "empty"])
@pytest.mark.parametrize("name", schemas.SCHEMAS)
def test_opcheck(name, empty, expanded):
    done = torch.library.opcheck(
        getattr(torch.ops.vtclip, name).default, sample(name, empty, expanded)
    )
    assert len(done) == 4
    assert set(done.values()) == {"SUCCESS"}


CALLS = {
    "cross_attn": (ops.cross_attn, ((1, 2, 5, 8), (3, 2, 7, 8), (3, 2, 7, 8))),
    "cross_attn_lse": (
        lambda *t, **k: sum(part.sum() for part in ops.cross_attn_lse(*t, **k)),
        ((1, 2, 5, 8), (3, 2, 7, 8), (3, 2, 7, 8)),
    ),
    "cross_attn_weights": (ops.cross_attn_weights, ((1, 2, 5, 8), (3, 2, 7, 8))),
    "cosine_logits": (ops.cosine_logits, ((3, 6), (5, 6))),
    "norm_cosine_logits": (ops.norm_cosine_logits, ((3, 5, 6), (6,), (6,), (5, 6), (3, 6))),
    "ffn_cosine_logits": (
        ops.ffn_cosine_logits,
        ((3, 5, 4), (6, 4), (6,), (3, 5, 6), (6,), (6,), (5, 6), (3, 6)),
    ),
    "rational_attn": (
        ops.rational_attn,
        ((3, 2, 1, 8), (1, 2, 5, 8), (3, 2, 5, 8), (3, 2, 5, 8), (3, 2, 5, 8)),
    ),
    "rational_attn_packed": (
        ops.rational_attn_packed,
        ((3, 2, 1, 8), (1, 2, 5, 8), (3, 5, 3, 2, 8)),
    ),
    "rational_logits": (ops.rational_logits, ((3, 6), (5, 6), (3, 5, 6))),
    "unit_products": (lambda *t, **k: ops.unit_products(*t, **k).products, ((3, 6), (5, 6))),
    "rational_head": (
        lambda *t, **k: ops.rational_head(*t, penalty="mse", **k).logits,
        ((3, 5, 6), (6, 6), (6,), (3, 6), (5, 6)),
    ),
}
each_call = pytest.mark.parametrize("name", CALLS)


def leaves(name: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in CALLS[name][1]]


def test_every_public_function_is_in_the_table():
    functions = {name for name in ops.__all__ if callable(getattr(ops, name)) and name.islower()}
    assert functions == set(CALLS)


@each_call
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_compiles_whole_with_dynamic_shapes(name, impl):
    if impl == "cpu" and native.load_cpu():
        pytest.skip("vtclip._C is not built")
    op = CALLS[name][0]

    def loss(*tensors: Tensor) -> Tensor:
        return op(*tensors, impl=impl).square().sum()

    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    tensors = leaves(name)
    expected, actual = loss(*tensors), compiled(*tensors)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(
        torch.autograd.grad(actual, tensors), torch.autograd.grad(expected, tensors), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@each_call
def test_exports(name):
    op = CALLS[name][0]

    class Module(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Tensor:
            return op(*tensors)

    tensors = tuple(tensor.detach() for tensor in leaves(name))
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


@each_call
def test_autocast_casts_forward_and_returns_gradients_in_the_parameters_dtype(name):
    op, tensors = CALLS[name][0], leaves(name)
    with torch.autocast("cpu", torch.bfloat16):
        out = op(*tensors)
    if name != "cross_attn_lse":  # a sum with the float32 lse there
        assert out.dtype == torch.bfloat16
    grads = torch.autograd.grad(out.float().sum(), tensors)
    assert all(grad.dtype == torch.float32 for grad in grads)
    expected = op(*[tensor.detach() for tensor in tensors])
    torch.testing.assert_close(
        out.float(), expected, rtol=0.05, atol=0.05 * float(expected.abs().max())
    )


@each_call
def test_mixed_dtypes_are_promoted(name):
    op = CALLS[name][0]
    first, *rest = (tensor.detach() for tensor in leaves(name))
    assert op(first.half(), *rest).dtype == torch.float32


@needs_extension
@each_call
def test_second_derivatives_raise(name):
    op, tensors = CALLS[name][0], leaves(name)
    (grad,) = torch.autograd.grad(
        op(*tensors, impl="cpu").square().sum(), tensors[:1], create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|not have been used"):
        torch.autograd.grad(grad.sum(), tensors[:1])


@needs_extension
@each_call
def test_forward_mode_and_vmap_raise_instead_of_guessing(name):
    op, tensors = CALLS[name][0], [tensor.detach() for tensor in leaves(name)]
    with pytest.raises(RuntimeError, match="jvp|forward"):
        torch.func.jvp(lambda *t: op(*t, impl="cpu"), tuple(tensors), tuple(tensors))
    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(lambda *t: op(*t, impl="cpu"))(*(tensor[None] for tensor in tensors))


@needs_extension
@each_call
def test_only_asked_for_gradients_come_and_inference_mode_works(name):
    op, tensors = CALLS[name][0], leaves(name)
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
    query, key, value = leaves("cross_attn")
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
            for name, (op, _) in CALLS.items():
                tensors = leaves(name)
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
