# SPDX-License-Identifier: Apache-2.0
"""Every operator, of any sizes, in any memory, dtype and magnitude, with any of its options.

hypothesis draws them: a few dozen calls of each operator and implementation, the same every time.
VTCLIP_FUZZ_SECONDS=60 goes on with others for a minute for each:

    VTCLIP_FUZZ_SECONDS=60 pytest tests/ops/test_any_layout.py
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from floors import floor_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_budget import Results, run, wide
from torch import Tensor

from vtclip import ops, testing
from vtclip.backends import native
from vtclip.ops._select import Problem, select
from vtclip.testing.problems import FUNCTIONS, Function

SECONDS = float(os.environ.get("VTCLIP_FUZZ_SECONDS", "0"))
EXAMPLES = {"cpu": 25, "triton": 8, "reference": 8}
LONG_EXAMPLES = 200  # between two looks at the clock
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MAGNITUDES = (1.0, 1e-3, 30.0)
ROUNDINGS = 4  # that a term goes through: a product, a difference, an exponential or root, a factor
MOVES = 2
MOST_AXES = 5
# inputs without an element beside which others still have gradients
MAY_BE_EMPTY = {
    "ffn_cosine_logits": {"hidden", "weight"},  # no hidden unit: the bias is left
    "unit_products": {"image", "text"},
}
ENDS = st.integers(2, 19) | st.sampled_from((0, 1, 1, 33, 64, 65, 131))


class Layout(NamedTuple):
    """Of a tensor's elements in memory."""

    order: tuple[int, ...]  # its axes, outermost first
    steps: tuple[int, ...]  # of the axes in this order; 1 leaves no gap
    before: int  # elements before the first, which may misalign it
    repeated: int  # the axis of stride 0; none where there is no such axis


@st.composite
def layouts(draw: Any, rank: int) -> Layout:
    order = tuple(draw(st.permutations(range(rank))))
    steps = tuple(draw(st.sampled_from((1, 1, 1, 2, 3))) for _ in range(rank))
    repeated = draw(st.sampled_from((-1, -1, -1, *range(rank))))
    return Layout(order, steps, draw(st.integers(0, 5)), repeated)


def of_rank(layout: Layout, rank: int) -> Layout:
    """For a tensor of fewer axes."""
    order = tuple(axis for axis in layout.order if axis < rank)
    repeated = layout.repeated if layout.repeated < rank else -1
    return Layout(order, layout.steps[:rank], layout.before, repeated)


class Placed(NamedTuple):
    """A tensor that is a part of its holder, all else of which is NaN, or true."""

    tensor: Tensor
    holder: Tensor

    def __repr__(self) -> str:
        tensor = self.tensor
        return f"{[*tensor.shape]} {tensor.dtype} {tensor.stride()} + {tensor.storage_offset()}"


def placed(values: Tensor, layout: Layout) -> Placed:
    """`values` in memory of their own, or the first along the repeated axis for all."""
    stride, strides = 1, [0] * values.dim()
    for axis, step in zip(reversed(layout.order), layout.steps, strict=True):
        if axis != layout.repeated:
            strides[axis] = stride * step
            stride *= step * max(1, values.shape[axis])
    fill = True if values.dtype == torch.bool else torch.nan
    holder = torch.full((layout.before + stride + 3,), fill, dtype=values.dtype)
    tensor = holder.as_strided(values.shape, strides, layout.before)
    if values.numel():
        once = values
        if layout.repeated >= 0:
            once = values.narrow(layout.repeated, 0, 1)
        tensor.as_strided(once.shape, strides).copy_(once)
    return Placed(tensor, holder)


class Drawn(NamedTuple):
    """A call: the function, its tensors by name, its options, and where everything lies."""

    name: str
    variant: str
    inputs: dict[str, Placed]
    fixed: dict[str, Any]
    mask: Placed | None
    seeds: list[Layout]  # of the gradients of the outputs, in turn
    frozen: tuple[str, ...]
    seed: int


def names_of(call: Function) -> tuple[str, ...]:
    if call.name == "rational_attn_packed":
        return ("image_query", "text_query", "pairs")
    return call.op.differentiable


def options(draw: Any, call: Function) -> dict[str, Any]:
    """Keywords besides those that the variant has."""
    fixed: dict[str, Any] = dict(call.keywords)
    if "H" in call.op.sizes:
        fixed["scale"] = draw(st.sampled_from((None, 0.3, 1.0)))
    else:
        fixed["scale"] = draw(st.sampled_from((1.0, 7.0, 100.0)))
    if "residual" in call.op.arguments:
        fixed["residual"] = draw(st.sampled_from((1.0, 0.2)))
    return fixed


