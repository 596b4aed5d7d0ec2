# SPDX-License-Identifier: Apache-2.0
"""Image and text rows brought to one length, and their element-wise products.

    v[b] = sqrt(scale) * image[b] / |image[b]|       t[k] = sqrt(scale) * text[k] / |text[k]|
    products[b,k] = v[b] * t[k]                      element-wise: scale * R[b,k]

image [B, D], text [K, D] -> v [B, D], t [K, D], products [B, K, D] in the input dtype, computed in
the accumulation dtype; products are those of v and t before their rounding. A zero row stays 0 and
has gradient 0. R is the rational matrix of RAda (arXiv 2507.15480).
"""

from __future__ import annotations

import math

from torch import Tensor

from vtclip.reference._dtypes import acc_dtype
from vtclip.reference.cosine_logits import unit


def unit_products(image: Tensor, text: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(v, t, products) of the module docstring."""
    acc = acc_dtype(image.dtype)
    root = math.sqrt(scale)
    v, t = root * unit(image.to(acc)), root * unit(text.to(acc))
    products = v[:, None] * t
    return v.to(image.dtype), t.to(image.dtype), products.to(image.dtype)
