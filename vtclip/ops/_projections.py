# SPDX-License-Identifier: Apache-2.0
"""Linear layers applied side by side; one GPU kernel computes all their bias gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vtclip.ops._any_order import is_transformed
from vtclip.ops._autograd import bound_once
from vtclip.ops._checks import common_dtype
from vtclip.ops._select import Problem, select
from vtclip.ops._traced import is_exported, never_compiled

MANY_ROWS = 4096  # from here on a sum over rows is worth a kernel of its own


class Layer(NamedTuple):
    """x @ weight^T + bias for x [..., D], weight [N, D], bias [N]."""

    x: Tensor
    weight: Tensor
    bias: Tensor


class _Projections(torch.autograd.Function):
    @staticmethod
    @bound_once
    def forward(one_kernel: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(F.linear(*tensors[i : i + 3]) for i in range(0, len(tensors), 3))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.one_kernel, *tensors = inputs
        ctx.save_for_backward(*(t for i, t in enumerate(tensors) if i % 3 < 2))

    @staticmethod
    @never_compiled
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        saved, needs = ctx.saved_tensors, ctx.needs_input_grad[1:]
        rows = [grad.reshape(-1, grad.shape[-1]) for grad in grads]
        # where a graph of this is wanted, all of it is torch's own
        one_kernel = ctx.one_kernel and not (torch.is_grad_enabled() or is_transformed())
        results: list[Tensor | None] = [None]
        for i, (d_y, d_b) in enumerate(zip(rows, _bias_grads(rows, one_kernel), strict=True)):
            x, weight = saved[2 * i : 2 * i + 2]
            to_x, to_weight, to_bias = needs[3 * i : 3 * i + 3]
            results.append((d_y @ weight).view(x.shape) if to_x else None)
            results.append(d_y.t() @ x.reshape(-1, x.shape[-1]) if to_weight else None)
            results.append(d_b if to_bias else None)
        return tuple(results)


_TRACED = "vtclip::projections"  # a Function in a graph of Dynamo is differentiable once, silently
torch.library.define(_TRACED, "(bool one_kernel, Tensor[] tensors) -> Tensor[]")


def _projections(one_kernel: bool, tensors: list[Tensor]) -> list[Tensor]:
    return list(_Projections.apply(one_kernel, *tensors))


torch.library.impl(_TRACED, "CompositeImplicitAutograd", _projections)


def _bias_grads(rows: list[Tensor], one_kernel: bool) -> list[Tensor]:
    """The sum of each [R, N] over its rows."""
    short = [matrix for matrix in rows if one_kernel and len(matrix) < MANY_ROWS]
    if not short:
        return [matrix.sum(0) for matrix in rows]
    padded = [*short, *[short[0][:, :0]] * (3 - len(short))]
    sums: Tensor = torch.ops.vtclip.column_sums_triton(*padded)
    each = iter(sums.split([matrix.shape[1] for matrix in short]))  # type: ignore[no-untyped-call]
    return [next(each) if len(matrix) < MANY_ROWS else matrix.sum(0) for matrix in rows]


def projections(layers: list[Layer]) -> list[Tensor]:
    """The outputs of one to three layers, of any order of differentiation.

    Plain `F.linear` where no gradient is wanted and under torch.func. Dtypes are promoted to one;
    under autocast to its dtype.
    """
    tensors = common_dtype(*(tensor for layer in layers for tensor in layer))
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if not wanted or is_transformed():
        return [F.linear(*tensors[i : i + 3]) for i in range(0, len(tensors), 3)]
    first = tensors[0]
    # where Triton serves the operators of the same head
    problem = Problem("unit_products", first.device.type, first.dtype, first.shape[-1])
    one_kernel = select(problem, None).name == "triton"
    if torch.compiler.is_compiling() and not is_exported():
        return list(torch.ops.vtclip.projections(one_kernel, tensors))
    return _projections(one_kernel, tensors)