@st.composite
def calls(draw: Any, name: str, dtypes: tuple[torch.dtype, ...], most: int) -> Drawn:
    usual = FUNCTIONS[name]
    variant, call = draw(st.sampled_from([("", usual), *usual.variants()]))
    sizes = {letter: min(most, draw(ENDS)) for letter in call.op.sizes}
    few = 5 if most > 19 else 3  # of what only repeats the rest
    sizes |= {letter: min(few, sizes[letter]) for letter in "BH" if letter in sizes}
    dtype, seed = draw(st.sampled_from(dtypes)), draw(st.integers(0, 2**20))
    torch.manual_seed(seed)
    inputs = {}
    for argument, tensor in zip(names_of(call), call.draw(sizes, seed=None), strict=True):
        values = (tensor.detach() * draw(st.sampled_from(MAGNITUDES))).to(dtype)
        inputs[argument] = placed(values, draw(layouts(values.dim())))
    mask = None
    if "key_mask" in call.op.arguments and draw(st.booleans()):
        mask = placed(torch.rand(sizes["B"], sizes["L"]) < 0.7, draw(layouts(2)))
    frozen = tuple(n for n in inputs if draw(st.sampled_from((False, False, False, True))))
    seeds = [draw(layouts(MOST_AXES)) for _ in range(2)]
    return Drawn(name, variant, inputs, options(draw, call), mask, seeds, frozen, seed)


