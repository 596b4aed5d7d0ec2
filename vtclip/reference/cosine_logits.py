# SPDX-License-Identifier: Apache-2.0
"""CLIP's scaled cosine similarity, with texts shared by all images or one set per image.

    logits[b,k] = scale * <x_b, t_k> / (|x_b| |t_k|)          or t_bk for per-image texts

image [B, D], text [K, D] or [B, K, D] -> [B, K] in the input dtype, accumulated in at least
float32 (Radford et al. 2021, figure 3). A zero vector gives logit 0 and gradient 0. Vectors are
divided by their largest entry before they are squared, so entries of 1e30 or 1e-30 are exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtclip.reference._dtypes import acc_dtype


def unit(vectors: Tensor) -> Tensor:
    """Rows of length 1 along the last dimension; a zero row stays 0 with gradient 0."""
    if vectors.shape[-1] == 0:
        return vectors
    largest = vectors.detach().abs().amax(dim=-1, keepdim=True)
    zero = largest == 0
    scaled = vectors / largest.masked_fill(zero, 1.0)
    square = (scaled * scaled).sum(dim=-1, keepdim=True).masked_fill(zero, 1.0)
    return (scaled * torch.rsqrt(square)).masked_fill(zero, 0.0)


def cosine_logits(image: Tensor, text: Tensor, scale: float) -> Tensor:
    """The logits of the module docstring."""
    acc = acc_dtype(image.dtype)
    x, t = unit(image.to(acc)), unit(text.to(acc))
    cosines = x @ t.T if text.dim() == 2 else (t @ x[:, :, None]).squeeze(-1)
    return (scale * cosines).to(image.dtype)
