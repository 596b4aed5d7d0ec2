# SPDX-License-Identifier: Apache-2.0
"""The parts of one `nn.TransformerDecoderLayer` (post-norm, ReLU), shared where texts are equal.

Every function takes the layer for its parameters only. The target is [1, K, C] where all images
share it, else [B, K, C]; what follows from a shared target stays shared.

    x1  = LN1(target + SelfAttn(target))
    Q   = x1 Wq^T + bq                                                   `queries`
    K_b = F_b Wk^T   V_b = F_b Wv^T                                      `keys_values`
    u   = x1 + Attn(Q, K_b, V_b) Wo^T + (bo + Wo bv)
    x2  = LN2(u)
    z   = x2 + W2 relu(W1 x2 + c1) + c2, the input of LN3                `before_last_norm`

The key bias adds a constant to each row of scores, which a softmax does not see; its gradient is 0.
The value bias passes through the attention unchanged (weights sum to 1) and joins the output bias.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtclip import ops
from vtclip.heads.cost import plan

# scores of the aligned start for tokens of norm sqrt(C): this many times the cosine
SHARPNESS = 4.0


@torch.no_grad()
def align(layer: nn.TransformerDecoderLayer, text: Tensor) -> None:
    """Start the cross-attention at the similarity of texts and tokens, the same in every head.

    With the self-attention's output at 0, x1 = LN1(T). Each head projects x1 and tokens onto the
    first d right singular vectors of x1 (all of its span where K <= d), so that

        score[k, l] = SHARPNESS / C * <x1[k], F_b[l]>, restricted to those d directions.
    """
    C, H = text.shape[1], layer.self_attn.num_heads
    d = C // H
    nn.init.zeros_(layer.self_attn.out_proj.weight)
    nn.init.zeros_(layer.self_attn.out_proj.bias)
    x1 = _norm(layer.norm1, text).to(torch.promote_types(text.dtype, torch.float32))
    directions = torch.linalg.svd(x1, full_matrices=False).Vh[:d]  # [min(d, K), C]
    gain = (SHARPNESS * d**0.5 / C) ** 0.5
    projection = gain * F.pad(directions, (0, 0, 0, d - directions.shape[0]))  # [d, C]
    in_proj = layer.multihead_attn.in_proj_weight
    in_proj[: 2 * C] = projection.repeat(2 * H, 1).to(in_proj.dtype)
    nn.init.zeros_(layer.multihead_attn.in_proj_bias)


def queries(layer: nn.TransformerDecoderLayer, target: Tensor) -> tuple[Tensor, Tensor]:
    """target [1|B, K, C] -> x1 [1|B, K, C] and the cross-attention's query [1|B, H, K, d]."""
    attn, H = layer.self_attn, layer.self_attn.num_heads
    packed = F.linear(target, attn.in_proj_weight, attn.in_proj_bias)
    query, key, value = (_heads(part, H) for part in packed.chunk(3, dim=-1))
    attended = _merge(ops.cross_attn(query, key, value))
    attended = attn.out_proj(attended)
    x1 = _norm(layer.norm1, _add(attended, target))
    cross = layer.multihead_attn
    C = x1.shape[-1]
    query = F.linear(x1, cross.in_proj_weight[:C], cross.in_proj_bias[:C])
    return x1, _heads(query, H)


def keys_values(layer: nn.TransformerDecoderLayer, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """tokens [B, L, C] -> key and value [B, H, L, d], both without bias."""
    cross = layer.multihead_attn
    C = tokens.shape[-1]
    packed = F.linear(tokens, cross.in_proj_weight[C:])  # [B, L, 2 C]
    key, value = packed.chunk(2, dim=-1)
    return _heads(key, cross.num_heads), _heads(value, cross.num_heads)


def before_last_norm(
    layer: nn.TransformerDecoderLayer,
    x1: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    absorb_out: bool | None = None,
) -> Tensor:
    """x1 [1|B, K, C], query [1|B, H, K, d], key and value [B, H, L, d] -> [B, K, C].

    absorb_out: which form of the output projection; None asks `cost.plan`.
    """
    cross, C = layer.multihead_attn, x1.shape[-1]
    weight = cross.out_proj.weight
    bias = cross.out_proj.bias + weight @ cross.in_proj_bias[2 * C :]
    if absorb_out is None:
        B, H, L, _ = key.shape
        absorb_out = plan(B, x1.shape[1], C, L, H, layer.linear1.out_features).absorb_out
    if absorb_out:
        attended = _absorbed(query, key, value, weight, key_mask)
        u = _add(attended, x1 + bias)
    else:
        attended = _merge(ops.cross_attn(query, key, value, key_mask=key_mask))
        u = _add(F.linear(attended, weight, bias), x1)
    x2 = _norm(layer.norm2, u)
    # of a matrix the product is no view: to change a view in place costs its backward four copies
    hidden = F.relu(layer.linear1(x2.flatten(0, 1)), inplace=True)  # [B K, F]
    return _add(layer.linear2(hidden).view_as(x2), x2)


def decode(
    layer: nn.TransformerDecoderLayer, target: Tensor, tokens: Tensor, key_mask: Tensor | None
) -> Tensor:
    """The layer without its last norm: target [1|B, K, C], tokens [B, L, C] -> [B, K, C]."""
    return before_last_norm(layer, *queries(layer, target), *keys_values(layer, tokens), key_mask)


def last_norm(layer: nn.TransformerDecoderLayer, x: Tensor) -> Tensor:
    return _norm(layer.norm3, x)


def _absorbed(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, key_mask: Tensor | None
) -> Tensor:
    """sum_h P_h (V_h W[:, h]^T): one product of inner size H L per image -> [B, K, C]."""
    B, H, L, d = value.shape
    K, C = query.shape[2], weight.shape[0]
    weights = ops.cross_attn_weights(query, key, key_mask=key_mask)  # [B, H, K, L]
    per_head = weight.view(C, H, d).permute(1, 2, 0)  # [H, d, C]
    rows = value.transpose(0, 1).reshape(H, B * L, d)
    projected = (rows @ per_head).view(H, B, L, C).transpose(0, 1).reshape(B, H * L, C)
    return weights.transpose(1, 2).reshape(B, K, H * L) @ projected


def _heads(x: Tensor, H: int) -> Tensor:
    """[., n, C] -> [., H, n, d], a view."""
    return x.view(*x.shape[:2], H, x.shape[2] // H).transpose(1, 2)


def _merge(x: Tensor) -> Tensor:
    """[B, H, K, d] -> [B, K, C]; the op lays its result out so that this is a view."""
    return x.transpose(1, 2).flatten(2)


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _add(x: Tensor, y: Tensor) -> Tensor:
    """x + y, into the fresh tensor x where nothing is differentiated and dtypes allow.

    Products of more than two dimensions are views, see above; under autocast the sum stays wide.
    """
    return x + y if torch.is_grad_enabled() or x.dtype != y.dtype else x.add_(y)
