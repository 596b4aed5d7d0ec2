# SPDX-License-Identifier: Apache-2.0
"""`cross_attn_weights`: the attention map itself, for explanations and for losses on it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtclip.ops._any_order import any_order
from vtclip.ops._attn_options import chosen_for, in_groups, out_of_groups, per_query_head
from vtclip.ops._autograd import forward_of, only_needed
from vtclip.ops._select import Impl
from vtclip.ops.cross_attn import expanded, validate
from vtclip.reference import cross_attn_weights as reference


@any_order(
    "cross_attn_weights",
    lambda ctx, query, key, key_mask: reference.cross_attn_weights(query, key, key_mask, ctx.scale),
    stores="scores [B, H, K, L]",
)
class _CrossAttnWeights(torch.autograd.Function):
    forward = forward_of("cross_attn_weights")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        query, key, key_mask, ctx.scale, ctx.backend = inputs
        ctx.save_for_backward(query, key, key_mask, output)

    @staticmethod
    def backward(ctx: Any, grad_weights: Tensor) -> tuple[Any, ...]:
        query, key, key_mask, weights = ctx.saved_tensors
        if key_mask is not None:
            # a masked column has weight 0; what it holds must not reach d_query as 0 * NaN
            key = key.masked_fill(~key_mask[:, None, :, None], 0.0)
        function = ctx.backend.function("cross_attn_weights_bwd")
        return only_needed(ctx, *function(grad_weights, weights, query, key, ctx.scale))


def cross_attn_weights(
    query: Tensor,
    key: Tensor,
    *,
    key_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    enable_gqa: bool = False,
    scale: float | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """softmax_l(scale * query @ key^T): which tokens each query looks at, differentiable.

    Args:
        query: [B|1, H, K, d]; key: [B|1, H, L, d]; key_mask: [B|1, L] bool, True = takes part.
        attn_mask, enable_gqa: as in `cross_attn`.
        scale: finite float, 1 / sqrt(d) by default.
        impl: None takes the first implementation that can run; a named one runs or raises.

    Returns:
        [B, H, K, L] in the (promoted) input dtype; masked columns are 0, and so is a row without
        a visible column. Every other row sums to 1.

    Raises: as `cross_attn`. The map is stored, so memory grows as B*H*K*L. Second derivatives,
    `vmap` and forward-mode differentiation recompute through the reference.
    """
    op, tensors = "cross_attn_weights", {"query": query, "key": key}
    checked = validate(op, tensors, key_mask, attn_mask, enable_gqa, scale)
    (query, key), key_mask, attn_mask, scale, B = checked
    H, K, d = query.shape[1:]
    chosen = chosen_for(op, query, d, impl, attn_mask=attn_mask)
    if chosen.name == "reference":
        if key.shape[1] != H:
            key = per_query_head(key, H)
        weights = reference.cross_attn_weights(query, key, key_mask, scale, attn_mask)
        return weights.expand(B, *weights.shape[1:])
    key, grouped = expanded(key, B), key.shape[1] != H
    if grouped:
        query = in_groups(query, key.shape[1])
    result: Tensor = _CrossAttnWeights.apply(query, key, key_mask, scale, chosen)
    return out_of_groups(result, H, K) if grouped else result
