# SPDX-License-Identifier: Apache-2.0
"""The stages of one `nn.TransformerDecoderLayer` (post-norm, ReLU), shared where texts are equal.

Every function takes the layer for its parameters only. The target is [1, K, C] where all images
share it, else [B, K, C]; what follows from a shared target stays shared.

    x1  = LN1(target + SelfAttn(target))
    Q   = x1 Wq^T + bq                                                   `queries`
    K_b = F_b Wk^T   V_b = F_b Wv^T                                      `keys_values`
    u   = x1 + Attn(Q, K_b, V_b) Wo^T + (bo + Wo bv)                     `terms`
    x2  = LN2(u)      h = relu(W1 x2 + c1)                               `hidden_units`
    z   = x2 + W2 h + c2, the input of LN3                               `before_last_norm`

The key bias adds a constant to each row of scores, which a softmax does not see; its gradient is 0.
The value bias passes through the attention unchanged (weights sum to 1) and joins the output bias.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtclip import ops
from vtclip.heads import _feed_forward
from vtclip.heads._cost import plan

# scores of the aligned start for tokens of norm sqrt(C): this many times the cosine
SHARPNESS = 4.0
ALL = slice(None)
Attention = tuple[Tensor, Tensor, Tensor, Tensor | None]  # query, key, value, key_mask


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


class CrossWeights(NamedTuple):
    """The cross-attention's packed parameters, cut once: their gradients are then joined once."""

    query: Tensor  # [C, C]
    keys_values: Tensor  # [2 C, C]
    query_bias: Tensor  # [C]
    value_bias: Tensor  # [C]

    @classmethod
    def of(cls, layer: nn.TransformerDecoderLayer) -> CrossWeights:
        packed = layer.multihead_attn
        C = packed.in_proj_weight.shape[1]
        query, keys_values = packed.in_proj_weight.split_with_sizes((C, 2 * C))
        query_bias, _, value_bias = packed.in_proj_bias.split_with_sizes((C, C, C))
        return cls(query, keys_values, query_bias, value_bias)


def queries(
    layer: nn.TransformerDecoderLayer, target: Tensor, cross: CrossWeights
) -> tuple[Tensor, Tensor]:
    """target [1|B, K, C] -> x1 [1|B, K, C] and the cross-attention's query [1|B, H, K, d]."""
    attn, H = layer.self_attn, layer.self_attn.num_heads
    packed = F.linear(target, attn.in_proj_weight, attn.in_proj_bias)
    query, key, value = (_heads(x, H) for x in packed.chunk(3, dim=-1))
    attended = _merge(ops.cross_attn(query, key, value))
    attended = attn.out_proj(attended)
    x1 = _norm(layer.norm1, _add(attended, target))
    return x1, _heads(F.linear(x1, cross.query, cross.query_bias), H)


def keys_values(
    layer: nn.TransformerDecoderLayer, tokens: Tensor, cross: CrossWeights
) -> tuple[Tensor, Tensor]:
    """tokens [B, L, C] -> key and value [B, H, L, d], both without bias."""
    H = layer.multihead_attn.num_heads
    key, value = F.linear(tokens, cross.keys_values).chunk(2, dim=-1)  # of [B, L, 2 C]
    return _heads(key, H), _heads(value, H)


class Terms(NamedTuple):
    """What one step takes of a layer beside its weights, for all images and chunks of classes.

    absorb: how many of the matrices after the attention are pushed through the values: 0 none, 1
        the output projection, 2 the first feed-forward matrix too.
    start: what the attention is added to, x1 + bo + Wo bv, [1|B, K, C]; absorbed twice
        [start | start W~^T], see `_absorbed_twice`.
    per_head: [H, d, n], the matrix that the values of each head are pushed through.
    biases: of the second norm and the first feed-forward matrix where c2 is in x2 already.
    one_pass: the second norm forms its sum itself, see `_feed_forward.norm_of_sum`.
    """

    absorb: int
    start: Tensor
    per_head: Tensor | None = None
    biases: tuple[Tensor, Tensor] | None = None
    one_pass: bool = False

    @property
    def folded(self) -> bool:
        """Whether `hidden_units` returns x2 + c2 in place of x2, for another to be added to."""
        return self.biases is not None or (self.one_pass and torch.is_grad_enabled())

    def of(self, classes: slice) -> Terms:
        """Those of some classes; of all the same, which no gradient need be laid into."""
        if classes == ALL:
            return self
        return self._replace(start=self.start[:, classes])


