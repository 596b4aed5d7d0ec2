# SPDX-License-Identifier: Apache-2.0
"""`cross_attn` and `cross_attn_lse`: one set of text queries attends to every image's tokens."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtclip.ops._any_order import any_order
from vtclip.ops._autograd import forward_of, only_needed
from vtclip.ops._checks import common_dtype, expect_floats, expect_mask, expect_number, expect_shape
from vtclip.ops._select import Impl, Problem, select
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


def validate(
    op: str, tensors: dict[str, Tensor], key_mask: Tensor | None, scale: float | None
) -> tuple[list[Tensor], float, int]:
    """Checked tensors in one dtype, the scale, and the batch size B."""
    expect_floats(op, tensors)
    query, *others = tensors.values()
    specs = {name: (tensor, "B|1 H L d") for name, tensor in tensors.items()}
    specs["query"] = (query, "B|1 H K d")
    if key_mask is not None:
        expect_mask(op, key_mask, query)
        specs["key_mask"] = (key_mask, "B|1 L")
    sizes = expect_shape(op, specs)
    if scale is None:
        scale = default_scale(query)
    else:
        expect_number(op, scale=scale)
    return common_dtype(query, *others), float(scale), sizes["B"]


def _attend(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    scale: float | None,
    impl: Impl | None,
) -> tuple[Tensor, Tensor]:
    tensors = {"query": query, "key": key, "value": value}
    (query, key, value), scale, B = validate(op, tensors, key_mask, scale)
    problem = Problem("cross_attn", query.device.type, query.dtype, query.shape[-1])
    chosen = select(problem, impl)
    if chosen.name == "reference":
        return reference.cross_attn(query, key, value, key_mask, scale)
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
    scale: float | None = None,
    impl: Impl | None = None,
) -> Tensor:
    """softmax(scale * query @ key^T) @ value, with queries that may be shared by the whole batch.

    The layout and meaning of `F.scaled_dot_product_attention`; unlike there, a query of batch size
    1 is neither copied nor expanded, and its gradient is summed over the images inside the kernel.
    Equation: Vaswani et al. 2017, eq. 1; as the co-attention of VT-CLIP, arXiv 2112.02399.

    Args:
        query: [B|1, H, K, d], any of float16, bfloat16, float32, float64; d up to 256 in kernels.
        key, value: [B|1, H, L, d]. Mixed dtypes are promoted; under autocast all take its dtype.
        key_mask: [B|1, L] bool, True = attend. A masked column does not exist (NaN there is
            harmless); where no column is left the output and all gradients are 0.
        scale: finite float, 1 / sqrt(d) by default.
        impl: None takes the first implementation that can run; a named one runs or raises.

    Returns:
        [B, H, K, d] in the (promoted) input dtype, accumulated in at least float32.

    Raises:
        TypeError: kind, layout or dtype of an argument. ValueError: shape, device or value.
        NotImplementedError: the named implementation cannot run this, with its reasons.

    Deterministic. Second derivatives, `vmap` and forward-mode differentiation recompute through the
    reference, which stores the weights [B, H, K, L]; the first time a warning says so.
    """
    return _attend("cross_attn", query, key, value, key_mask, scale, impl)[0]


def cross_attn_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    impl: Impl | None = None,
) -> AttnLSE:
    """`cross_attn` together with lse[b,h,k] = log sum_l exp(scale * query . key), differentiable.

    lse is float32 (float64 for float64 inputs), -inf where no column is visible. Arguments,
    errors and limits are those of `cross_attn`.
    """
    return AttnLSE(*_attend("cross_attn_lse", query, key, value, key_mask, scale, impl))
