# SPDX-License-Identifier: Apache-2.0
"""Attention of text queries to the spatial features of each image, with its log-sum-exp.

    S[b,h,k,l] = scale * sum_i query[b,h,k,i] * key[b,h,l,i] (+ attn_mask[b,h,k,l] of floats)
    W          = softmax_l(S)          lse = log sum_l exp(S)          over the visible columns l
    out        = dropout(W) @ value    dropout(W) = W * keep / (1 - p), keep = 1 with probability
                                       1 - p for every element, else 0

query [B|1, H, K, d], key [B|1, H, L, d], value [B|1, H, L, v] -> out [B, H, K, v] in the input
dtype, lse [B, H, K] in the accumulation dtype (float32, or float64 for float64 inputs). Masks say
what takes part, as in F.scaled_dot_product_attention:

    key_mask   [B|1, L] bool, True = the column takes part. A masked column does not exist: what
               it holds, NaN included, reaches neither output nor gradient.
    attn_mask  up to four dimensions that broadcast to [B, H, K, L]; bool, True = the score takes
               part, or floats that are added to the scores, where -inf masks and has gradient 0.
               A score that is masked does not exist, but its column does for other queries: there
               NaN in key or value is not kept out.

Where no column is left (all masked, or L = 0) out is 0, lse is -inf and every gradient is 0. This
is the co-attention of VT-CLIP (arXiv 2112.02399, section 3), with the scaled dot product of Vaswani
et al., eq. 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtclip.reference._dtypes import acc_dtype


def visible_scores(
    query: Tensor, key: Tensor, key_mask: Tensor | None, scale: float, attn_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """S in the accumulation dtype, -inf where masked, and what is visible, [B|1, H|1, K|1, L]."""
    acc = acc_dtype(query.dtype)
    key, visible = key.to(acc), None
    if key_mask is not None:
        key = key.masked_fill(~key_mask[:, None, :, None], 0.0)
        visible = key_mask[:, None, None, :]
    scores = (query.to(acc) * scale) @ key.transpose(-1, -2)  # [B|1, H, K, L]
    if attn_mask is not None:
        taking_part = attn_mask
        if attn_mask.dtype != torch.bool:
            scores = scores + attn_mask.to(acc)
            taking_part = attn_mask != -torch.inf
        taking_part = taking_part.expand(*taking_part.shape[:-1], key.shape[2])
        visible = taking_part if visible is None else visible & taking_part
    if visible is None:
        return scores, None
    return scores.masked_fill(~visible, -torch.inf), visible


def softmax_weights(scores: Tensor, visible: Tensor | None) -> Tensor:
    """softmax over the visible columns; a row without any becomes 0."""
    if visible is None:
        return torch.softmax(scores, dim=-1)
    empty = ~visible.any(dim=-1, keepdim=True)  # [B|1, H|1, K|1, 1]
    return torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(~visible, 0.0)


def cross_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    scale: float,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the module docstring."""
    scores, visible = visible_scores(query, key, key_mask, scale, attn_mask)
    weights = softmax_weights(scores, visible)
    value = value.to(scores.dtype)
    if key_mask is not None:
        value = value.masked_fill(~key_mask[:, None, :, None], 0.0)
    if visible is not None:
        empty = ~visible.any(dim=-1, keepdim=True)
        lse = torch.logsumexp(scores.masked_fill(empty, 0.0), dim=-1)
        lse = lse.masked_fill(empty.squeeze(-1), -torch.inf)
    else:
        lse = torch.logsumexp(scores, dim=-1)
    if dropout_p > 0:
        if weights.shape[0] == 1:  # every image draws its own
            weights = weights.expand(value.shape[0], *weights.shape[1:])
        weights = torch.dropout(weights, dropout_p, True)
    out = (weights @ value).to(query.dtype)
    return out, lse.expand(out.shape[0], *lse.shape[1:])
