# SPDX-License-Identifier: Apache-2.0
"""Derivatives of any order and in any way: those of the reference, or an error, never a zero."""

from __future__ import annotations

import ast
import importlib.util
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from linear_layers import layers
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vtclip import ops
from vtclip.backends import native
from vtclip.ops import _any_order
from vtclip.testing.problems import FUNCTIONS, OPS, Function, tensors_of

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
            assert torch.allclose(one, other, rtol=1e-8, atol=1e-8), name


def attention(impl: str, kind: str, **shapes: int) -> tuple[list[Tensor], Callable[..., Tensor]]:
    """Leaves and a weighted sum of an attention whose masked columns hold NaN."""
    B, H, K, L, d = (shapes.get(letter, SIZES[letter]) for letter in "BHKLd")
    draws = torch.Generator().manual_seed(5)
    query, key, value = (
        torch.randn(shape, generator=draws, dtype=torch.float64)
        for shape in ((shapes.get("Bq", 1), H, K, d), (B, H, L, d), (B, H, L, d))
    )
    mask = torch.rand((B, L), generator=draws) > 0.4
    mask[:1] = False  # an image without any column
    columns = ~mask[:, None, :, None]
    leaves = [query, key.masked_fill(columns, torch.nan), value.masked_fill(columns, torch.nan)]

    def score(*tensors: Tensor) -> Tensor:
        if kind == "weights":
            found = ops.cross_attn_weights(*tensors[:2], key_mask=mask, impl=impl)
        else:
            out, lse = ops.cross_attn_lse(*tensors, key_mask=mask, impl=impl)
            finite = lse.masked_fill(lse == -torch.inf, 0.0)
            found = {"out": out, "lse": finite, "both": out + finite[..., None]}[kind]
        return (found * torch.arange(found.numel()).cos().view(found.shape)).sum()

    return [leaf.requires_grad_() for leaf in leaves[: 2 if kind == "weights" else 3]], score


def gradients_of_penalty(leaves: list[Tensor], score: Callable[..., Tensor]) -> list[Tensor]:
    value = score(*leaves)
    grads = torch.autograd.grad(
        value, leaves, create_graph=True, allow_unused=True, materialize_grads=True
    )
    loss = value + sum((grad * (grad + 1)).sum() for grad in grads)
    return list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))


@pytest.mark.parametrize(
    "shapes",
    [{}, {"B": 0}, {"L": 0}, {"K": 1}, {"K": 0}, {"B": 1, "Bq": 3}, {"B": 3, "Bq": 3}, {"L": 1}],
    ids=str,
)
@pytest.mark.parametrize("kind", ["out", "lse", "both", "weights"])
def test_masks_empty_sizes_and_unused_outputs(kind, shapes, cpu):
    expected = gradients_of_penalty(*attention("reference", kind, **shapes))
    actual = gradients_of_penalty(*attention(cpu, kind, **shapes))
    assert all(grad.isfinite().all() for grad in actual)
    assert_same(actual, expected, torch.float64)


@each_function
@pytest.mark.parametrize("size", ["B", "K"])
def test_sizes_of_zero_and_one(call, size, cpu):
    for number in (0, 1):
        tensors = call.draw({**SIZES, size: number}, dtype=torch.float64)
        expected = gradients_of_penalty(tensors, total(call, "reference"))
        assert_same(gradients_of_penalty(tensors, total(call, cpu)), expected, torch.float64)


@each_function
def test_any_of_the_inputs_alone(call, cpu):
    tensors = drawn(call, torch.float64)
    for i in range(len(tensors)):
        leaves = [t.detach().requires_grad_(i == j) for j, t in enumerate(tensors)]

        def score(leaf: Tensor, impl: str, i: int = i, leaves: list[Tensor] = leaves) -> Tensor:
            return total(call, impl)(*leaves[:i], leaf, *leaves[i + 1 :])

        actual, expected = (
            gradients_of_penalty([leaves[i]], lambda leaf, impl=impl: score(leaf, impl))
            for impl in (cpu, "reference")
        )
        assert_same(actual, expected, torch.float64)


@each_function
def test_any_of_the_outputs_alone_and_strided_gradients(call, cpu):
    tensors = drawn(call, torch.float64)
    for i in range(len(call.outputs(*tensors, impl=cpu))):

        def score(*leaves: Tensor, impl: str, i: int = i) -> Tensor:
            out = call.outputs(*leaves, impl=impl)[i]
            strided = torch.stack([out, out.sin()], -1)[..., 0]  # its gradient has holes
            return (strided * strided.detach().cos()).sum()

        actual, expected = (
            gradients_of_penalty(tensors, lambda *leaves, impl=impl: score(*leaves, impl=impl))
            for impl in (cpu, "reference")
        )
        assert_same(actual, expected, torch.float64)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(cpu, reentrant):
    call = FUNCTIONS["cross_attn"]
    tensors = drawn(call)

    def run(impl: str) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        loss = checkpoint(penalty_of(impl), *leaves, use_reentrant=reentrant)
        loss.backward()
        return [leaf.grad for leaf in leaves]

    def penalty_of(impl: str) -> Callable[..., Tensor]:
        def penalty(*leaves: Tensor) -> Tensor:
            with torch.enable_grad():
                score = total(call, impl)(*leaves)
                grads = torch.autograd.grad(score, leaves, create_graph=True)
                return score + sum(grad.square().sum() for grad in grads)

        return penalty

    assert_same(run(cpu), run("reference"))


