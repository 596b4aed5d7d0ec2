# SPDX-License-Identifier: Apache-2.0
"""The end of RAda: output projection, mask, masked logits, and how far the mask is from 1.

    M[b,k]      = context[b,k] @ weight^T + bias
    logits[b,k] = scale * sum_i relu(1 + M[b,k,i]) * image[b,i] * text[k,i]
    penalty[b]  = 0 | mean_ki |E| | mean_ki E^2 | max_ki |E|          E = relu(1 + M[b]) - 1

context [B, K, D], weight [D, D], bias [D], image [B, D], text [K, D] -> logits [B, K] in the input
dtype, penalty [B] in the accumulation dtype. The gradient of the maximum goes to its first element,
as torch.max sends it. relu has slope 0 at 0, |E| at 0 too. Where K or D is 0 the penalty is 0.
RAda, arXiv 2507.15480; the released variants use the squared, the largest, or no deviation.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtclip.reference._dtypes import PENALTY_CODES, acc_dtype


def mask_penalty(mask: Tensor, penalty: int) -> Tensor:
    """penalty [B] of mask [B, K, D] = relu(1 + M)."""
    off = (mask - 1).flatten(1)
    if penalty == PENALTY_CODES["none"]:
        return off.new_zeros(off.shape[0])
    if off.shape[1] == 0:
        return off.sum(1)
    if penalty == PENALTY_CODES["l1"]:
        return off.abs().mean(1)
    if penalty == PENALTY_CODES["mse"]:
        return off.square().mean(1)
    return off.abs().max(1).values


def rational_head(
    context: Tensor, weight: Tensor, bias: Tensor, image: Tensor, text: Tensor, *, scale: float,
    penalty: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(logits, penalty) of the module docstring."""
    acc = acc_dtype(context.dtype)
    mask = torch.relu(1 + (context.to(acc) @ weight.to(acc).T + bias.to(acc)))
    rational = image.to(acc)[:, None] * text.to(acc)  # [B, K, D]
    logits = (scale * (mask * rational).sum(-1)).to(context.dtype)
    return logits, mask_penalty(mask, penalty)
