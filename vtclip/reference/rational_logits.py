# SPDX-License-Identifier: Apache-2.0
"""Logits from the masked rational matrix R[b,k] = image[b] * text[k].

    logits[b,k] = scale * sum_i relu(1 + mask[b,k,i]) * image[b,i] * text[k,i]

image [B, D], text [K, D], mask [B, K, D] -> [B, K] in the input dtype, accumulated in at least
float32. A zero mask gives plain inner products; relu has slope 0 at 0. Where D = 0 they
are 0. RAda, arXiv 2507.15480, as released.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtclip.reference._dtypes import acc_dtype


def rational_logits(image: Tensor, text: Tensor, mask: Tensor, scale: float) -> Tensor:
    """logits of the module docstring."""
    acc = acc_dtype(mask.dtype)
    rational = image.to(acc)[:, None] * text.to(acc)  # [B, K, D]
    logits = (torch.relu(1 + mask.to(acc)) * rational).sum(-1)
    return (scale * logits).to(mask.dtype)
