# SPDX-License-Identifier: Apache-2.0
"""The attention weights themselves: softmax_l(scale * query @ key^T) over the visible columns.

query [B|1, H, K, d], key [B|1, H, L, d], key_mask [B|1, L] bool, attn_mask that broadcasts to
[B, H, K, L] -> [B, H, K, L] in the input dtype, computed in at least float32. Masks as in
cross_attn: masked columns and scores are 0; a row without a visible column is all 0.
"""

from __future__ import annotations

from torch import Tensor

from vtclip.reference.cross_attn import softmax_weights, visible_scores


def cross_attn_weights(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    scale: float,
    attn_mask: Tensor | None = None,
) -> Tensor:
    """The weights of the module docstring."""
    scores, visible = visible_scores(query, key, key_mask, scale, attn_mask)
    return softmax_weights(scores, visible).to(query.dtype)
