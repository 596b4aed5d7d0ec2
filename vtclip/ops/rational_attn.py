# SPDX-License-Identifier: Apache-2.0
"""`rational_attn`: RAda's attention among the classes of each image, without a K x K map."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtclip.ops._any_order import any_order, is_transformed
from vtclip.ops._autograd import bound_once, forward_of, only_needed
from vtclip.ops._checks import common_dtype, expect_floats, expect_number, expect_tensors
from vtclip.ops._select import Backend, Impl, Problem, select
from vtclip.ops.cross_attn import default_scale, expanded
from vtclip.reference import rational_attn as reference


def _keep_statistics(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.scale, _, ctx.backend = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


@any_order(
    "rational_attn",
    lambda ctx, image, text, pair, key, value: reference.rational_attn(
        image, text, pair, key, value, ctx.scale
    ),
    statistics=3,
    stores="weights [B, H, K, K] of every query",
)
class _RationalAttn(torch.autograd.Function):
    forward = forward_of("rational_attn")

    setup_context = staticmethod(_keep_statistics)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad_out is None:
            return only_needed(ctx)
        function = ctx.backend.function("rational_attn_bwd")
        image, text, pairs = function(grad_out, *ctx.saved_tensors, ctx.scale)
        return only_needed(ctx, image, text, *_unpacked(pairs))


@any_order(
    "rational_attn_packed",
    lambda ctx, image, text, pairs: reference.rational_attn(
        image, text, *_unpacked(pairs), ctx.scale
    ),
    statistics=3,
    stores="weights [B, H, K, K] of every query",
)
class _RationalAttnPacked(torch.autograd.Function):
    @staticmethod
    @bound_once
    def forward(
        image: Tensor | None,
        text: Tensor | None,
        pairs: Tensor,
        scale: float,
        keep_parts: bool,
        backend: Backend,
    ) -> Any:
        function = backend.function("rational_attn_fwd")
        return function(image, text, *_unpacked(pairs), scale, keep_parts)

    setup_context = staticmethod(_keep_statistics)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad_out is None:
            return only_needed(ctx)
        image, text, pairs, *statistics = ctx.saved_tensors
        function = ctx.backend.function("rational_attn_bwd")
        grads = function(grad_out, image, text, *_unpacked(pairs), *statistics, ctx.scale)
        return only_needed(ctx, *grads)


def _unpacked(pairs: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """[B, K, 2|3, H, d] -> (pair_query or None, key, value), each a view [B, H, K, d]."""
    *query, key, value = pairs.permute(2, 0, 3, 1, 4).unbind()
    return query[0] if query else None, key, value


def rational_attn(
    image_query: Tensor | None,
    text_query: Tensor | None,
    pair_query: Tensor | None,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    temperature: float = 1.0,
    impl: Impl | None = None,
) -> Tensor:
    """Mean over the given queries of K * softmax(query @ key^T * scale / temperature) @ value.

    The softmax is over all K * K entries of a map together. RAda, arXiv 2507.15480, as released:
    the queries are projections of the image, of the class texts and of their products. No map is
    stored: memory grows with B * K * d.

    Args:
        image_query: [B|1, H, 1, d], the same query for every class.
        text_query: [B|1, H, K, d]; with batch 1 it is neither copied nor expanded, and its gradient
            is summed over the images inside the kernel.
        pair_query: [B|1, H, K, d]. Any of the three may be None, not all.
        key, value: [B|1, H, K, d]; any of float16, bfloat16, float32, float64; d up to 256 in
            kernels. Mixed dtypes are promoted; under autocast all take its dtype.
        scale: finite float, 1 / sqrt(d) by default; temperature: finite float above 0.
        impl: None takes the first implementation that can run; a named one runs or raises.

    Returns:
        [B, H, K, d] in the (promoted) input dtype, accumulated in at least float32.

    Raises:
        TypeError: kind, layout or dtype of an argument. ValueError: shape, device or value.
        NotImplementedError: the named implementation cannot run this, with its reasons.

    Deterministic. A NaN reaches every class of its image and head, because the softmax is joint.
    Second derivatives, `vmap` and forward-mode differentiation recompute through the reference,
    which stores the K x K weights of every query; the first time a warning says so.
    """
    op = "rational_attn"
    queries = {"image_query": image_query, "text_query": text_query, "pair_query": pair_query}
    present = {name: query for name, query in queries.items() if query is not None}
    if not present:
        raise ValueError(f"{op}: one of {', '.join(queries)} must be a Tensor, got None for all")
    sizes = _expect_queries(op, present, {"key": (key, "B|1 H K d"), "value": (value, "B|1 H K d")})
    factor = _factor(op, key, scale, temperature)
    tensors = common_dtype(key, value, *present.values())
    chosen = select(Problem(op, key.device.type, tensors[0].dtype, key.shape[-1]), impl)
    ready = {
        name: tensor if name == "text_query" else expanded(tensor, sizes["B"])
        for name, tensor in zip(("key", "value", *present), tensors, strict=True)
    }
    key, value = ready["key"], ready["value"]
    image, text, pair = [ready.get(name) for name in queries]
    if chosen.name == "reference":
        return reference.rational_attn(image, text, pair, key, value, factor)
    keep_parts = _is_backward_possible(tensors)
    out: Tensor = _RationalAttn.apply(image, text, pair, key, value, factor, keep_parts, chosen)[0]
    return out


def rational_attn_packed(
    image_query: Tensor | None,
    text_query: Tensor | None,
    pairs: Tensor,
    *,
    scale: float | None = None,
    temperature: float = 1.0,
    impl: Impl | None = None,
) -> Tensor:
    """`rational_attn` of a pair query, key and value that one projection made.

    Their gradient comes as one tensor too, so that the projection's backward is one product.

    Args:
        image_query, text_query: as in `rational_attn`, either may be None.
        pairs: [B, K, 3, H, d], the pair query, key and value of every image and class; or
            [B, K, 2, H, d], key and value, where there is no pair query.
        scale, temperature, impl: as in `rational_attn`.

    Returns and raises what `rational_attn` does.
    """
    op = "rational_attn_packed"
    queries = {"image_query": image_query, "text_query": text_query}
    present = {name: query for name, query in queries.items() if query is not None}
    expect_floats(op, {"pairs": pairs})
    if pairs.dim() != 5 or pairs.shape[2] not in (2, 3):
        raise ValueError(f"{op}: pairs must be [B, K, 2|3, H, d], got {list(pairs.shape)}")
    if not present and pairs.shape[2] == 2:
        raise ValueError(f"{op}: one of image_query, text_query must be a Tensor, got None for all")
    sizes = _expect_queries(op, present, {"pairs": (pairs, "B K parts H d")})
    factor = _factor(op, pairs, scale, temperature)
    tensors = common_dtype(pairs, *present.values())
    ready = dict(zip(("pairs", *present), tensors, strict=True))
    problem = Problem("rational_attn", pairs.device.type, tensors[0].dtype, pairs.shape[-1])
    chosen = select(problem, impl)
    image, text, pairs = ready.get("image_query"), ready.get("text_query"), ready["pairs"]
    if image is not None:
        image = expanded(image, sizes["B"])
    if chosen.name == "reference":
        return reference.rational_attn(image, text, *_unpacked(pairs), factor)
    keep_parts = _is_backward_possible(tensors)
    function = _RationalAttnPacked.apply
    out: Tensor = function(image, text, pairs, factor, keep_parts, chosen)[0]
    return out


def _is_backward_possible(tensors: list[Tensor]) -> bool:
    if not torch.is_grad_enabled():
        return False
    # an inner transform of torch.func hides from its tensors that an outer one wants gradients
    return any(tensor.requires_grad for tensor in tensors) or is_transformed()


def _expect_queries(
    op: str, queries: dict[str, Tensor], others: dict[str, tuple[Tensor, str]]
) -> dict[str, int]:
    """Sizes of a call's checked tensors; the query of the image has one row."""
    specs = others | {name: (query, "B|1 H K d") for name, query in queries.items()}
    image_query = queries.get("image_query")
    if image_query is not None:
        specs["image_query"] = (image_query, "B|1 H one d")
    sizes = expect_tensors(op, **specs)
    if image_query is not None and image_query.shape[2] != 1:
        wanted = [sizes["B"], sizes["H"], 1, sizes["d"]]
        raise ValueError(
            f"{op}: image_query must be [B|1, H, 1, d] = {wanted}, got {list(image_query.shape)}"
        )
    return sizes


def _factor(op: str, like: Tensor, scale: float | None, temperature: float) -> float:
    """scale / temperature, checked; the default scale is that of the width of `like`."""
    expect_number(op, temperature=temperature)
    if not temperature > 0:
        raise ValueError(f"{op}: temperature must be above 0, got {temperature}")
    if scale is None:
        scale = default_scale(like)
    else:
        expect_number(op, scale=scale)
    return float(scale) / float(temperature)
