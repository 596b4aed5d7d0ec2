# SPDX-License-Identifier: Apache-2.0
"""ffn_cosine_logits: second feed-forward matrix, last layer norm, residual and cosine.

    z[b,k,:]    = residual_input[b,k,:] + hidden[b,k,:] @ weight^T + bias
    zh[b,k,:]   = (z[b,k,:] - mean) / sqrt(var + eps)
    y[b,k,:]    = text[k,:] + residual * (norm_weight * zh[b,k,:] + norm_bias)
    logits[b,k] = scale * <image[b], y[b,k]> / (|image[b]| * |y[b,k]|)

mean and var (biased) run over the last dimension of one row.

    hidden [B, K, F]      weight [C, F]     bias [C]       residual_input [B, K, C]
    norm_weight [C]       norm_bias [C]     text [K, C]    image [B, C]       ->  logits [B, K]

Accumulation: float64 for float64 inputs, else float32; the result has the dtype of `hidden`. Norms,
zero vectors and empty sizes as in norm_cosine_logits; where F = 0, z is residual_input + bias.

What kernels may use instead of rows of z. With weight, bias and residual_input centred over C
(weight - its column means, the others - their mean) z has mean 0, and with v = image / |image|,
d = text + residual * norm_bias, n = norm_weight and five sums over a row of it,

    R0 = sum z^2   R1 = sum (n z)^2   R2 = sum n v z   R3 = sum n d z   R4 = sum n^2 z
    r       = (R0 / C + eps)^(-1/2)
    dot     = residual r R2 + <v, d>                                    <v, y>
    square  = (residual r)^2 R1 + 2 residual r R3 + |d|^2               |y|^2
    cosine  = dot / sqrt(square)                                        0 where square is 0
    mean_g  = residual / C (<v, n> - kappa (residual r R4 + <n, d>))    kappa = dot / square
    mean_gz = residual / C (r R2 - kappa (residual r^2 R1 + r R3))

and the gradient of z, of step = scale * grad_logits[b,k] / |y| and u = y / |y|, is

    dy = step (v - cosine u)         dz = r (residual n dy - step mean_g - step mean_gz zh)

It sums to 0 over C, so the centring changes nothing else: grad_hidden = dz @ weight, grad_weight =
dz^T hidden, grad_bias = sum dz, grad_residual_input = dz, grad_norm_weight = residual sum dy zh,
grad_norm_bias = residual sum dy, grad_text = sum_b dy; grad_image is that of v = image / |image|,
whose own is sum_k scale grad_logits u.
"""

from __future__ import annotations

from torch import Tensor

from vtclip.reference._dtypes import acc_dtype
from vtclip.reference.norm_cosine_logits import norm_cosine_logits


def ffn_cosine_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor, residual_input: Tensor, norm_weight: Tensor,
    norm_bias: Tensor, text: Tensor, image: Tensor, *, residual: float, scale: float, eps: float,
) -> Tensor:  # fmt: skip
    """The logits of the module docstring."""
    acc = acc_dtype(hidden.dtype)
    z = residual_input.to(acc) + hidden.to(acc) @ weight.to(acc).T + bias.to(acc)  # [B, K, C]
    tail = norm_weight.to(acc), norm_bias.to(acc), text.to(acc), image.to(acc)
    return norm_cosine_logits(z, *tail, residual=residual, scale=scale, eps=eps).to(hidden.dtype)
