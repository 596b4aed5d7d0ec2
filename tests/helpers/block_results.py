# SPDX-License-Identifier: Apache-2.0
"""What the block code of a kernel returned, against the reference in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from vtclip import testing
from vtclip.testing.problems import tensors_of


def reference(
    op: Callable, inputs: Sequence[Tensor | None], seeds: Sequence[Tensor | None], **fixed: object
) -> tuple[list[Tensor], Callable[[], list[Tensor | None]]]:
    """Outputs, and a function that returns the gradients of all inputs, None where one is None."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    outputs = tensors_of(op(*leaves, impl="reference", **fixed))

    def gradients() -> list[Tensor | None]:
        pairs = [(o, s.to(o.dtype)) for o, s in zip(outputs, seeds, strict=True) if s is not None]
        outs, grads = zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True)
        left = iter(torch.autograd.grad(outs, [t for t in leaves if t is not None], grads))
        return [None if leaf is None else next(left) for leaf in leaves]

    return [out.detach() for out in outputs], gradients


def compare(
    results: Mapping[str, Tensor],
    op: Callable,
    inputs: Sequence[Tensor | None],
    seeds: Sequence[Tensor | None],
    floors: Mapping[str, float] | None = None,
    **fixed: object,
) -> None:
    """Holds results to the budget, in the order of outputs and, named "d_...", gradients if any."""
    sides = []
    for leaves in ([t if t is None else t.double() for t in inputs], inputs):
        outputs, gradients = reference(op, leaves, seeds, **fixed)
        some = any(name.startswith("d_") for name in results)
        sides.append([*outputs, *(gradients() if some else ())])
    for (name, actual), oracle, peer in zip(results.items(), *sides, strict=True):
        if oracle is not None:
            factor = testing.GRADIENT_FACTOR if name[:2] == "d_" else testing.FORWARD_FACTOR
            floor = (floors or {}).get(name, 0.0)
            testing.assert_within_budget(
                actual, oracle, peer, factor=factor, name=name, floor=floor
            )
