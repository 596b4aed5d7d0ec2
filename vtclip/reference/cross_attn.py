# SPDX-License-Identifier: Apache-2.0
"""Attention of text queries to the spatial features of each image, with its log-sum-exp.

    S[b,h,k,l] = scale * sum_i query[b,h,k,i] * key[b,h,l,i]          over the visible columns l
    out        = softmax_l(S) @ value          lse = log sum_l exp(S)

query [B|1, H, K, d], key and value [B|1, H, L, d], key_mask [B|1, L] bool with True = attend
-> out [B, H, K, d] in the input dtype, lse [B, H, K] in the accumulation dtype (float32, or float64
for float64 inputs). A masked column does not exist: what it holds, NaN included, reaches neither
output nor gradient. Where no column is left (all masked, or L = 0) out is 0, lse is -inf and every
gradient is 0. This is the co-attention of VT-CLIP (arXiv 2112.02399, section 3), with the scaled
dot product of Vaswani et al., eq. 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtclip.reference._dtypes import acc_dtype


def visible_scores(
    query: Tensor, key: Tensor, key_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor | None]:
    """S in the accumulation dtype, -inf at masked columns, and the mask as [B|1, 1, 1, L]."""
    acc = acc_dtype(query.dtype)
    if key_mask is None:
        return (query.to(acc) * scale) @ key.to(acc).transpose(-1, -2), None
    column = key_mask[:, None, None, :]  # [B|1, 1, 1, L]
    visible_key = key.to(acc).masked_fill(~key_mask[:, None, :, None], 0.0)
    scores = (query.to(acc) * scale) @ visible_key.transpose(-1, -2)  # [B, H, K, L]
    return scores.masked_fill(~column, -torch.inf), column


def softmax_weights(scores: Tensor, column: Tensor | None) -> Tensor:
    """softmax over the visible columns; a row without any becomes 0."""
    if column is None:
        return torch.softmax(scores, dim=-1)
    empty = ~column.any(dim=-1, keepdim=True)  # [B|1, 1, 1, 1]
    return torch.softmax(scores.masked_fill(empty, 0.0), dim=-1).masked_fill(~column, 0.0)


def cross_attn(
    query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the module docstring."""
    scores, column = visible_scores(query, key, key_mask, scale)
    weights = softmax_weights(scores, column)
    value = value.to(scores.dtype)
    if key_mask is not None:
        value = value.masked_fill(~key_mask[:, None, :, None], 0.0)
        empty = ~key_mask.any(dim=-1)[:, None, None]  # [B|1, 1, 1]
        lse = torch.logsumexp(scores.masked_fill(empty[..., None], 0.0), dim=-1)
        lse = lse.masked_fill(empty, -torch.inf)
    else:
        lse = torch.logsumexp(scores, dim=-1)
    out = (weights @ value).to(query.dtype)
    return out, lse.expand(out.shape[0], *lse.shape[1:])
