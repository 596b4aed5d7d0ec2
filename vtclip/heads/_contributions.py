# SPDX-License-Identifier: Apache-2.0
"""What every training image and every class text adds to every logit of an image.

    logits = sum of the terms + sum over rows i of k(x, s_i) A_i

The rows are the N training images and, of some heads, the class texts as training rows behind them.
The features of all images have much in common, so that k(x, s_i) is large whatever x shows, and
k(x, s_i) A_i are large numbers that cancel. With u_i the mean of k(s_j, s_i) over the training
images s_j the same sum is

    logits = sum of the terms + sum over i of u_i A_i + sum over i of (k(x, s_i) - u_i) A_i

whose first two parts any image has, and whose last says what this one is more or less like than
training images usually are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

PROMPTS = "prompts"  # the term of zero-shot
AT_A_TIME = 1024  # training images whose kernel values are held at once


class KernelSum(NamedTuple):
    """k(x, S) A of B images and M rows, float64: near k(x, S) [B, M], usual u [M] and A [M, K]."""

    near: Tensor
    usual: Tensor
    A: Tensor


class Contributions(NamedTuple):
    """The parts of the logits [B, K] of B images, float64; `logits` adds them up again.

    terms: [B, K] each. "prompts" is what the class texts say by zero-shot; a pool of heads has more
        (see `vtclip.heads.auto`).
    sums: of a head one, or none where it has no training images; of a pool one for each member.
        The first N rows of each are the training images, the K behind them, if any, the class texts
        as training rows.
    label [N]: the class of each training image. cosine [B, N] and text_cosine [B, K]: of the image
        with each of them and with each class text.
    """

    terms: Mapping[str, Tensor]
    sums: Sequence[KernelSum]
    label: Tensor
    cosine: Tensor
    text_cosine: Tensor

    def rows(self, classes: Sequence[int] | None = None, *, centred: bool = False) -> Tensor:
        """[B, N + K, n]: what each training image, and behind them each text, adds to n classes.

        k(x, s_i) A_i or, `centred`, (k(x, s_i) - u_i) A_i; 0 of texts that are no training rows.
        classes: their numbers, or None for all.
        """
        (B, K), N = self.text_cosine.shape, len(self.label)
        columns = slice(None) if classes is None else torch.as_tensor(classes)
        width = K if classes is None else len(classes)
        total = self.text_cosine.new_zeros(B, N + K, width)
        for near, usual, A in self.sums:
            here = near - usual if centred else near
            total[:, : len(A)] += here[:, :, None] * A[:, columns]
        return total

    def shared(self) -> Tensor:
        """sum over i of u_i A_i [K], which any image gets."""
        nothing = self.text_cosine.new_zeros(self.text_cosine.shape[1])
        return sum((one.usual @ one.A for one in self.sums), nothing)

    def logits(self) -> Tensor:
        """[B, K] float64."""
        total = torch.stack(list(self.terms.values())).sum(dim=0)
        return sum((one.near @ one.A for one in self.sums), total)


def cosines(image: Tensor, rows: Tensor) -> Tensor:
    """image [B, C], rows [N, C] -> [B, N] float64."""
    return F.normalize(image.double(), dim=-1) @ F.normalize(rows.double(), dim=-1).mT


def zero_shot_alone(image: Tensor, z: Tensor, text: Tensor) -> Contributions:
    """Of a head without training images: z [B, K] by the class texts [K, C]."""
    label = torch.empty(0, dtype=torch.long, device=text.device)
    cosine = cosines(image, text)
    return Contributions({PROMPTS: z.double()}, [], label, cosine[:, :0], cosine)


def of_kernel(
    image: Tensor,
    z: Tensor,
    near: Callable[[Tensor], Tensor],
    A: Tensor,
    keys: Tensor,
    label: Tensor,
    text: Tensor,
) -> Contributions:
    """Of a head with logits z + k(x, S) A: image [B, C], z [B, K], A [N, K] or [N + K, K].

    near: rows [b, C] to k(rows, S) [b, N] or [b, N + K]. keys [N, C] and label [N]: the training
    images; text [K, C].
    """
    usual = A.new_zeros(len(A), dtype=torch.float64)
    for start in range(0, len(keys), AT_A_TIME):
        usual += near(keys[start : start + AT_A_TIME]).double().sum(dim=0)
    sums = [KernelSum(near(image).double(), usual / len(keys), A.double())]
    terms = {PROMPTS: z.double()}
    return Contributions(terms, sums, label, cosines(image, keys), cosines(image, text))


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
    change: Tensor = torch.linalg.lstsq(rows.mT.cpu(), lacks, rcond=least, driver="gelsd").solution
    return A + change.to(A.device)