def test_a_checkpointed_operator_below_a_penalty(cpu):
    call = FUNCTIONS["cross_attn"]
    tensors = drawn(call)

    def score(*leaves: Tensor, impl: str) -> Tensor:
        return checkpoint(total(call, impl), *leaves, use_reentrant=False)

    with torch.autograd.graph.save_on_cpu():
        actual, expected = (
            gradients_of_penalty(tensors, lambda *leaves, impl=impl: score(*leaves, impl=impl))
            for impl in (cpu, "reference")
        )
    assert_same(actual, expected)


def test_accumulated_by_backward_and_under_autocast(cpu):
    call = FUNCTIONS["cross_attn"]
    tensors = drawn(call)

    def run(impl: str) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        with torch.autocast("cpu", torch.bfloat16):
            total(call, impl)(*leaves).backward(create_graph=True)
            sum(leaf.grad.square().sum() for leaf in leaves).backward()
        grads = [leaf.grad.detach() for leaf in leaves]
        for leaf in leaves:
            leaf.grad = None  # breaks the cycle that create_graph makes
        return grads

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Using backward\\(\\) with create_graph")
        assert_same(run(cpu), run("reference"), torch.bfloat16)


def test_each_operator_says_once_what_it_costs(cpu, monkeypatch):
    for call in FUNCTIONS.values():
        monkeypatch.setattr(_any_order, "_WARNED", set())
        tensors = drawn(call)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.autograd.grad(total(call, cpu)(*tensors), tensors, create_graph=True)
            torch.func.grad(total(call, cpu))(*(tensor.detach() for tensor in tensors))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                penalised(call, tensors, cpu)
            torch.func.vmap(total(call, cpu))(*(tensor.detach()[None] for tensor in tensors))
        (warning,) = caught
        assert str(warning.message).startswith(call.name.removesuffix("_lse") + ": ")
        assert 'impl="reference"' in str(warning.message)


@pytest.mark.parametrize("way", ["vmap", "jvp", "vmap of grad"])
def test_each_way_of_recomputing_says_what_it_costs(way, cpu, monkeypatch):
    call = FUNCTIONS["cosine_logits"]
    monkeypatch.setattr(_any_order, "_WARNED", set())
    still = tuple(tensor.detach() for tensor in drawn(call))
    many, function = tuple(tensor[None] for tensor in still), total(call, cpu)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if way == "jvp":
            torch.func.jvp(function, still, still)
        elif way == "vmap":
            torch.func.vmap(function)(*many)
        else:
            torch.func.vmap(torch.func.grad(function))(*many)
    said = [str(one.message) for one in caught if "recompute through" in str(one.message)]
    assert [text.partition(":")[0] for text in said] == ["cosine_logits"]


def test_linear_layers_side_by_side(impl):
    tensors, score, plainly = layers()
    assert_same(
        gradients_of_penalty(tensors, score), gradients_of_penalty(tensors, plainly), torch.float64
    )
    still = tuple(tensor.detach() for tensor in tensors)
    for actual, expected in zip(
        flattened(torch.func.hessian(score, (0, 1, 2))(*still)),
        flattened(torch.func.hessian(plainly, (0, 1, 2))(*still)),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected)


@each_function
def test_traced_with_its_transforms(call, cpu):
    tensors = [tensor.detach() for tensor in drawn(call, torch.float64)]

    def steep(impl: str) -> Callable[[Tensor], Tensor]:
        def one(first: Tensor) -> Tensor:
            return call(first, *tensors[1:], impl=impl).sin().sum()

        return torch.func.grad(lambda x: torch.func.grad(one)(x).square().sum())

    torch.compiler.reset()
    compiled = torch.compile(steep(cpu), backend="eager", fullgraph=True)
    assert_same(compiled(tensors[0]), steep("reference")(tensors[0]), torch.float64)


def test_a_compiled_operator_refuses_a_second_backward(cpu):
    tensors = drawn(FUNCTIONS["cross_attn"])
    torch.compiler.reset()
    compiled = torch.compile(total(FUNCTIONS["cross_attn"], cpu), backend="aot_eager")
    grads = torch.autograd.grad(compiled(*tensors), tensors, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grads[0].square().sum().backward()


def test_every_function_of_kernels_is_differentiable_again():
    # `class X(torch.autograd.Function)` with kernels belongs under `any_order`
    package = Path(_any_order.__file__).parents[1]
    bare = []
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ClassDef):
                continue
            bases = {ast.unparse(base).rpartition(".")[2] for base in node.bases}
            if "Function" not in bases:
                continue
            decorators = {ast.unparse(d).partition("(")[0] for d in node.decorator_list}
            if "any_order" not in decorators:
                bare.append(node.name)
    # the step of a graph itself; torch's own products; torch's own norm where a graph is wanted; a
    # sum over processes, linear in its input
    assert sorted(bare) == ["_Gather", "_Gradients", "_Hidden", "_NormOfSum", "_Projections"]
    assert set(_any_order._STORES) >= set(OPS)