def copied(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def same_memory(one: Tensor, other: Tensor) -> bool:
    return one.view(torch.uint8).equal(other.view(torch.uint8))


def rooms(
    drawn: Drawn,
    inputs: dict[str, Tensor],
    fixed: dict[str, Any],
    seeds: list[Tensor],
    oracle: Results,
    impl: str,
) -> dict[str, float]:
    """What is added to the budget of each output and gradient.

    A peer that rounds a handful of numbers may be exact in them by luck, and among thousands of
    calls one is. So there is room for one rounding step of the largest number, and for `ROUNDINGS`
    of the terms that cancel (`floors.py`) and of the inputs: how far the exact results move where
    each number that goes in moves by a step of the type that sums are computed in. In float64 this
    is the only measure of how ill-conditioned a problem is.
    """
    dtype = seeds[0].dtype
    step = torch.finfo(dtype).eps
    last = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    exact = wide(inputs)
    terms: dict[str, float] = {}
    floor = floor_of(FUNCTIONS[drawn.name], exact=impl != "triton")
    empty = {name for name, tensor in inputs.items() if not tensor.numel()}
    if floor and empty <= MAY_BE_EMPTY.get(drawn.name, set()):
        terms = floor(exact, seeds, wide(fixed))
    kept = named(oracle)
    moves = dict.fromkeys(kept, 0.0)
    for _ in range(MOVES):
        near = {n: t * (1 + last * torch.randn_like(t).sign()) for n, t in exact.items()}
        turned = [s.double() * (1 + last * torch.randn_like(s.double()).sign()) for s in seeds]
        moved = run(getattr(ops, drawn.name), near, wide(fixed), "reference", turned, drawn.frozen)
        for name, result in named(moved).items():
            moves[name] = max(moves[name], largest(result - kept[name]))
    return {
        name: step * largest(kept[name]) + ROUNDINGS * (step * terms.get(name, 0.0) + moves[name])
        for name in kept
    }


def named(results: Results) -> dict[str, Tensor]:
    """Outputs and gradients by the names that floors have."""
    outputs = {f"output {i}": out for i, out in enumerate(results.outputs)}
    return outputs | results.grads


def largest(tensor: Tensor) -> float:
    return float(tensor.abs().nan_to_num(0.0, 0.0, 0.0).amax()) if tensor.numel() else 0.0


def wrong_in(drawn: Drawn, impl: str, exactly: bool) -> list[str]:
    """What `impl` gets wrong, a line each."""
    op = getattr(ops, drawn.name)
    given = {name: one.tensor for name, one in drawn.inputs.items()}
    mask = {"key_mask": drawn.mask.tensor} if drawn.mask else {}
    inputs = {name: copied(tensor) for name, tensor in given.items()}
    fixed = drawn.fixed | {name: copied(tensor) for name, tensor in mask.items()}
    dtype = next(iter(inputs.values())).dtype
    outputs = run(op, inputs, fixed, "reference", None, tuple(inputs)).outputs
    torch.manual_seed(drawn.seed)
    gradients = [
        placed(torch.randn(out.shape).to(out.dtype), of_rank(layout, out.dim()))
        for out, layout in zip(outputs, itertools.cycle(drawn.seeds), strict=False)
    ]
    seeds = [one.tensor for one in gradients]
    plain = [copied(seed) for seed in seeds]
    peer = run(op, inputs, fixed, "reference", plain, drawn.frozen)
    oracle = run(op, wide(inputs), wide(fixed), "reference", plain, drawn.frozen)
    room = rooms(drawn, inputs, fixed, plain, oracle, impl)
    held = [*drawn.inputs.values(), *([drawn.mask] if drawn.mask else []), *gradients]
    before = [one.holder.clone() for one in held]
    found = run(op, given, drawn.fixed | mask, impl, seeds, drawn.frozen)
    again = run(op, inputs, fixed, impl, plain, drawn.frozen)
    wrong = []
    for one, saved in zip(held, before, strict=True):
        if not same_memory(one.holder, saved):
            wrong.append("an input, or what lies around it, was written")

    def check(name: str, factor: float, actual: Tensor, other: Tensor, *budget: Tensor) -> None:
        overflows = budget[0].abs() > torch.finfo(dtype).max / 2
        try:
            if not overflows.any():
                testing.assert_within_budget(
                    actual, *budget, factor=factor, name=name, floor=room[name]
                )
        except AssertionError as error:
            wrong.append(str(error))
        if exactly and not same_memory(actual.contiguous(), other.contiguous()):
            wrong.append(f"{name}: other bits than of a contiguous copy")

    rows = zip(found.outputs, again.outputs, oracle.outputs, peer.outputs, strict=True)
    for i, row in enumerate(rows):
        check(f"output {i}", testing.FORWARD_FACTOR, *row)
    for name, grad in found.grads.items():
        row = (grad, again.grads[name], oracle.grads[name], peer.grads[name])
        check(name, testing.GRADIENT_FACTOR, *row)
    return wrong


def look(property_of: Callable[..., None], strategy: Any, examples: int) -> None:
    """Some examples, and with VTCLIP_FUZZ_SECONDS others until the time is over."""
    common: dict[str, Any] = {"deadline": None, "database": None, "report_multiple_bugs": False}
    common["suppress_health_check"] = list(HealthCheck)
    settings(max_examples=examples, derandomize=True, **common)(given(strategy)(property_of))()
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        settings(max_examples=LONG_EXAMPLES, **common)(given(strategy)(property_of))()


@pytest.mark.parametrize("impl", EXAMPLES)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_memory_and_options_do_not_change_a_result(name, impl):
    op = FUNCTIONS[name].op.name
    dtypes = DTYPES if impl != "triton" else DTYPES[:3]
    try:
        select(Problem(op, "cpu", torch.float32, 8), impl)
    except NotImplementedError as refused:
        pytest.skip(str(refused))

    def holds(drawn: Drawn) -> None:
        wrong = wrong_in(drawn, impl, exactly=impl == "cpu")
        assert not wrong, "\n".join(wrong)

    look(holds, calls(name, dtypes, 131 if impl == "cpu" else 19), EXAMPLES[impl])


def dense(value: Any) -> Any:
    """A tensor as a kernel sees it that does not look at its strides."""
    if not isinstance(value, Tensor) or not value.numel():
        return value
    elements = value.untyped_storage().nbytes() // value.element_size()
    if value.storage_offset() + value.numel() > elements:
        return value
    return value.as_strided(value.shape, copied(value).stride())


def written_behind(value: Any) -> Any:
    """As it was, after a write behind its last element."""
    if isinstance(value, Tensor) and value.is_floating_point():
        elements = value.untyped_storage().nbytes() // value.element_size()
        value.as_strided((min(1, elements),), (1,), max(0, elements - 1)).zero_()
    return value


@pytest.mark.skipif(bool(native.load_cpu()), reason="vtclip._C is not built")
@pytest.mark.parametrize("fault", [dense, written_behind])
@pytest.mark.parametrize("name", ["cosine_logits", "cross_attn", "rational_head"])
def test_a_kernel_with_a_fault_is_found(name, fault, monkeypatch):
    function = native.CPU.function

    def faulty(kernel: str) -> Callable[..., Any]:
        return lambda *values: function(kernel)(*map(fault, values))

    monkeypatch.setattr(native.CPU, "function", faulty)
    wrong = []

    def counts(drawn: Drawn) -> None:
        wrong.extend(wrong_in(drawn, "cpu", exactly=True))

    look(counts, calls(name, DTYPES, 9), 10)
    assert wrong
