# SPDX-License-Identifier: Apache-2.0
"""norm_cosine_logits: last layer norm, residual to the class text and cosine, in one step.

    z[b,k,:]    = weight * (hidden[b,k,:] - mean) / sqrt(var + eps) + bias
    y[b,k,:]    = text[k,:] + residual * z[b,k,:]
    logits[b,k] = scale * <image[b], y[b,k]> / (|image[b]| * |y[b,k]|)

mean and var (biased) run over the last dimension of one row.

    hidden [B, K, C]   weight [C]   bias [C]   text [K, C]   image [B, C]  ->  logits [B, K]

Accumulation: float64 for float64 inputs, else float32; the result has the dtype of `hidden`. Both
norms are taken after division by the row's largest entry, so rows around 1e30 or 1e-30 neither
overflow nor vanish in float32. A zero `image` or a zero row `y` gives logit 0 and passes no
gradient. Empty: B = 0 or K = 0 gives an empty result; C = 0 leaves only zero vectors, hence
zeros.
"""

import torch
from torch import Tensor

from vtclip.reference._dtypes import acc_dtype


def norm_cosine_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor, text: Tensor, image: Tensor, *, residual: float,
    scale: float, eps: float,
) -> Tensor:  # fmt: skip
    """scale * cos(image[b], text[k] + residual * LayerNorm(hidden[b, k])) -> [B, K]."""
    if hidden.shape[-1] == 0:
        # a sum over nothing: zeros that all five inputs have a gradient from
        return ((hidden * weight + bias + text) * image[:, None]).sum(-1)
    acc = acc_dtype(hidden.dtype)
    hidden_acc = hidden.to(acc)
    centred = hidden_acc - hidden_acc.mean(-1, keepdim=True)  # [B, K, C]
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)  # [B, K, 1]
    z = weight.to(acc) * (centred * rstd) + bias.to(acc)
    y = text.to(acc) + residual * z  # [B, K, C]
    unit_image = _unit(image.to(acc))  # [B, C]
    cosine = (_unit(y) * unit_image[:, None, :]).sum(-1)
    return (scale * cosine).to(hidden.dtype)


def _unit(x: Tensor) -> Tensor:
    """x / |x| over the last dimension; a zero vector stays zero and passes no gradient."""
    peak = x.detach().abs().amax(-1, keepdim=True)
    # the direction does not change with the factor, so the factor needs no gradient
    x = x / torch.where(peak > 0, peak, 1)
    square = x.square().sum(-1, keepdim=True)
    nonzero = square > 0
    rnorm = torch.where(nonzero, torch.rsqrt(torch.where(nonzero, square, 1)), 0)
    return x * rnorm
