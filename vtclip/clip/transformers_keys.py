# SPDX-License-Identifier: Apache-2.0
"""Tensors of transformers' CLIPModel and SiglipModel under the names that open_clip has for them.

transformers keeps queries, keys and values apart, open_clip has them in one matrix; projections are
stored transposed where open_clip multiplies from the right. SiglipModel's image encoder becomes
timm's vision transformer, which open_clip uses for SigLIP.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

_IN_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_IN_TRUNK = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "self_attn.out_proj": "attn.proj",
}
_OUTSIDE_CLIP = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "logit_scale": "logit_scale",
}
_OUTSIDE_SIGLIP = {
    "vision_model.embeddings.patch_embedding.weight": "visual.trunk.patch_embed.proj.weight",
    "vision_model.embeddings.patch_embedding.bias": "visual.trunk.patch_embed.proj.bias",
    "vision_model.post_layernorm.weight": "visual.trunk.norm.weight",
    "vision_model.post_layernorm.bias": "visual.trunk.norm.bias",
    "vision_model.head.probe": "visual.trunk.attn_pool.latent",
    "vision_model.head.attention.out_proj.weight": "visual.trunk.attn_pool.proj.weight",
    "vision_model.head.attention.out_proj.bias": "visual.trunk.attn_pool.proj.bias",
    "vision_model.head.layernorm.weight": "visual.trunk.attn_pool.norm.weight",
    "vision_model.head.layernorm.bias": "visual.trunk.attn_pool.norm.bias",
    "vision_model.head.mlp.fc1.weight": "visual.trunk.attn_pool.mlp.fc1.weight",
    "vision_model.head.mlp.fc1.bias": "visual.trunk.attn_pool.mlp.fc1.bias",
    "vision_model.head.mlp.fc2.weight": "visual.trunk.attn_pool.mlp.fc2.weight",
    "vision_model.head.mlp.fc2.bias": "visual.trunk.attn_pool.mlp.fc2.bias",
    "text_model.embeddings.token_embedding.weight": "text.token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "text.positional_embedding",
    "text_model.final_layer_norm.weight": "text.ln_final.weight",
    "text_model.final_layer_norm.bias": "text.ln_final.bias",
    "text_model.head.weight": "text.text_projection.weight",
    "text_model.head.bias": "text.text_projection.bias",
    "logit_scale": "logit_scale",
    "logit_bias": "logit_bias",
}
_LAYER = re.compile(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")


def is_transformers(tensors: dict[str, Tensor]) -> bool:
    """Whether the names are those of transformers' CLIP or SigLIP."""
    return any(name.startswith(("vision_model.", "text_model.")) for name in tensors)


def is_siglip(tensors: dict[str, Tensor]) -> bool:
    return "vision_model.head.probe" in tensors


def to_open_clip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under open_clip's names; an unknown name stays, for the caller to refuse."""
    siglip = is_siglip(tensors)
    outside = _OUTSIDE_SIGLIP if siglip else _OUTSIDE_CLIP
    out: dict[str, Tensor] = {}
    joined: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        layer = _LAYER.fullmatch(name)
        if name.endswith("embeddings.position_ids"):  # 0, 1, 2, ... of older versions
            continue
        if layer is not None:
            _of_layer(layer, value, siglip, out, joined)
        elif name in outside:
            out[outside[name]] = value
        elif name == "visual_projection.weight":
            out["visual.proj"] = value.T.contiguous()
        elif name == "text_projection.weight":
            out["text_projection"] = value.T.contiguous()
        elif siglip and name == "vision_model.embeddings.position_embedding.weight":
            out["visual.trunk.pos_embed"] = value[None]
        elif siglip and name.startswith("vision_model.head.attention.in_proj_"):
            width = value.shape[0] // 3
            kind = name.rpartition("_")[2]
            out[f"visual.trunk.attn_pool.q.{kind}"] = value[:width].contiguous()
            out[f"visual.trunk.attn_pool.kv.{kind}"] = value[width:].contiguous()
        else:
            out[name] = value
    for name, parts in joined.items():
        if len(parts) == 3:
            out[name] = torch.cat([parts["q"], parts["k"], parts["v"]])
    return out


def _of_layer(
    layer: re.Match[str],
    value: Tensor,
    siglip: bool,
    out: dict[str, Tensor],
    joined: dict[str, dict[str, Tensor]],
) -> None:
    """One tensor of a transformer's layer, into `out` or, of queries, keys, values, `joined`."""
    tower, number, inner, kind = layer.groups()
    trunk = siglip and tower == "vision"
    start = {"vision": "visual.", "text": "text." if siglip else ""}[tower]
    block = f"visual.trunk.blocks.{number}." if trunk else f"{start}transformer.resblocks.{number}."
    part = re.fullmatch(r"self_attn\.([qkv])_proj", inner)
    if part is not None:
        name = f"attn.qkv.{kind}" if trunk else f"attn.in_proj_{kind}"
        joined.setdefault(block + name, {})[part[1]] = value
    else:
        names = _IN_TRUNK if trunk else _IN_BLOCK
        out[f"{block}{names.get(inner, inner)}.{kind}"] = value
