# SPDX-License-Identifier: Apache-2.0
"""`rational_head`: RAda's output projection, mask, logits and penalty in one pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtclip.names import Penalty
from vtclip.ops._any_order import any_order
from vtclip.ops._autograd import forward_of, only_needed
from vtclip.ops._checks import common_dtype, expect_number, expect_tensors
from vtclip.ops._select import Impl, Problem, select
from vtclip.reference import rational_head as reference
from vtclip.reference._dtypes import PENALTY_CODES, acc_dtype


class RationalLogits(NamedTuple):
    """logits [B, K] and penalty [B]; see `rational_head`."""

    logits: Tensor
    penalty: Tensor


@any_order(
    "rational_head",
    lambda ctx, context, weight, bias, image, text: reference.rational_head(
        context, weight, bias, image, text, scale=ctx.scale, penalty=ctx.penalty
    ),
    outputs=2,
    statistics=1,
    stores="the mask [B, K, D]",
)
class _RationalHead(torch.autograd.Function):
    forward = forward_of("rational_head")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.scale, ctx.penalty, ctx.backend = inputs
        peak = output[2]
        ctx.mark_non_differentiable(peak)
        ctx.save_for_backward(*tensors, peak)
        ctx.set_materialize_grads(False)  # else one fill per output

    @staticmethod
    def backward(
        ctx: Any, grad_logits: Tensor | None, grad_penalty: Tensor | None, _: Any
    ) -> tuple[Any, ...]:
        if grad_logits is None and grad_penalty is None:
            return only_needed(ctx)
        feature_grads = ctx.needs_input_grad[3] or ctx.needs_input_grad[4]
        *tensors, peak = ctx.saved_tensors
        context, penalty = tensors[0], ctx.penalty
        if grad_logits is None:
            grad_logits = context.new_zeros(context.shape[:2])
        if grad_penalty is None:  # nobody used it: as if there were none, and nothing is read
            penalty, peak = PENALTY_CODES["none"], peak[:0]
            grad_penalty = context.new_empty(context.shape[:1], dtype=acc_dtype(context.dtype))
        grads = ctx.backend.function("rational_head_bwd")(
            grad_logits, grad_penalty, *tensors, peak, ctx.scale, penalty, feature_grads
        )
        return only_needed(ctx, *grads)


def rational_head(
    context: Tensor,
    weight: Tensor,
    bias: Tensor,
    image: Tensor,
    text: Tensor,
    *,
    scale: float = 1.0,
    penalty: Penalty = "none",
    impl: Impl | None = None,
) -> RationalLogits:
    """Masked logits and how far the mask is from 1; the mask [B, K, D] is never stored.

        M = context @ weight^T + bias                      E = relu(1 + M) - 1
        logits[b,k] = scale * sum_i relu(1 + M[b,k,i]) * image[b,i] * text[k,i]

    RAda, arXiv 2507.15480, as released. The backward recomputes M.

    Args:
        context: [B, K, D]; weight: [D, D]; bias: [D]; image: [B, D]; text: [K, D]. Used as given.
            Dtypes are promoted to one; under autocast to its dtype.
        scale: finite float.
        penalty: per image "none" 0, "l1" the mean of |E|, "mse" the mean of E^2, "linf" the largest
            |E| (the gradient goes to the first one, as with torch.max).
        impl: None takes the first implementation that can run; a named one runs or raises.

    Returns:
        logits [B, K] in the (promoted) input dtype; penalty [B] in float32 (float64 for float64),
        0 where K or D is 0. Both are differentiable.

    Raises:
        TypeError: kind, layout or dtype. ValueError: shape, device or value.
        NotImplementedError: the named implementation cannot run this, with its reasons.

    Second derivatives, `vmap` and forward-mode differentiation recompute through the reference,
    which stores the mask [B, K, D]; the first time a warning says so.
    """
    op = "rational_head"
    expect_tensors(
        op, context=(context, "B K D"), weight=(weight, "D D"), bias=(bias, "D"),
        image=(image, "B D"), text=(text, "K D"),
    )  # fmt: skip
    expect_number(op, scale=scale)
    if penalty not in PENALTY_CODES:
        names = ", ".join(PENALTY_CODES)
        raise ValueError(f"{op}: penalty must be one of {names}, got {penalty!r}")
    tensors = common_dtype(context, weight, bias, image, text)
    scale, code = float(scale), PENALTY_CODES[penalty]
    chosen = select(Problem(op, context.device.type, tensors[0].dtype, context.shape[-1]), impl)
    if chosen.name == "reference":
        return RationalLogits(*reference.rational_head(*tensors, scale=scale, penalty=code))
    outputs = _RationalHead.apply(*tensors, scale, code, chosen)
    return RationalLogits(*outputs[:2])