def form(layer: nn.TransformerDecoderLayer, x1: Tensor, key: Tensor) -> int:
    """`Terms.absorb` by what a step costs: x1 [1|B, K, C], key [B, H, L, d]."""
    B, H, L, _ = key.shape
    if torch.compiler.is_compiling():
        B = 1  # a choice by the number of images would tie a traced graph to that number
    sizes = B, x1.shape[1], x1.shape[-1], L, H, layer.linear1.out_features
    return plan(*sizes, device=x1.device, dtype=x1.dtype, training=torch.is_grad_enabled()).absorb


def terms(
    layer: nn.TransformerDecoderLayer, x1: Tensor, absorb: int, cross: CrossWeights, *, fold: bool
) -> Terms:
    """fold: leave x2 + c2 in place of x2, for `before_last_norm` to add its product to."""
    out = layer.multihead_attn.out_proj
    start, weight = x1 + torch.addmv(out.bias, out.weight, cross.value_bias), out.weight
    biases = _feed_forward.folded_biases(layer) if fold and absorb < 2 else None
    one_pass = absorb < 2 and _feed_forward.norms_sums(start, layer.norm2.weight)
    if absorb == 0:
        return Terms(0, start, None, biases, one_pass)
    per_head = _per_head(weight, layer.multihead_attn.num_heads)
    if absorb == 2:
        centred = _centred(layer)
        per_head = torch.cat([per_head, per_head @ centred.T], -1)
        start = torch.cat([start, start @ centred.T], -1)
    return Terms(absorb, start, per_head, biases, one_pass)


def hidden_units(
    layer: nn.TransformerDecoderLayer, terms: Terms, attention: Attention
) -> tuple[Tensor, Tensor]:
    """h [B, K, F] and x2 [B, K, C]; where `terms.folded` x2 + c2, with gradients as [B K, C].

    attention: query [1|B, H, K, d], key and value [B, H, L, d], key_mask.
    """
    if terms.absorb == 2 and terms.per_head is not None:
        return _absorbed_twice(layer, terms.start, terms.per_head, attention)
    norm, linear = layer.norm2, layer.linear1
    norm_bias, bias = terms.biases or (norm.bias, linear.bias)
    u = _attended(layer, terms, attention)
    shape = u.shape
    if not terms.one_pass:
        x2 = F.layer_norm(u, norm.normalized_shape, norm.weight, norm_bias, norm.eps)
        rows = x2.flatten(0, 1)
    elif torch.is_grad_enabled():
        rows, x2 = _feed_forward.norm_of_sum(u, terms.start, norm, layer.linear2.bias)
    else:
        rows = _feed_forward.norm_of_sum_alone(u, terms.start, norm, norm_bias)
        x2 = rows.view(shape)
    del u  # freed before h is computed, where no gradient needs it
    # the product of a matrix is not a view: changing a view in place costs its backward four copies
    hidden = _feed_forward.hidden(rows, linear.weight, bias)  # [B K, F]
    return hidden.view(*shape[:2], hidden.shape[1]), x2


def before_last_norm(
    layer: nn.TransformerDecoderLayer, hidden: Tensor, x2: Tensor, *, folded: bool = False
) -> Tensor:
    """h [B, K, F] and x2, as `hidden_units` returns them -> z [B, K, C].

    folded: x2 + c2 is given, and overwritten.
    """
    if folded:
        rows = x2 if x2.dim() == 2 else x2.flatten(0, 1)
        rows.addmm_(hidden.flatten(0, 1), layer.linear2.weight.t())
        return rows.view(*hidden.shape[:2], rows.shape[1])
    return _add(layer.linear2(hidden.flatten(0, 1)).view_as(x2), x2)


