# SPDX-License-Identifier: Apache-2.0
"""Gradients of gradients around torch.compile: those of eager calls, or an error."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from linear_layers import layers
from torch import Tensor

from vtclip.backends import native
from vtclip.heads.rada import RAda
from vtclip.heads.vtclip import VTCLIP
from vtclip.ops._select import only_reference
from vtclip.ops._traced import never_compiled
from vtclip.testing.problems import FUNCTIONS, Function

SIZES = {"B": 2, "K": 3, "L": 4, "H": 2, "d": 3, "D": 5, "C": 5, "F": 4}
CALLS = {
    ", ".join(filter(None, (name, variant))): function
    for name, usual in FUNCTIONS.items()
    for variant, function in (("", usual), *usual.variants())
}
each_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
each_function = pytest.mark.parametrize("call", FUNCTIONS.values(), ids=FUNCTIONS)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*recompute through:UserWarning"),
    # Dynamo looks at .grad of what it continues with behind a break
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph:UserWarning"),
    pytest.mark.skipif(bool(native.load_cpu()), reason="vtclip._C is not built"),
]
Score = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def score_of(call: Function, impl: str) -> Score:
    """Linear in every output, so that a penalty's only curvature is the operator's."""

    def score(*tensors: Tensor) -> Tensor:
        total = tensors[0].new_zeros(())
        for i, out in enumerate(call.outputs(*tensors, impl=impl)):
            weights = torch.arange(out.numel(), dtype=out.dtype).add(i).cos().view(out.shape)
            total = total + (weights * out).sum()
        return total

    return score


def penalty_of(score: Score) -> Score:
    """A score, squares of the inputs, and the squares of the gradients of both."""

    def penalty(*tensors: Tensor) -> Tensor:
        value = score(*tensors) + sum(tensor.square().sum() for tensor in tensors)
        grads = torch.autograd.grad(value, tensors, create_graph=True)
        return value + sum(grad.square().sum() for grad in grads)

    return penalty


def drawn(call: Function) -> list[Tensor]:
    return call.draw(SIZES, dtype=torch.float64, seed=3)


def assert_gradients(actual: Score, expected: Score, leaves: list[Tensor]) -> None:
    for one, other in zip(
        torch.autograd.grad(actual(*leaves), leaves),
        torch.autograd.grad(expected(*leaves), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * float(other.abs().max()))


@each_call
def test_a_compiled_penalty_has_its_second_derivatives(call):
    compiled = torch.compile(penalty_of(score_of(call, "cpu")), backend="eager")
    assert_gradients(compiled, penalty_of(score_of(call, "reference")), drawn(call))


@each_function
def test_a_penalty_compiled_around_a_call_that_is_not(call):
    score = torch.compiler.disable(score_of(call, "cpu"))
    compiled = torch.compile(penalty_of(score), backend="eager")
    assert_gradients(compiled, penalty_of(score_of(call, "reference")), drawn(call))


@each_function
def test_a_penalty_around_a_compiled_call(call):
    graphs: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(str(graph.graph))
        return graph

    score = torch.compile(score_of(call, "cpu"), backend=keep, fullgraph=True)
    assert_gradients(penalty_of(score), penalty_of(score_of(call, "reference")), drawn(call))
    assert "torch.ops.vtclip" in graphs[0]
    assert "autograd_function_apply" not in graphs[0]


@each_function
def test_a_compiled_backward_with_a_graph(call):
    leaves = drawn(call)

    def gradients(impl: str) -> list[Tensor]:
        for leaf in leaves:
            leaf.grad = None

        def step(*tensors: Tensor) -> Tensor:
            value = score_of(call, impl)(*tensors)
            value.backward(create_graph=True)
            return value + sum(tensor.grad.square().sum() for tensor in tensors)

        if impl == "cpu":
            step = torch.compile(step, backend="eager")
        found = torch.autograd.grad(step(*leaves), leaves)
        for leaf in leaves:
            leaf.grad = None  # breaks the cycle that create_graph makes
        return list(found)

    torch.testing.assert_close(gradients("cpu"), gradients("reference"), rtol=1e-8, atol=1e-8)


@each_function
def test_compiled_autograd_refuses(call):
    compiled = torch.compile(penalty_of(score_of(call, "cpu")), backend="aot_eager")
    leaves = drawn(call)
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(compiled(*leaves), leaves)


def test_linear_layers_side_by_side():
    leaves, fused, plainly = layers()
    whole = torch.compile(penalty_of(fused), backend="eager")
    assert_gradients(whole, penalty_of(plainly), leaves)
    around = torch.compile(penalty_of(torch.compiler.disable(fused)), backend="eager")
    assert_gradients(around, penalty_of(plainly), leaves)
    for backend in ("eager", "aot_eager"):
        assert_gradients(torch.compile(fused, backend=backend, fullgraph=True), plainly, leaves)


@pytest.mark.parametrize("kind", ["vtclip", "rada"])
def test_heads(kind):
    torch.manual_seed(0)
    text, image, spatial = (
        torch.randn(s, dtype=torch.float64) for s in ((3, 8), (2, 8), (2, 4, 8))
    )
    if kind == "vtclip":
        head = VTCLIP(text, num_heads=2, logit_scale=2.0, init="torch")
    else:
        head = RAda(text, num_heads=2, logit_scale=2.0)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    parameters = tuple(head.parameters())

    def penalty(image: Tensor, spatial: Tensor) -> Tensor:
        score = head(image, spatial).logsumexp(-1).sum()
        (slope,) = torch.autograd.grad(score, image, create_graph=True)
        return score + slope.square().sum()

    def gradients(loss: Score) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            loss(image.requires_grad_(), spatial), parameters, materialize_grads=True
        )

    with only_reference():
        expected = gradients(penalty)
    actual = gradients(torch.compile(penalty, backend="eager"))
    assert max(float(grad.abs().max()) for grad in expected) > 1e-3
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)


def test_a_torch_without_the_frame_strategies_disables_compilation_instead(monkeypatch):
    monkeypatch.delattr(torch._C._dynamo.eval_frame, "_FrameAction")

    def backward(x: Tensor) -> bool:
        return torch.compiler.is_compiling()

    kept = never_compiled(backward)
    assert kept is not backward
    assert torch.compile(lambda x: kept(x), backend="eager")(torch.ones(1)) is False
    assert torch.compile(lambda x: backward(x), backend="eager")(torch.ones(1)) is True
