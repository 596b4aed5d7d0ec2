# SPDX-License-Identifier: Apache-2.0
"""RAda without vtclip: as it was released, and as an expert would write it in torch.

    R = v[:, None] * T                 x1 = sqrt(s) v    x2 = sqrt(s) T    x3 = s R
    A = mean_i K softmax(q_i(x_i) k(x3)^T / sqrt(d))     the softmax over all K * K entries together
    M = relu(1 + out(A v(x3)))         logits = s sum_d M R          penalty = mean (M - 1)^2

image v [B, D] and text T [K, D] have length 1. Modules return logits + penalty, [B, K], so that
both are computed and differentiated.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from vtclip import heads


def three_maps(queries: tuple[Tensor, Tensor, Tensor], key: Tensor, value: Tensor) -> Tensor:
    """Three queries [B, H, K, d], each with a map of [K, K] per image and head."""
    (K, d), maps = key.shape[-2:], []
    for query in queries:
        scores = query @ key.transpose(-2, -1) / math.sqrt(d)
        maps.append(torch.softmax(scores.flatten(2), dim=-1).view_as(scores) * K)
    return ((maps[0] + maps[1] + maps[2]) / 3) @ value


def attention_released(
    image_query: Tensor, text_query: Tensor, pair_query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """image_query [B, H, 1, d] and text_query [1, H, K, d] repeated to [B, H, K, d]; three maps."""
    B, _, K, _ = key.shape
    queries = image_query.repeat(1, 1, K, 1), text_query.repeat(B, 1, 1, 1), pair_query
    return three_maps(queries, key, value)


def attention_reduced(
    image_query: Tensor, text_query: Tensor, pair_query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """One image row, one text query for all images, the joint softmax as exp(S - Z)."""
    K, d = key.shape[-2:]
    total = F.scaled_dot_product_attention(image_query, key, value)
    for query in (text_query, pair_query):
        scores = (query * d**-0.5) @ key.transpose(-2, -1)
        Z = torch.logsumexp(scores.flatten(2), dim=-1)[..., None, None]
        total = total + torch.exp(scores - (Z - math.log(K))) @ value
    return total / 3


def _joint(out: Tensor, lse: Tensor) -> Tensor:
    """Row-wise attention out [B, H, K, d], lse [B, H, K] -> that of the joint softmax, times K."""
    weight = torch.softmax(lse, dim=-1) * lse.shape[-1]  # K exp(lse_i - logsumexp_i lse_i)
    return out * weight[..., None].to(out.dtype)


def attention_sdpa_lse(
    image_query: Tensor, text_query: Tensor, pair_query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """torch's flash attention for CPU, its rows re-weighted by their log-sum-exp.

    Forward only: its backward takes no gradient of the log-sum-exp.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    total = F.scaled_dot_product_attention(image_query, key, value)
    for query in (text_query.expand_as(key), pair_query):
        total = total + _joint(*flash(query, key, value))
    return total / 3


def attention_flex_lse(
    image_query: Tensor, text_query: Tensor, pair_query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """FlexAttention, whose log-sum-exp has a gradient; to be compiled."""
    total = F.scaled_dot_product_attention(image_query, key, value)
    for query in (text_query.expand_as(key), pair_query):
        out, aux = flex_attention(query, key, value, return_aux=AuxRequest(lse=True))
        total = total + _joint(out, aux.lse)
    return total / 3


def products(image: Tensor, text: Tensor, scale: float) -> Tensor:
    """scale times the rational matrix [B, K, D] of image [B, D] and text [K, D]."""
    image, text = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    return (scale**0.5 * image)[:, None] * (scale**0.5 * text)


def masked_logits(image: Tensor, text: Tensor, mask: Tensor, scale: float) -> Tensor:
    """mask [B, K, D] before its relu -> logits [B, K]."""
    return scale * (torch.relu(1 + mask) * (image[:, None] * text)).sum(-1)


def masked_head(
    context: Tensor, weight: Tensor, bias: Tensor, image: Tensor, text: Tensor, scale: float
) -> Tensor:
    """Out-projection, mask, logits + squared penalty, one after the other."""
    mask = torch.relu(1 + F.linear(context, weight, bias))
    logits = scale * (mask * (image[:, None] * text)).sum(-1)
    return logits + F.mse_loss(mask, torch.ones_like(mask), reduction="none").mean((1, 2))[:, None]


class ReleasedRAda(nn.Module):
    """The layer as released: everything repeated to [B, K, D], then six linear layers."""

    def __init__(self, text: Tensor, num_heads: int, scale: float) -> None:
        super().__init__()
        D = text.shape[1]
        self.num_heads, self.scale = num_heads, scale
        self.register_buffer("text", text)
        self.q_proj1, self.q_proj2, self.q_proj3 = (nn.Linear(D, D) for _ in range(3))
        self.k_proj, self.v_proj, self.out_proj = (nn.Linear(D, D) for _ in range(3))

    def _split(self, x: Tensor) -> Tensor:
        """[B, K, D] -> [B, H, K, d]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _end(self, context: Tensor, image: Tensor) -> Tensor:
        joined = context.transpose(1, 2).flatten(2)
        out = self.out_proj
        return masked_head(joined, out.weight, out.bias, image, self.text, self.scale)

    def forward(self, image: Tensor) -> Tensor:
        B, K = image.shape[0], self.text.shape[0]
        v, T = image[:, None].repeat(1, K, 1), self.text[None].repeat(B, 1, 1)
        root, product = math.sqrt(self.scale), self.scale * (v * T)
        queries = (
            self._split(self.q_proj1(root * v)),
            self._split(self.q_proj2(root * T)),
            self._split(self.q_proj3(product)),
        )
        key, value = self._split(self.k_proj(product)), self._split(self.v_proj(product))
        context = three_maps(queries, key, value)
        return self._end(context, image)


class ReducedRAda(ReleasedRAda):
    """The same layer: image queries are B rows, text queries K rows, three linears are one."""

    attend = staticmethod(attention_reduced)

    def forward(self, image: Tensor) -> Tensor:
        root, v = math.sqrt(self.scale), image[:, None]
        product = self.scale * (v * self.text)
        layers = self.q_proj3, self.k_proj, self.v_proj
        weight, bias = (torch.cat([getattr(x, n) for x in layers]) for n in ("weight", "bias"))
        projected = F.linear(product, weight, bias).chunk(3, dim=-1)
        context = self.attend(
            self._split(self.q_proj1(root * v)),
            self._split(self.q_proj2(root * self.text[None])),
            *(self._split(x) for x in projected),
        )
        return self._end(context, image)


class FlexRAda(ReducedRAda):
    """The same layer with FlexAttention; to be compiled."""

    attend = staticmethod(attention_flex_lse)


class OurRAda(nn.Module):
    """`vtclip.heads.RAda` with the weights of a released layer."""

    def __init__(self, released: ReleasedRAda) -> None:
        super().__init__()
        text = released.text
        self.head = heads.RAda(text, num_heads=released.num_heads, logit_scale=released.scale)
        layer = {k: v for k, v in released.state_dict().items() if k != "text"}
        self.head.load_released_state_dict(layer)

    def forward(self, image: Tensor) -> Tensor:
        logits, penalty = self.head.forward_with_penalty(image)
        return logits + penalty[:, None]
