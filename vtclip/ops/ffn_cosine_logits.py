# SPDX-License-Identifier: Apache-2.0
"""`ffn_cosine_logits`: VT-CLIP's tail from the feed-forward layer's hidden units to logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtclip.ops._any_order import any_order
from vtclip.ops._autograd import forward_of, only_needed
from vtclip.ops._checks import common_dtype, expect_number, expect_tensors
from vtclip.ops._select import Impl, Problem, select
from vtclip.reference import ffn_cosine_logits as reference


@any_order(
    "ffn_cosine_logits",
    lambda ctx, hidden, weight, bias, residual_input, norm_weight, norm_bias, text, image: (
        reference.ffn_cosine_logits(
            hidden, weight, bias, residual_input, norm_weight, norm_bias, text, image,
            residual=ctx.residual, scale=ctx.scale, eps=ctx.eps,
        )
    ),
    statistics=2,
    stores="rows of z [B, K, C]",
)  # fmt: skip
class _FfnCosineLogits(torch.autograd.Function):
    forward = forward_of("ffn_cosine_logits")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.residual, ctx.scale, ctx.eps, ctx.backend = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # no zeros for the statistics
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx: Any, grad_logits: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad_logits is None:
            return only_needed(ctx)
        feature_grads = ctx.needs_input_grad[6] or ctx.needs_input_grad[7]
        grads = ctx.backend.function("ffn_cosine_logits_bwd")(
            grad_logits, *ctx.saved_tensors, ctx.residual, ctx.scale, feature_grads
        )
        return only_needed(ctx, *grads)


def ffn_cosine_logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual_input: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    text: Tensor,
    image: Tensor,
    *,
    residual: float = 1.0,
    scale: float = 1.0,
    eps: float = 1e-5,
    impl: Impl | None = None,
) -> Tensor:
    """scale * cos(image_b, text_k + residual * LayerNorm(z_bk)); z is never stored as a whole.

        z = residual_input + hidden @ weight^T + bias

    Equal to `norm_cosine_logits` of z, norm_weight, norm_bias, text and image: the second matrix of
    a decoder layer's feed-forward part, its last norm, VT-CLIP's outer residual and the cosine
    classifier. What is kept for the backward are seven numbers per row; z is recomputed there.

    Memory of the product hidden @ weight^T: the CPU kernels compute z in their own tiles, 96 rows
    at a time. The Triton and CUDA C++ kernels read a workspace of up to 16384 rows, at least those
    of one image, that torch.mm fills: max(K, 16384) * C elements of the inputs' dtype, less where
    B * K is less. The reference stores all of z.

    Args:
        hidden: [B, K, F], after the activation; weight: [C, F]; bias: [C].
        residual_input: [B, K, C], the state the feed-forward part is added to.
        norm_weight, norm_bias: [C], the norm's affine; text: [K, C]; image: [B, C]. Dtypes are
            promoted to one; under autocast to its dtype.
        residual, scale: finite floats; eps: finite float >= 0, inside the square root.
        impl: None takes the first implementation that can run; a named one runs or raises.

    Returns:
        [B, K] in the (promoted) input dtype, statistics in at least float32. A zero image or a
        zero sum gives logit 0 and gradient 0.

    Raises:
        TypeError: kind, layout or dtype. ValueError: shape, device or value.
        NotImplementedError: the named implementation cannot run this, with its reasons.

    Second derivatives, `vmap` and forward-mode differentiation recompute through the reference,
    which stores all of z [B, K, C]; the first time a warning says so.
    """
    op = "ffn_cosine_logits"
    expect_tensors(
        op, hidden=(hidden, "B K F"), weight=(weight, "C F"), bias=(bias, "C"),
        residual_input=(residual_input, "B K C"), norm_weight=(norm_weight, "C"),
        norm_bias=(norm_bias, "C"), text=(text, "K C"), image=(image, "B C"),
    )  # fmt: skip
    expect_number(op, residual=residual, scale=scale, eps=eps)
    if eps < 0:
        raise ValueError(f"{op}: eps must be at least 0, got {eps}")
    tensors = common_dtype(
        hidden, weight, bias, residual_input, norm_weight, norm_bias, text, image
    )
    residual, scale, eps = float(residual), float(scale), float(eps)
    chosen = select(Problem(op, hidden.device.type, tensors[0].dtype, weight.shape[0]), impl)
    if chosen.name == "reference":
        return reference.ffn_cosine_logits(*tensors, residual=residual, scale=scale, eps=eps)
    logits: Tensor = _FfnCosineLogits.apply(*tensors, residual, scale, eps, chosen)[0]
    return logits
