# SPDX-License-Identifier: Apache-2.0
"""Public operators: tensors positional, the rest keyword-only, `impl=None` takes what can run."""

from vtclip.ops.cosine_logits import cosine_logits
from vtclip.ops.cross_attn import AttnLSE, cross_attn, cross_attn_lse
from vtclip.ops.cross_attn_weights import cross_attn_weights
from vtclip.ops.ffn_cosine_logits import ffn_cosine_logits
from vtclip.ops.norm_cosine_logits import norm_cosine_logits
from vtclip.ops.rational_attn import rational_attn, rational_attn_packed
from vtclip.ops.rational_head import RationalLogits, rational_head
from vtclip.ops.rational_logits import rational_logits
from vtclip.ops.unit_products import UnitProducts, unit_products

__all__ = [
    "AttnLSE",
    "RationalLogits",
    "UnitProducts",
    "cosine_logits",
    "cross_attn",
    "cross_attn_lse",
    "cross_attn_weights",
    "ffn_cosine_logits",
    "norm_cosine_logits",
    "rational_attn",
    "rational_attn_packed",
    "rational_head",
    "rational_logits",
    "unit_products",
]
