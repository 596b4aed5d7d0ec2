# SPDX-License-Identifier: Apache-2.0
"""`unit_products`: normalised image and text rows and their element-wise products in one pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtclip.ops._any_order import any_order
from vtclip.ops._autograd import forward_of, only_needed
from vtclip.ops._checks import common_dtype, expect_number, expect_tensors
from vtclip.ops._select import Impl, Problem, select
from vtclip.reference import unit_products as reference


class UnitProducts(NamedTuple):
    """image [B, D], text [K, D] and products [B, K, D]; see `unit_products`."""

    image: Tensor
    text: Tensor
    products: Tensor


@any_order(
    "unit_products",
    lambda ctx, image, text: reference.unit_products(image, text, ctx.scale),
    outputs=3,
    stores="rows and products in float32 at least",
)
class _UnitProducts(torch.autograd.Function):
    forward = forward_of("unit_products")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        image, text, ctx.scale, ctx.backend = inputs
        ctx.save_for_backward(image, text)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        function = ctx.backend.function("unit_products_bwd")
        return only_needed(ctx, *function(*grads, *ctx.saved_tensors, ctx.scale))


def unit_products(
    image: Tensor, text: Tensor, *, scale: float = 1.0, impl: Impl | None = None
) -> UnitProducts:
    """Rows brought to length sqrt(scale), and scale times RAda's rational matrix.

        v[b] = sqrt(scale) * image[b] / |image[b]|     t[k] = sqrt(scale) * text[k] / |text[k]|
        products[b,k] = v[b] * t[k]                    element-wise

    RAda, arXiv 2507.15480. A zero row stays 0 and has gradient 0; a NaN stays in its row and in
    that row's products.

    Args:
        image: [B, D]; text: [K, D]. Dtypes are promoted to one; under autocast to its dtype.
        scale: finite float above 0.
        impl: None takes the first implementation that can run; a named one runs or raises.

    Returns:
        v [B, D], t [K, D] and products [B, K, D], contiguous, in the (promoted) input dtype. Each
        is rounded once, from values of at least float32.

    Raises:
        TypeError: kind, layout or dtype. ValueError: shape, device or value.
        NotImplementedError: the named implementation cannot run this, with its reasons.

    Second derivatives, `vmap` and forward-mode differentiation recompute through the reference; the
    first time a warning says so.
    """
    op = "unit_products"
    expect_tensors(op, image=(image, "B D"), text=(text, "K D"))
    expect_number(op, scale=scale)
    if not scale > 0:
        raise ValueError(f"{op}: scale must be above 0, got {scale}")
    image, text = common_dtype(image, text)
    chosen = select(Problem(op, image.device.type, image.dtype, image.shape[-1]), impl)
    if chosen.name == "reference":
        return UnitProducts(*reference.unit_products(image, text, float(scale)))
    return UnitProducts(*_UnitProducts.apply(image, text, float(scale), chosen))
