# SPDX-License-Identifier: Apache-2.0
"""Derivatives of any order and in any way: those of the reference, or an error, never a zero."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vtclip import ops
from vtclip.backends import native
from vtclip.ops import _any_order
from vtclip.ops._projections import Layer, projections
from vtclip.testing.problems import FUNCTIONS, Function, tensors_of

SIZES = {"B": 2, "K": 3, "L": 4, "H": 2, "d": 3, "D": 5, "C": 5, "F": 4}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton")
# functions with the variants of their operators: other shapes, masks, penalties
CALLS = {
    ", ".join(filter(None, (name, variant))): function
    for name, usual in FUNCTIONS.items()
    for variant, function in (("", usual), *usual.variants())
}
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
each_function = pytest.mark.parametrize("call", FUNCTIONS.values(), ids=FUNCTIONS)
pytestmark = pytest.mark.filterwarnings("ignore:.*recompute through:UserWarning")


@pytest.fixture(params=["cpu", "triton"])
def impl(request: pytest.FixtureRequest) -> str:
    """The implementations that run on CPU tensors here."""
    if request.param == "cpu" and native.load_cpu():
        pytest.skip("vtclip._C is not built")
    if request.param == "triton" and not INTERPRETED:
        pytest.skip("Triton's interpreter is not there")
    return str(request.param)


@pytest.fixture
def cpu() -> str:
    if native.load_cpu():
        pytest.skip("vtclip._C is not built")
    return "cpu"


def drawn(call: Function, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return call.draw(SIZES, dtype=dtype, seed=3)


def total(call: Function, impl: str) -> Callable[..., Tensor]:
    """A class score: linear in every output, so that a gradient's own inputs want no gradient."""

    def score(*tensors: Tensor) -> Tensor:
        scores = []
        for i, out in enumerate(call.outputs(*tensors, impl=impl)):
            wide = out.double() if out.dtype == torch.float64 else out.float()
            weights = torch.arange(out.numel(), dtype=wide.dtype).add(i).cos().view(out.shape)
            scores.append((weights * wide).sum())
        return torch.stack(scores).sum()

    return score


def penalised(call: Function, tensors: list[Tensor], impl: str) -> list[Tensor]:
    """Gradients of a score plus the squares of its own gradients."""
    score = total(call, impl)(*tensors)
    grads = torch.autograd.grad(score, tensors, create_graph=True)
    loss = score + sum(grad.float().square().sum() for grad in grads)
    return list(torch.autograd.grad(loss, tensors))


