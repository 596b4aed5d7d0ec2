# SPDX-License-Identifier: Apache-2.0
"""What users would write without vtclip, from the obvious to the careful."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attention_sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """torch's fused attention; a shared query must be expanded, its gradient comes back B-sized."""
    expanded = query.expand(key.shape[0], -1, -1, -1)
    return F.scaled_dot_product_attention(expanded, key, value)


def attention_naive(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The equation, term by term."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    return torch.softmax(scores, dim=-1) @ value


def attention_folded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Shared and reduced: one product of the query with all images' keys, no expanded query."""
    B, H, L, d = key.shape
    folded = key.permute(1, 3, 0, 2).reshape(H, d, B * L)
    scores = (query[0] * d**-0.5) @ folded  # [H, K, B*L]
    weights = torch.softmax(scores.unflatten(-1, (B, L)), dim=-1)
    return torch.einsum("hkbl,bhld->bhkd", weights, value)


def cosine_normalized(image: Tensor, text: Tensor, scale: float) -> Tensor:
    """Normalise both, multiply: what CLIP code does."""
    x, t = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    return scale * (x @ t.T if t.dim() == 2 else (t @ x[:, :, None])[..., 0])


def tail_plain(
    hidden: Tensor, weight: Tensor, bias: Tensor, text: Tensor, image: Tensor, scale: float
) -> Tensor:
    """LayerNorm, residual, cosine, one after the other."""
    summed = text + F.layer_norm(hidden, hidden.shape[-1:], weight, bias)
    return cosine_normalized(image, summed, scale)


class ExpandedMultihead(nn.Module):
    """Learned queries expanded to the batch, in torch's own attention module."""

    def __init__(self, num_queries: int, dim: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(0.02 * torch.randn(num_queries, dim))
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        query = self.query.expand(len(tokens), -1, -1)
        out: Tensor = self.attention(query, tokens, tokens, need_weights=False)[0]
        return out


class NaiveVTCLIP(nn.Module):
    """torch's decoder layer on the texts repeated for every image."""

    def __init__(self, layer: nn.TransformerDecoderLayer, text: Tensor, scale: float) -> None:
        super().__init__()
        self.layer, self.scale = layer, scale
        self.register_buffer("text", text)

    def forward(self, image: Tensor, spatial: Tensor) -> Tensor:
        texts = self.text.expand(image.shape[0], -1, -1)
        adapted = self.text + self.layer(texts, spatial)
        return cosine_normalized(image, adapted, self.scale)


class SharedVTCLIP(NaiveVTCLIP):
    """The same layer, self-attention and query projection once per step: an expert's version."""

    def forward(self, image: Tensor, spatial: Tensor) -> Tensor:
        layer, text = self.layer, self.text
        own, cross = layer.self_attn, layer.multihead_attn
        (K, C), (B, L), H = text.shape, spatial.shape[:2], cross.num_heads
        qkv = F.linear(text, own.in_proj_weight, own.in_proj_bias)
        q, k, v = qkv.view(K, 3, H, C // H).permute(1, 2, 0, 3)
        mixed = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
        mixed = F.linear(
            mixed.transpose(0, 1).reshape(K, C), own.out_proj.weight, own.out_proj.bias
        )
        x1 = layer.norm1(text + mixed)
        wq, wkv = cross.in_proj_weight.split((C, 2 * C))
        bq, bkv = cross.in_proj_bias.split((C, 2 * C))
        query = F.linear(x1, wq, bq).view(K, H, C // H).transpose(0, 1)[None]
        key, value = F.linear(spatial, wkv, bkv).view(B, L, 2, H, C // H).permute(2, 0, 3, 1, 4)
        attended = attention_sdpa(query, key, value).transpose(1, 2).reshape(B, K, C)
        x2 = layer.norm2(x1 + F.linear(attended, cross.out_proj.weight, cross.out_proj.bias))
        x3 = layer.norm3(x2 + layer.linear2(F.relu(layer.linear1(x2))))
        return cosine_normalized(image, text + x3, self.scale)
