# SPDX-License-Identifier: Apache-2.0
"""Every operator of vtclip, written once: the signature of its fake is its schema.

`vtclip::X` is implemented by the compiled extension (dispatch keys CPU and CUDA),
`vtclip::X_triton` by the Triton launchers. Both share the schema and the fake below. Only torch is
imported here, so tracing and error messages work where neither implementation can load.

Shapes: query [Bq, H, K, d] with Bq in {1, B}; key, value [B, H, L, d]; key_mask [B|1, L] bool.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from vtclip.reference._dtypes import PENALTY_CODES, acc_dtype

Fake = TypeVar("Fake", bound=Callable[..., Any])
SCHEMAS: dict[str, str] = {}  # of the operators that both kinds of backends implement
FAKES: dict[str, Callable[..., Any]] = {}  # of all operators

_SCHEMA_TYPES = {kind: kind for kind in ("Tensor", "float", "int", "bool")}
_SCHEMA_TYPES["Tensor | None"] = "Tensor?"


def argument_types(parameters: Iterable[inspect.Parameter]) -> list[str]:
    """`x: Tensor, scale: float` as torch writes them."""
    return [f"{_SCHEMA_TYPES[parameter.annotation]} {parameter.name}" for parameter in parameters]


def _schema(fake: Callable[..., Any]) -> str:
    """`(x: Tensor, scale: float) -> tuple[Tensor, Tensor]` as torch writes it."""
    signature = inspect.signature(fake)
    arguments = ", ".join(argument_types(signature.parameters.values()))
    results = signature.return_annotation.replace("tuple[", "(").replace("]", ")")
    return f"({arguments}) -> {results}"


def _define(qualified: str, schema: str, fake: Callable[..., Any]) -> None:
    torch.library.define(qualified, schema, tags=(torch.Tag.needs_fixed_stride_order,))
    torch.library.register_fake(qualified, fake)


def operator(fake: Fake) -> Fake:
    """Defines `vtclip::X` and `vtclip::X_triton` for the fake X."""
    name = fake.__name__
    SCHEMAS[name] = _schema(fake)
    _define(f"vtclip::{name}", SCHEMAS[name], fake)
    return triton_operator(fake)


def triton_operator(fake: Fake) -> Fake:
    """Defines `vtclip::X_triton` alone for the fake X."""
    FAKES[fake.__name__] = fake
    _define(f"vtclip::{fake.__name__}_triton", _schema(fake), fake)
    return fake


def _heads_inner(like: Tensor, B: int, N: int, H: int, d: int) -> Tensor:
    # memory [B, N, H, d], seen as [B, H, N, d]: a head can merge (H, d) without a copy
    return like.new_empty((B, N, H, d)).transpose(1, 2)


def _like(tensor: Tensor, wanted: bool = True) -> Tensor:
    # contiguous, whatever the layout of `tensor` is; [0] stands for a gradient nobody asked for
    return tensor.new_empty(tensor.shape if wanted else (0,))


@operator
def cross_attn_fwd(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    B, H, _, d = key.shape
    K = query.shape[2]
    lse = query.new_empty((B, H, K), dtype=acc_dtype(query.dtype))
    return _heads_inner(query, B, K, H, d), lse


@operator
def cross_attn_bwd(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
    key_mask: Tensor | None, out: Tensor, lse: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    Bq, H, K, d = query.shape
    B, _, L, _ = key.shape
    d_query = _heads_inner(query, Bq, K, H, d)
    return d_query, _heads_inner(key, B, L, H, d), _heads_inner(value, B, L, H, d)


@operator
def cross_attn_weights_fwd(
    query: Tensor, key: Tensor, key_mask: Tensor | None, scale: float
) -> Tensor:
    B, H, L, _ = key.shape
    return query.new_empty((B, H, query.shape[2], L))


@operator
def cross_attn_weights_bwd(
    grad_weights: Tensor, weights: Tensor, query: Tensor, key: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    Bq, H, K, d = query.shape
    B, _, L, _ = key.shape
    return _heads_inner(query, Bq, K, H, d), _heads_inner(key, B, L, H, d)


@operator
def cosine_logits_fwd(image: Tensor, text: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    acc = acc_dtype(image.dtype)
    logits = image.new_empty((image.shape[0], text.shape[-2]))
    rnorms = image.new_empty(image.shape[:1], dtype=acc), text.new_empty(text.shape[:-1], dtype=acc)
    return logits, *rnorms


@operator
def cosine_logits_bwd(
    grad_logits: Tensor, image: Tensor, text: Tensor, image_rnorm: Tensor, text_rnorm: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _like(image), _like(text)


@operator
def norm_cosine_logits_fwd(
    hidden: Tensor, weight: Tensor, bias: Tensor, text: Tensor, image: Tensor, residual: float,
    scale: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    B, K, _ = hidden.shape
    acc = acc_dtype(hidden.dtype)
    logits = hidden.new_empty((B, K))
    mean, rstd, row_rnorm = (hidden.new_empty((B, K), dtype=acc) for _ in range(3))
    return logits, mean, rstd, hidden.new_empty((B,), dtype=acc), row_rnorm


@operator
def norm_cosine_logits_bwd(
    grad_logits: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, text: Tensor, image: Tensor,
    logits: Tensor, mean: Tensor, rstd: Tensor, image_rnorm: Tensor, row_rnorm: Tensor,
    residual: float, scale: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _like(hidden), _like(weight), _like(bias), _like(text), _like(image)


@operator
def ffn_cosine_logits_fwd(
    hidden: Tensor, weight: Tensor, bias: Tensor, residual_input: Tensor, norm_weight: Tensor,
    norm_bias: Tensor, text: Tensor, image: Tensor, residual: float, scale: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    # logits, stats, image_rnorm
    # stats: mean and shift (both are subtracted), rstd, 1 / |y|, cosine, mean of g, mean of g zh;
    # g = residual norm_weight (image / |image| - cosine y / |y|). The mean is the implementation's:
    # of z, or of residual_input + bias where the rest of z is centred; its backward reads it.
    B, K, _ = hidden.shape
    acc = acc_dtype(hidden.dtype)
    logits = hidden.new_empty((B, K))
    return logits, hidden.new_empty((7, B, K), dtype=acc), hidden.new_empty((B,), dtype=acc)


@operator
def ffn_cosine_logits_bwd(
    grad_logits: Tensor, hidden: Tensor, weight: Tensor, bias: Tensor, residual_input: Tensor,
    norm_weight: Tensor, norm_bias: Tensor, text: Tensor, image: Tensor, stats: Tensor,
    image_rnorm: Tensor, residual: float, scale: float, feature_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        _like(hidden), _like(weight), _like(bias), _like(residual_input), _like(norm_weight),
        _like(norm_bias), _like(text, feature_grads), _like(image, feature_grads),
    )  # fmt: skip


@operator
def rational_attn_fwd(
    image_query: Tensor | None, text_query: Tensor | None, pair_query: Tensor | None, key: Tensor,
    value: Tensor, scale: float, keep_parts: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    B, H, K, d = key.shape
    acc = acc_dtype(key.dtype)
    kinds = [query for query in (text_query, pair_query) if query is not None] * keep_parts
    parts = key.new_empty((len(kinds), B, K, H, d)).transpose(2, 3)
    image_out = key.new_empty((0 if image_query is None else B, H, d), dtype=acc)
    stats = key.new_empty((3, 2, B, H), dtype=acc)
    return _heads_inner(key, B, K, H, d), parts, image_out, stats


@operator
def rational_attn_bwd(
    grad_out: Tensor, image_query: Tensor | None, text_query: Tensor | None,
    pair_query: Tensor | None, key: Tensor, value: Tensor, parts: Tensor, image_out: Tensor,
    stats: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    # the last: gradients of pair_query (where there is one), key and value
    def grad(like: Tensor | None) -> Tensor:
        if like is None:
            return key.new_empty((0,))
        B, H, K, d = like.shape
        return _heads_inner(key, B, K, H, d)

    B, H, K, d = key.shape
    count = 2 if pair_query is None else 3
    return grad(image_query), grad(text_query), key.new_empty((B, K, count, H, d))


@operator
def rational_logits_fwd(image: Tensor, text: Tensor, mask: Tensor, scale: float) -> Tensor:
    return image.new_empty(mask.shape[:2])


@operator
def rational_logits_bwd(
    grad_logits: Tensor, image: Tensor, text: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _like(image), _like(text), _like(mask)


@operator
def unit_products_fwd(image: Tensor, text: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    B, D = image.shape
    return image.new_empty((B, D)), _like(text), image.new_empty((B, len(text), D))


@operator
def unit_products_bwd(
    grad_image: Tensor, grad_text: Tensor, grad_products: Tensor, image: Tensor, text: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _like(image), _like(text)


@operator
def rational_head_fwd(
    context: Tensor, weight: Tensor, bias: Tensor, image: Tensor, text: Tensor, scale: float,
    penalty: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    B, K, _ = context.shape
    # logits, penalty, peak
    peaks = B if penalty == PENALTY_CODES["linf"] else 0
    return (
        context.new_empty((B, K)),
        context.new_empty((B,), dtype=acc_dtype(context.dtype)),
        context.new_empty((peaks,), dtype=torch.int64),
    )


@operator
def rational_head_bwd(
    grad_logits: Tensor, grad_penalty: Tensor, context: Tensor, weight: Tensor, bias: Tensor,
    image: Tensor, text: Tensor, peak: Tensor, scale: float, penalty: int, feature_grads: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    features = _like(image, feature_grads), _like(text, feature_grads)
    return _like(context), _like(weight), _like(bias), *features


@triton_operator  # a launch saved on a GPU; elsewhere three calls of torch are as good
def column_sums(x0: Tensor, x1: Tensor, x2: Tensor) -> Tensor:
    return x0.new_empty((x0.shape[1] + x1.shape[1] + x2.shape[1],))


@triton_operator  # one pass over VT-CLIP's hidden units saved on a GPU; elsewhere torch's two
def relu_gradient(grad: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), hidden.new_empty((hidden.shape[1],))


@triton_operator  # passes over VT-CLIP's [B, K, C] saved on a GPU; elsewhere torch's own
def sum_norm_fwd(
    product: Tensor, start: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, K, C = product.shape
    shifted = product.new_empty((0,) if shift is None else (B * K, C))
    mean, rstd = (product.new_empty((B, K), dtype=torch.float32) for _ in range(2))
    return product.new_empty((B * K, C)), shifted, mean, rstd


@triton_operator
def sum_norm_bwd(
    grad_out: Tensor, grad_shifted: Tensor, product: Tensor, start: Tensor, weight: Tensor,
    mean: Tensor, rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    B, K, C = product.shape
    return product.new_empty((B, K, C)), start.new_empty((K, C)), weight.new_empty((3, C))
