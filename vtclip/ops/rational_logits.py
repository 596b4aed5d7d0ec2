# SPDX-License-Identifier: Apache-2.0
"""`rational_logits`: logits from the masked product of image and text features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtclip.ops._any_order import any_order
from vtclip.ops._autograd import forward_of, only_needed
from vtclip.ops._checks import common_dtype, expect_number, expect_tensors
from vtclip.ops._select import Impl, Problem, select
from vtclip.reference import rational_logits as reference


@any_order(
    "rational_logits",
    lambda ctx, image, text, mask: reference.rational_logits(image, text, mask, ctx.scale),
    stores="products [B, K, D]",
)
class _RationalLogits(torch.autograd.Function):
    forward = forward_of("rational_logits")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.scale, ctx.backend = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_logits: Tensor) -> tuple[Any, ...]:
        function = ctx.backend.function("rational_logits_bwd")
        grads = function(grad_logits, *ctx.saved_tensors, ctx.scale)
        return only_needed(ctx, *grads)


def rational_logits(
    image: Tensor, text: Tensor, mask: Tensor, *, scale: float = 1.0, impl: Impl | None = None
) -> Tensor:
    """scale * sum_i relu(1 + mask[b,k,i]) * image[b,i] * text[k,i]; RAda, arXiv 2507.15480.

    Args:
        image: [B, D]; text: [K, D]; mask: [B, K, D], 0 where nothing changes. Used as given: for
            cosines normalise image and text before. Dtypes are promoted to one; under autocast to
            its dtype.
        scale: finite float.
        impl: None takes the first implementation that can run; a named one runs or raises.

    Returns:
        [B, K] in the (promoted) input dtype, accumulated in at least float32.

    Raises:
        TypeError: kind, layout or dtype. ValueError: shape, device or value.
        NotImplementedError: the named implementation cannot run this, with its reasons.

    Second derivatives, `vmap` and forward-mode differentiation recompute through the reference,
    which stores products [B, K, D]; the first time a warning says so.
    """
    op = "rational_logits"
    expect_tensors(op, image=(image, "B D"), text=(text, "K D"), mask=(mask, "B K D"))
    expect_number(op, scale=scale)
    image, text, mask = common_dtype(image, text, mask)
    chosen = select(Problem(op, image.device.type, image.dtype, image.shape[-1]), impl)
    if chosen.name == "reference":
        return reference.rational_logits(image, text, mask, float(scale))
    logits: Tensor = _RationalLogits.apply(image, text, mask, float(scale), chosen)
    return logits
