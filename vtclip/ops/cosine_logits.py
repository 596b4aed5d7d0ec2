# SPDX-License-Identifier: Apache-2.0
"""`cosine_logits`: CLIP's classifier, with shared or per-image class texts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtclip.ops._any_order import any_order
from vtclip.ops._autograd import forward_of, only_needed
from vtclip.ops._checks import common_dtype, expect_number, expect_tensors
from vtclip.ops._select import Impl, Problem, select
from vtclip.reference import cosine_logits as reference


@any_order(
    "cosine_logits",
    lambda ctx, image, text: reference.cosine_logits(image, text, ctx.scale),
    statistics=2,
    stores="normalised image and text",
)
class _CosineLogits(torch.autograd.Function):
    forward = forward_of("cosine_logits")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        image, text, ctx.scale, ctx.backend = inputs
        _, image_rnorm, text_rnorm = output
        ctx.mark_non_differentiable(image_rnorm, text_rnorm)
        ctx.save_for_backward(image, text, image_rnorm, text_rnorm)
        ctx.set_materialize_grads(False)  # else one fill per output

    @staticmethod
    def backward(ctx: Any, grad_logits: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad_logits is None:
            return only_needed(ctx)
        function = ctx.backend.function("cosine_logits_bwd")
        grads = function(grad_logits, *ctx.saved_tensors, ctx.scale)
        return only_needed(ctx, *grads)


def cosine_logits(
    image: Tensor, text: Tensor, *, scale: float = 1.0, impl: Impl | None = None
) -> Tensor:
    """scale * cos(image, text): CLIP's logits (Radford et al. 2021, figure 3).

    Args:
        image: [B, D], any of float16, bfloat16, float32, float64; need not be normalised.
        text: [K, D], shared by the batch, or [B, K, D], one set per image.
        scale: finite float, CLIP's exp(logit_scale); 100 for OpenAI's models.
        impl: None takes the first implementation that can run; a named one runs or raises.

    Returns:
        [B, K] in the (promoted) input dtype, accumulated in at least float32. A zero vector gives
        logit 0 and gradient 0, never NaN.

    Raises:
        TypeError: kind, layout or dtype. ValueError: shape, device or value.
        NotImplementedError: the named implementation cannot run this, with its reasons.

    Second derivatives, `vmap` and forward-mode differentiation recompute through the reference,
    which stores image and text once more; the first time a warning says so.
    """
    op = "cosine_logits"
    per_image = isinstance(text, Tensor) and text.dim() == 3
    expect_tensors(op, image=(image, "B D"), text=(text, "B K D" if per_image else "K D"))
    expect_number(op, scale=scale)
    image, text = common_dtype(image, text)
    chosen = select(Problem(op, image.device.type, image.dtype, image.shape[-1]), impl)
    if chosen.name == "reference":
        return reference.cosine_logits(image, text, float(scale))
    logits: Tensor = _CosineLogits.apply(image, text, float(scale), chosen)[0]
    return logits
