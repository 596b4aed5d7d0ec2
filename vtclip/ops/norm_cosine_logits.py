# SPDX-License-Identifier: Apache-2.0
"""`norm_cosine_logits`: VT-CLIP's tail, from the last hidden state to logits in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtclip.ops._any_order import any_order
from vtclip.ops._autograd import forward_of, only_needed
from vtclip.ops._checks import common_dtype, expect_number, expect_tensors
from vtclip.ops._select import Impl, Problem, select
from vtclip.reference import norm_cosine_logits as reference


@any_order(
    "norm_cosine_logits",
    lambda ctx, hidden, weight, bias, text, image: reference.norm_cosine_logits(
        hidden, weight, bias, text, image, residual=ctx.residual, scale=ctx.scale, eps=ctx.eps
    ),
    statistics=4,
    stores="normalised rows [B, K, C]",
)
class _NormCosineLogits(torch.autograd.Function):
    forward = forward_of("norm_cosine_logits")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.residual, ctx.scale, ctx.eps, ctx.backend = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*tensors, *output)
        ctx.set_materialize_grads(False)  # else one fill per output

    @staticmethod
    def backward(ctx: Any, grad_logits: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad_logits is None:
            return only_needed(ctx)
        grads = ctx.backend.function("norm_cosine_logits_bwd")(
            grad_logits, *ctx.saved_tensors, ctx.residual, ctx.scale, ctx.eps
        )
        return only_needed(ctx, *grads)


def norm_cosine_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    text: Tensor,
    image: Tensor,
    *,
    residual: float = 1.0,
    scale: float = 1.0,
    eps: float = 1e-5,
    impl: Impl | None = None,
) -> Tensor:
    """scale * cos(image_b, text_k + residual * LayerNorm(hidden_bk)); the sum is never stored.

    The last norm of a decoder layer, VT-CLIP's outer residual (arXiv 2112.02399: VT = Attn + T) and
    the cosine classifier, in one pass over `hidden`.

    Args:
        hidden: [B, K, C], the state before the last norm; weight, bias: [C], its affine.
        text: [K, C]; image: [B, C]. Dtypes are promoted to one; under autocast to its dtype.
        residual, scale: finite floats; eps: finite float >= 0, inside the square root.
        impl: None takes the first implementation that can run; a named one runs or raises.

    Returns:
        [B, K] in the (promoted) input dtype, statistics in at least float32. A zero image or a
        zero sum gives logit 0 and gradient 0.

    Raises:
        TypeError: kind, layout or dtype. ValueError: shape, device or value.
        NotImplementedError: the named implementation cannot run this, with its reasons.

    Second derivatives, `vmap` and forward-mode differentiation recompute through the reference,
    which stores rows [B, K, C]; the first time a warning says so.
    """
    op = "norm_cosine_logits"
    expect_tensors(
        op, hidden=(hidden, "B K C"), weight=(weight, "C"), bias=(bias, "C"), text=(text, "K C"),
        image=(image, "B C"),
    )  # fmt: skip
    expect_number(op, residual=residual, scale=scale, eps=eps)
    if eps < 0:
        raise ValueError(f"{op}: eps must be at least 0, got {eps}")
    tensors = common_dtype(hidden, weight, bias, text, image)
    residual, scale, eps = float(residual), float(scale), float(eps)
    chosen = select(Problem(op, hidden.device.type, tensors[0].dtype, hidden.shape[-1]), impl)
    if chosen.name == "reference":
        return reference.norm_cosine_logits(*tensors, residual=residual, scale=scale, eps=eps)
    logits: Tensor = _NormCosineLogits.apply(*tensors, residual, scale, eps, chosen)[0]
    return logits