def assert_same(actual, expected, dtype=torch.float32):
    tolerance = {torch.float64: 1e-9, torch.float32: 2e-4}.get(dtype, 5e-2)
    for one, other in zip(tensors_of(actual), tensors_of(expected), strict=True):
        assert one.dtype == other.dtype
        size = float(other.double().abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(
            one.double(), other.double(), rtol=tolerance, atol=tolerance * max(size, 1e-6)
        )


@each_call
def test_gradient_penalty(call, impl):
    tensors = drawn(call)
    expected = penalised(call, tensors, "reference")
    assert any(float(grad.abs().max()) > 0 for grad in expected)
    assert_same(penalised(call, tensors, impl), expected)


@each_function
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_gradient_penalty_in_other_dtypes(call, dtype, cpu):
    tensors = drawn(call, dtype)
    if dtype != torch.float64:
        call = FUNCTIONS[call.name]  # scores of 100 times a cosine overflow a half's square
        scale = {"scale": 1.0} if "scale" in call.keywords else {}
        call = Function(call.name, call.op, call.tensors, {**call.keywords, **scale}, call.result)
    assert_same(penalised(call, tensors, cpu), penalised(call, tensors, "reference"), dtype)


@each_function
def test_the_first_gradient_of_a_graph_is_the_kernels(call, impl):
    tensors = drawn(call)
    plain = torch.autograd.grad(total(call, impl)(*tensors), tensors)
    graph = torch.autograd.grad(total(call, impl)(*tensors), tensors, create_graph=True)
    assert all(torch.equal(one, other) for one, other in zip(plain, graph, strict=True))
    still = [tensor.detach() for tensor in tensors]
    every = tuple(range(len(still)))
    func = torch.func.grad(total(call, impl), every)(*still)
    assert all(torch.equal(one, other) for one, other in zip(plain, func, strict=True))


@each_function
def test_gradgradcheck(call, cpu):
    tensors = drawn(call, torch.float64)
    scale = {"scale": 1.0} if "scale" in call.keywords else {}

    def outputs(*inputs: Tensor) -> tuple[Tensor, ...]:
        return call.outputs(*inputs, impl=cpu, **scale)

    assert torch.autograd.gradcheck(
        outputs, tensors, check_forward_ad=True, check_batched_grad=True, fast_mode=True
    )
    assert torch.autograd.gradgradcheck(
        outputs, tensors, check_fwd_over_rev=True, check_rev_over_rev=True, fast_mode=True,
        check_batched_grad=True,
    )  # fmt: skip


def functional_forms(score: Callable[..., Tensor], tensors: tuple[Tensor, ...]):
    """Second derivatives as torch.autograd.functional and torch.func give them."""
    F, T = torch.autograd.functional, torch.func
    every = tuple(range(len(tensors)))
    flat = tuple(torch.ones_like(tensor) for tensor in tensors)

    def gradient(*inputs: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(score(*inputs), inputs, create_graph=True)

    def one(first: Tensor) -> Tensor:
        return score(first, *tensors[1:])

    def steep(first: Tensor) -> Tensor:
        return T.grad(one)(first).square().sum()

    yield "hessian", lambda: F.hessian(score, tensors)
    yield "hessian, vectorised", lambda: F.hessian(score, tensors, vectorize=True)
    yield (
        "hessian, forward",
        lambda: F.hessian(score, tensors, vectorize=True, outer_jacobian_strategy="forward-mode"),
    )
    yield "hvp", lambda: F.hvp(score, tensors, flat)[1]
    yield "vhp", lambda: F.vhp(score, tensors, flat)[1]
    yield "jacobian of the gradient", lambda: F.jacobian(gradient, tensors)
    yield "jacobian", lambda: F.jacobian(score, tensors, vectorize=True)
    yield "jvp by two backwards", lambda: F.jvp(score, tensors, flat)[1]
    yield "grad of grad", lambda: T.grad(steep)(tensors[0])
    yield "third order", lambda: T.grad(lambda x: T.grad(steep)(x).square().sum())(tensors[0])
    yield "func.hessian", lambda: T.hessian(score, every)(*tensors)
    yield "jacrev of grad", lambda: T.jacrev(T.grad(score, every), every)(*tensors)
    yield "jacrev of jacrev", lambda: T.jacrev(T.jacrev(one))(tensors[0])
    yield "jacfwd of jacfwd", lambda: T.jacfwd(T.jacfwd(one))(tensors[0])
    yield "jacfwd", lambda: T.jacfwd(score, every)(*tensors)
    yield "func.jvp", lambda: T.jvp(score, tensors, flat)[1]
    yield "forward over reverse", lambda: T.jvp(T.grad(one), tensors[:1], flat[:1])[1]
    yield (
        "reverse over forward",
        lambda: T.grad(lambda x: T.jvp(one, (x,), flat[:1])[1].sum())(tensors[0]),
    )
    many = torch.stack([tensors[0], 2 * tensors[0]])
    yield "vmap", lambda: T.vmap(one)(many)
    yield "vmap of grad", lambda: T.vmap(T.grad(one))(many)
    yield "vmap of vmap", lambda: T.vmap(T.vmap(one))(torch.stack([many, many + 1]))
    yield "vmap of hessian", lambda: T.vmap(T.hessian(one))(many)
    yield "grad of vmap", lambda: T.grad(lambda x: T.vmap(steep)(x).sum())(many)


def flattened(found) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(found) if isinstance(leaf, Tensor)]


@each_function
def test_functional_forms(call, cpu):
    scale = {"scale": 1.0} if "scale" in call.keywords else {}
    call = Function(call.name, call.op, call.tensors, {**call.keywords, **scale}, call.result)
    tensors = tuple(tensor.detach() for tensor in drawn(call, torch.float64))
    forms = zip(
        functional_forms(total(call, cpu), tensors),
        functional_forms(total(call, "reference"), tensors),
        strict=True,
    )
    for (name, actual), (_, expected) in forms:
        try:
            wanted = flattened(expected())
        except (RuntimeError, NotImplementedError) as error:
            pytest.fail(f"{name}: the reference raises {error}")
        found = flattened(actual())
        assert len(found) == len(wanted) > 0, name
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(
                one, other, rtol=1e-8, atol=1e-8, msg=lambda m: f"{name}: {m}"
            )
