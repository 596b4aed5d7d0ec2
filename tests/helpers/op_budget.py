# SPDX-License-Identifier: Apache-2.0
"""The one comparison every operator's tests go through: outputs and gradients of an implementation.

Against the reference in float64, an error may be what the reference makes in the same dtype, times
a factor, plus one rounding step of the result and of the terms that cancel in it (`floor`).

Exceptions, and why they stay. `tests/ops/worst_errors.py` looks for more.

| where | how far | reason |
| --- | --- | --- |
| attention, a weight below 2^-126 of the largest | 1.2e-38 of the terms | it counts 0 |
| float16 `cross_attn_weights`, one below 6e-8 | 6e-8 of the terms | the stored map holds 0 |
| attention on GPUs, scores in thousands | 6e-8 of a weight times the score | log2(e) in it rounds |
| `cosine_logits`, parallel rows of two columns | 6e-8 of the terms | the reference has luck |
| rows of length below 3e-39 | gradients infinite | 1 / length leaves float32 |
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
from torch import Tensor

from vtclip import testing

# (inputs in float64, output gradients, fixed arguments) -> magnitude of the terms that cancel
Floor = Callable[[dict[str, Tensor], list[Tensor], dict[str, object]], dict[str, float]]
Op = Callable[..., Tensor | tuple[Tensor, ...]]


class Results(NamedTuple):
    """Of one call: outputs, gradients by name, and the output gradients used."""

    outputs: list[Tensor]
    grads: dict[str, Tensor]
    seeds: list[Tensor]


def run(
    op: Op,
    inputs: dict[str, Tensor],
    fixed: dict[str, object],
    impl: str,
    seeds: list[Tensor] | None,
    frozen: Collection[str] = (),
) -> Results:
    """Forward and backward of `op`; output gradients are drawn when none are given.

    Tensors named in `frozen` ask for no gradient; where all are, there is no backward.
    """
    leaves = {
        name: tensor.detach().requires_grad_(name not in frozen) for name, tensor in inputs.items()
    }
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    result = op(*leaves.values(), **fixed, impl=impl)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    if seeds is None:
        seeds = [torch.randn(out.shape, dtype=torch.float32).to(out) for out in outputs]
    # an output that is constant by definition has no gradient in the reference
    pairs = [(o, s.to(o)) for s, o in zip(seeds, outputs, strict=True) if o.requires_grad]
    grads: tuple[Tensor, ...] = ()
    if wanted:
        grads = torch.autograd.grad(
            [o for o, _ in pairs], list(wanted.values()), [s for _, s in pairs]
        )
    return Results([out.detach() for out in outputs], dict(zip(wanted, grads, strict=True)), seeds)


def wide(tensors: dict[str, object]) -> dict[str, object]:
    """The same values in float64, where they are numbers with a fraction."""
    return {
        name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in tensors.items()
    }


def out_of_budget(
    op: Op,
    inputs: dict[str, Tensor],
    impl: str,
    *,
    floor: Floor | None = None,
    frozen: Collection[str] = (),
    tf32: bool = False,
    device: str = "cpu",
    **fixed: object,
) -> list[str]:
    """What `impl` gets wrong on `device`, a line each; empty where everything is in budget.

    Oracle and peer are the reference where the inputs lie. With `tf32` the peer's products take
    operands of that precision, whatever the library behind torch.matmul chooses for a shape.
    """
    home = next(iter(inputs.values())).device
    dtype = next(iter(inputs.values())).dtype
    with testing.tf32_products() if tf32 else contextlib.nullcontext():
        peer = run(op, inputs, fixed, "reference", None, frozen)
    exact, exact_fixed = wide(inputs), wide(fixed)
    oracle = run(op, exact, exact_fixed, "reference", peer.seeds, frozen)
    cancelling = floor(exact, peer.seeds, exact_fixed) if floor else {}
    given = {name: tensor.to(device) for name, tensor in inputs.items()}
    placed = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in fixed.items()}
    saved = {name: tensor.clone() for name, tensor in given.items()}
    actual = run(op, given, placed, impl, peer.seeds, frozen)
    wrong = []

    def check(name: str, label: str, factor: float, *tensors: Tensor) -> None:
        step = torch.finfo(dtype).eps * cancelling.get(name, 0.0)
        try:
            testing.assert_within_budget(*tensors, name=label, factor=factor, floor=step)
        except AssertionError as error:
            wrong.append(str(error))

    rows = zip(actual.outputs, oracle.outputs, peer.outputs, strict=True)
    for i, (found, *others) in enumerate(rows):
        check(f"output {i}", f"output {i}", testing.FORWARD_FACTOR, found.to(home), *others)
    for name, found in actual.grads.items():
        others = oracle.grads[name], peer.grads[name]
        label = f"grad_{name} ({dtype})"
        check(name, label, testing.GRADIENT_FACTOR, found.to(home), *others)
    for name, before in saved.items():
        if not (torch.equal(given[name], before) or before.isnan().any()):
            wrong.append(f"{name} was written")
    return wrong
