# SPDX-License-Identifier: Apache-2.0
"""What every training image and every class text adds to every logit of an image.

    logits = sum of the terms + sum over texts j of c_j + sum over training images i of c_i

Of a head whose logits are z(x) + k(x, S) A that is c_i = k(x, s_i) A_i, exactly. A head of the
linear kernel may keep W = S^T A alone; `expansion` finds an A of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

PROMPTS = "prompts"  # the term of zero-shot


class Contributions(NamedTuple):
    """The parts of the logits [B, K] of B images, float64; `logits` adds them up again.

    terms: [B, K] each. "prompts" is what the class texts say by zero-shot; a pool of heads has more
        (see `vtclip.heads.auto`).
    images: [B, N, K], of each training image in the order of the support.
    texts: [B, T, K], of each class text as a training row: T is K, or 0 where texts are none.
    label [N]: the class of each training image. cosine [B, N] and text_cosine [B, K]: of the image
        with each of them and with each class text.
    """

    terms: Mapping[str, Tensor]
    images: Tensor
    texts: Tensor
    label: Tensor
    cosine: Tensor
    text_cosine: Tensor

    def logits(self) -> Tensor:
        """[B, K] float64."""
        rows = self.images.sum(dim=1) + self.texts.sum(dim=1)
        return rows + torch.stack(list(self.terms.values())).sum(dim=0)


def cosines(image: Tensor, rows: Tensor) -> Tensor:
    """image [B, C], rows [N, C] -> [B, N] float64."""
    return F.normalize(image.double(), dim=-1) @ F.normalize(rows.double(), dim=-1).mT


def of_rows(
    image: Tensor, zero_shot: Tensor, each: Tensor, keys: Tensor, label: Tensor, text: Tensor
) -> Contributions:
    """Contributions of image [B, C] where each [B, N + T, K] are those of N images and T texts.

    zero_shot [B, K]: the term of the prompts; keys [N, C] with label [N]; text [K, C].
    """
    images, texts = each.double().tensor_split([len(keys)], dim=1)
    seen = cosines(image, keys), cosines(image, text)
    return Contributions({PROMPTS: zero_shot.double()}, images, texts, label, *seen)


def expansion(
    rows: Tensor, W: Tensor, offset: Tensor, weight: Tensor, label: Tensor, lam: float
) -> Tensor:
    """A [M, K] float64 with rows^T A = W, for the W [C, K] that a logistic regression found.

    rows [M, C] and their offset [M, K], weight [M] and label [M], all float64 but the label. At

        argmin over W of  sum_i w_i CE(offset_i + s_i W, y_i) + lam / 2 |W|^2

    the gradient is 0, which is W = rows^T A with A_i = w_i (y_i - p_i) / lam. What W lacks of that,
    because its solver ended before or because it was rounded, is added to A as the change of least
    norm that makes the sum W's again.
    """
    found = W.double()
    residual = F.one_hot(label, W.shape[1]) - (offset + rows @ found).softmax(dim=1)
    A = weight[:, None] * residual / lam
    # W was rounded to its own type: along directions below that there is nothing to find
    least = 10 * torch.finfo(W.dtype).eps
    lacks = (found - rows.mT @ A).cpu()
    change = torch.linalg.lstsq(rows.mT.cpu(), lacks, rcond=least, driver="gelsd").solution
    return A + change.to(A.device)
