# SPDX-License-Identifier: Apache-2.0
"""`cross_attn` and `cross_attn_lse`: one set of text queries attends to every image's tokens."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtclip.ops._any_order import any_order
from vtclip.ops._attn_options import (
    chosen_for,
    expect_attn_mask,
    expect_dropout,
    expect_flag,
    expect_heads,
    in_groups,
    masks_of,
    out_of_groups,
    per_query_head,
    refuse_causal,
    widened,
)
from vtclip.ops._autograd import forward_of, only_needed
from vtclip.ops._checks import common_dtype, expect_floats, expect_mask, expect_number, expect_shape
from vtclip.ops._select import Backend, Impl
from vtclip.reference import cross_attn as reference


class AttnLSE(NamedTuple):
    """out [B, H, K, d] and lse [B, H, K]; see `cross_attn_lse`."""

    out: Tensor
    lse: Tensor


@any_order(
    "cross_attn",
    lambda ctx, query, key, value, key_mask: reference.cross_attn(
        query, key, value, key_mask, ctx.scale
    ),
    outputs=2,
    stores="weights [B, H, K, L]",
)
class _CrossAttn(torch.autograd.Function):
    forward = forward_of("cross_attn")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        query, key, value, key_mask, ctx.scale, ctx.backend = inputs
        ctx.save_for_backward(query, key, value, key_mask, *output)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        if grad_out is None and grad_lse is None:
            return only_needed(ctx)
        query, key, value, key_mask, out, lse = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        grads = ctx.backend.function("cross_attn_bwd")(
            grad_out, grad_lse, query, key, value, key_mask, out, lse, ctx.scale
        )
        return only_needed(ctx, *grads)


def default_scale(query: Tensor) -> float:
    """1 / sqrt(d), as F.scaled_dot_product_attention; 1 where d is 0."""
    return 1.0 / math.sqrt(query.shape[-1]) if query.shape[-1] else 1.0


def expanded(tensor: Tensor, B: int) -> Tensor:
    """The tensor seen with B rows, which has B or one."""
    return tensor if tensor.shape[0] == B else tensor.expand(B, *tensor.shape[1:])


class Checked(NamedTuple):
    """Arguments of an attention that fit each other, in one dtype."""

    tensors: list[Tensor]
    key_mask: Tensor | None
    attn_mask: Tensor | None  # [B|1, H|1, K|1, L|1], of more than columns
    scale: float
    B: int


# without and with grouped heads
_SPECS = {
    "query": ("B|1 H K d", "B|1 H K d"),
    "key": ("B|1 H L d", "B|1 G L d"),
    "value": ("B|1 H L v", "B|1 G L v"),
}


def validate(
    op: str,
    tensors: dict[str, Tensor],
    key_mask: Tensor | None,
    attn_mask: Tensor | None,
    enable_gqa: bool,
    scale: float | None,
) -> Checked:
    """The checked arguments."""
    expect_floats(op, tensors)
    if enable_gqa is not False:
        expect_flag(op, "enable_gqa", enable_gqa)
    expect_heads(op, tensors, enable_gqa)
    query = tensors["query"]
    form = 1 if enable_gqa else 0  # torch 2.11 compiles no bool as an index
    specs = {name: (tensor, _SPECS[name][form]) for name, tensor in tensors.items()}
    if key_mask is not None:
        expect_mask(op, key_mask, query)
        specs["key_mask"] = (key_mask, "B|1 L")
    sizes = expect_shape(op, specs)
    if attn_mask is not None:
        attn_mask = expect_attn_mask(op, attn_mask, query, sizes)
        key_mask, attn_mask = masks_of(key_mask, attn_mask, sizes)
    if scale is None:
        scale = default_scale(query)
    else:
        expect_number(op, scale=scale)
    return Checked(common_dtype(*tensors.values()), key_mask, attn_mask, float(scale), sizes["B"])


def _attend(
    op: str,
    tensors: dict[str, Tensor],
    key_mask: Tensor | None,
    attn_mask: Tensor | None,
    dropout_p: float,
    enable_gqa: bool,
    scale: float | None,
    impl: Impl | None,
) -> tuple[Tensor, Tensor]:
    if dropout_p != 0:
        expect_dropout(op, dropout_p)
    checked = validate(op, tensors, key_mask, attn_mask, enable_gqa, scale)
    query, key, value = checked.tensors
    d, v = query.shape[-1], value.shape[-1]
    wide = max(d, v)
    attn_mask = checked.attn_mask
    chosen = chosen_for("cross_attn", query, wide, impl, attn_mask=attn_mask, dropout_p=dropout_p)
    H, K = query.shape[1:3]
    if chosen.name == "reference":
        if key.shape[1] != H:
            key, value = per_query_head(key, H), per_query_head(value, H)
        return reference.cross_attn(
            query, key, value, checked.key_mask, checked.scale, attn_mask, dropout_p
        )
    grouped = key.shape[1] != H
    if grouped:
        query = in_groups(query, key.shape[1])
    if d != v:
        query, key, value = (widened(tensor, wide) for tensor in (query, key, value))
    out, lse = _by_kernels(query, key, value, checked, chosen)
    if v != wide:
        out = out[..., :v]
    if grouped:
        out, lse = out_of_groups(out, H, K), out_of_groups(lse, H, K)
    return out, lse


def _by_kernels(
    query: Tensor, key: Tensor, value: Tensor, checked: Checked, chosen: Backend
) -> tuple[Tensor, Tensor]:
    """Of heads and widths that are the same in all."""
    _, key_mask, _, scale, B = checked
    one_image = key.shape[0] == value.shape[0] == 1 and (key_mask is None or key_mask.shape[0] == 1)
    if one_image and query.shape[0] != 1:
        # one image, many query sets: the sets are one longer set, [B, H, K, d] -> [1, H, B*K, d]
        K, d = query.shape[2:]
        long = query.transpose(0, 1).reshape(1, query.shape[1], B * K, d)
        out, lse = _CrossAttn.apply(long, key, value, key_mask, scale, chosen)
        return (
            out[0].unflatten(1, (B, K)).transpose(0, 1),
            lse[0].unflatten(1, (B, K)).transpose(0, 1),
        )
    key, value = expanded(key, B), expanded(value, B)
    out, lse = _CrossAttn.apply(query, key, value, key_mask, scale, chosen)
    return out, lse


def cross_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    enable_gqa: bool = False,
    scale: float | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """softmax(scale * query @ key^T) @ value, with queries that may be shared by the whole batch.

    The layout, options and meaning of `F.scaled_dot_product_attention`; unlike there, a query of
    batch size 1 is neither copied nor expanded, and its gradient is summed over the images inside
    the kernel. In all masks True = takes part, as there.
    Equation: Vaswani et al. 2017, eq. 1; as the co-attention of VT-CLIP, arXiv 2112.02399.

    Args:
        query: [B|1, H, K, d], any of float16, bfloat16, float32, float64; d up to 256 in kernels.
        key: [B|1, H, L, d]; value: [B|1, H, L, v]. Mixed dtypes are promoted; under autocast all
            take its dtype. Where v is not d, kernels get copies filled up with zeros.
        key_mask: [B|1, L] bool. A masked column does not exist (NaN there is harmless).
        attn_mask: broadcasts to [B, H, K, L]. A bool mask of columns alone, [B|1, 1, 1, L] or [L],
            is a key_mask to the kernels. Any other one, and one of floats, which are added to the
            scores and have gradients, runs through the reference. It masks scores, not columns:
            NaN in a column that it masks for some queries only is not kept out.
        dropout_p: probability in [0, 1] with which a weight is dropped, drawn by torch's generator
            of the device, so that `torch.manual_seed` repeats it. It always applies: pass 0.0 in
            evaluation. Above 0 it runs through the reference.
        is_causal: False; True is an error that names the mask to give.
        enable_gqa: key and value may have G heads that divide the H of query; query heads
            h * H / G to (h + 1) * H / G - 1 share head h. By kernels, without a copy of key and
            value.
        scale: finite float, 1 / sqrt(d) by default.
        impl: None takes the first implementation that can run; a named one runs or raises.

    Returns:
        [B, H, K, v] in the (promoted) input dtype, accumulated in at least float32. Where masks
        leave a query no column its row and all its gradients are 0.

    Raises:
        TypeError: kind, layout or dtype of an argument. ValueError: shape, device or value.
        NotImplementedError: the named implementation cannot run this, with its reasons.

    Deterministic. What runs through the reference stores the scores or weights [B, H, K, L], and
    the first time a warning says so: attn_mask and dropout_p as above, second derivatives, `vmap`
    and forward-mode differentiation.
    """
    if is_causal is not False:
        refuse_causal("cross_attn", is_causal)
    tensors = {"query": query, "key": key, "value": value}
    return _attend("cross_attn", tensors, key_mask, attn_mask, dropout_p, enable_gqa, scale, impl)[
        0
    ]


def cross_attn_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    attn_mask: Tensor | None = None,
    enable_gqa: bool = False,
    scale: float | None = None,
    impl: Impl | None = None,
) -> AttnLSE:
    """`cross_attn` together with lse[b,h,k] = log sum_l exp(scale * query . key), differentiable.

    lse is float32 (float64 for float64 inputs), with a float attn_mask added to the scores, and
    -inf where no column is visible. Arguments, errors and limits are those of `cross_attn`.
    """
    op, tensors = "cross_attn_lse", {"query": query, "key": key, "value": value}
    return AttnLSE(*_attend(op, tensors, key_mask, attn_mask, 0.0, enable_gqa, scale, impl))