def decode(
    layer: nn.TransformerDecoderLayer, target: Tensor, tokens: Tensor, key_mask: Tensor | None
) -> Tensor:
    """The layer without its last norm: target [1|B, K, C], tokens [B, L, C] -> [B, K, C]."""
    cross = CrossWeights.of(layer)
    x1, query = queries(layer, target, cross)
    attention = query, *keys_values(layer, tokens, cross), key_mask
    found = terms(layer, x1, form(layer, x1, attention[1]), cross, fold=False)
    return before_last_norm(layer, *hidden_units(layer, found, attention), folded=found.folded)


def last_norm(layer: nn.TransformerDecoderLayer, x: Tensor) -> Tensor:
    return _norm(layer.norm3, x)


def _attended(layer: nn.TransformerDecoderLayer, terms: Terms, attention: Attention) -> Tensor:
    """u [B, K, C]; absorbed: sum_h P_h (V_h W[:, h]^T), one product of inner size H L per image.

    Without `terms.start` where `terms.one_pass`.
    """
    query, key, value, key_mask = attention
    if terms.per_head is not None:
        projected = _projected(value, terms.per_head)
        product = _flat_weights(query, key, key_mask) @ projected
    else:
        attended = _merge(ops.cross_attn(query, key, value, key_mask=key_mask))
        product = F.linear(attended, layer.multihead_attn.out_proj.weight)
    return product if terms.one_pass else _add(product, terms.start)


def _centred(layer: nn.TransformerDecoderLayer) -> Tensor:
    """W~ = W1 diag(g2) (I - 1 1^T / C), [F, C]: LN2's weight and centring."""
    scaled = layer.linear1.weight * layer.norm2.weight
    return scaled - scaled.mean(1, keepdim=True)


def _absorbed_twice(
    layer: nn.TransformerDecoderLayer, start: Tensor, per_head: Tensor, attention: Attention
) -> tuple[Tensor, Tensor]:
    """h and x2 from one product of inner size H L per image; start = x1 + bias of u.

    [u|t] = [start | start W~^T] + sum_h P_h (V_h [Wo_h^T | Wo_h^T W~^T])
    x2    = LN2(u)      h = relu(t / std(u) + W1 b2 + c1)      as W1 x2 + c1 = W~ u / std + ..
    """
    query, key, value, key_mask = attention
    norm, linear = layer.norm2, layer.linear1
    projected = _projected(value, per_head)
    mixed = torch.baddbmm(start, _flat_weights(query, key, key_mask), projected)
    u, t = mixed.split_with_sizes((linear.in_features, linear.out_features), -1)
    rstd = (u.var(-1, correction=0, keepdim=True) + norm.eps).rsqrt()
    shift = linear.bias + linear.weight @ norm.bias
    return F.relu(torch.addcmul(shift, t, rstd), inplace=True), _norm(norm, u)


def _per_head(weight: Tensor, H: int) -> Tensor:
    """Output projection [C, C] -> [H, d, C], its part of each head, transposed."""
    return weight.view(weight.shape[0], H, -1).permute(1, 2, 0)


def _projected(value: Tensor, per_head: Tensor) -> Tensor:
    """value [B, H, L, d], per_head [H, d, n] -> [B, H L, n]."""
    B, H, L, d = value.shape
    rows = value.transpose(0, 1).reshape(H, B * L, d)
    n = per_head.shape[-1]
    return (rows @ per_head).view(H, B, L, n).transpose(0, 1).reshape(B, H * L, n)


def _flat_weights(query: Tensor, key: Tensor, key_mask: Tensor | None) -> Tensor:
    """Attention weights [B, K, H L]."""
    weights = ops.cross_attn_weights(query, key, key_mask=key_mask)  # [B, H, K, L]
    return weights.transpose(1, 2).flatten(2)


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
