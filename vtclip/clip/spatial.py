# SPDX-License-Identifier: Apache-2.0
"""Kinds of spatial features (see vtclip.clip) and the vision towers that compute them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def visual_kind(visual: Any, open_clip: Any) -> str:
    """resnet, vit or timm; towers without spatial features: pooler, trunk or other."""
    if isinstance(visual, open_clip.modified_resnet.ModifiedResNet):
        return "resnet"
    if isinstance(visual, open_clip.transformer.VisionTransformer):
        return "vit" if visual.attn_pool is None else "pooler"
    if isinstance(visual, open_clip.timm_model.TimmModel):
        return "timm" if hasattr(visual.trunk, "forward_intermediates") else "trunk"
    return "other"


def spatial_widths(kind: str, visual: Any, width: int) -> dict[str, int]:
    """Spatial options of a tower of that kind and their widths Cs; `width` is the joint one."""
    if kind == "resnet":
        return {"raw": int(visual.attnpool.v_proj.in_features), "pooled": width, "value": width}
    if kind == "vit":
        return {"raw": int(visual.ln_post.normalized_shape[0]), "projected": width}
    if kind == "timm":  # of its last block: some trunks widen once more before they pool
        return {"raw": int(visual.trunk.feature_info[-1]["num_chs"])}
    return {}


def attention_pool(pool: Any, image_map: Tensor) -> Tensor:
    """The whole attention pool with every token as a query: [B, C, h, w] to [B, 1 + h*w, D].

    Token 0 queries with the mean and is the model's global feature; the others are the positions.
    """
    tokens = image_map.flatten(2).transpose(1, 2)  # [B, L, C]
    tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
    if tokens.shape[1] != pool.positional_embedding.shape[0]:
        raise ValueError(
            f"encode_image: pixels must give {pool.positional_embedding.shape[0] - 1} "
            f"positions, got {tokens.shape[1] - 1}"
        )
    tokens = tokens + pool.positional_embedding

    def heads(x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], pool.num_heads, -1).transpose(1, 2)  # [B, H, 1 + L, d]

    mixed = functional.scaled_dot_product_attention(
        heads(pool.q_proj(tokens)), heads(pool.k_proj(tokens)), heads(pool.v_proj(tokens))
    )
    out: Tensor = pool.c_proj(mixed.transpose(1, 2).flatten(2))
    return out
