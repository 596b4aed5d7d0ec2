# SPDX-License-Identifier: Apache-2.0
"""Proto-CLIP without training: distances to image prototypes and to text prototypes, mixed.

    p = alpha * softmax(-beta |v - c_image|^2) + (1 - alpha) * softmax(-beta |v - c_text|^2)
    logits = log p

v of length 1; c_image: mean of a class's support images, c_text: its class text, both brought to
length 1, so that -beta |v - c|^2 is 2 beta v c^T but for a number that all classes share.
arXiv 2307.03073.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtclip import ops
from vtclip.heads._check import check_image, check_text
from vtclip.heads._support import (
    check_positive,
    check_support,
    extended_text,
    most_likely,
    steps,
)
from vtclip.support import Support

ODDS = steps(1 / 16, 16, 2)  # alpha / (1 - alpha)
BETAS = steps(0.01, 1.28, 2**0.5)  # times logit_scale


class ProtoCLIP(nn.Module):
    """Prototypes [K, C] in place of the support images themselves.

    alpha: share of the image prototypes, 0 to 1; 0 ranks as zero-shot.
    beta: sharpness of both softmaxes; default 0.22 * logit_scale. `choose` sets both.

    A class without support images has its text for an image prototype, as all have before
    `fit_support`. The order of the support does not matter.
    """

    method = "proto-clip"
    needs_spatial = False
    text: Tensor
    prototypes: Tensor

    def __init__(
        self,
        text: Tensor,
        *,
        alpha: float = 0.3,
        beta: float | None = None,
        logit_scale: float = 100.0,
    ) -> None:
        super().__init__()
        check_text("ProtoCLIP", text)
        beta = 0.22 * logit_scale if beta is None else beta
        check_positive("ProtoCLIP", beta=beta, logit_scale=logit_scale)
        if not 0 <= alpha <= 1:
            raise ValueError(f"ProtoCLIP: alpha must lie in 0..1, got {alpha}")
        self.alpha, self.beta, self.logit_scale = float(alpha), float(beta), float(logit_scale)
        self.register_buffer("text", text.detach().clone(memory_format=torch.contiguous_format))
        self.register_buffer("prototypes", F.normalize(self.text, dim=-1))

    @property
    def num_classes(self) -> int:
        return self.text.shape[0]

    def options(self) -> dict[str, Any]:
        """What the constructor needs beside `text`, as plain numbers and strings."""
        return {name: getattr(self, name) for name in ("alpha", "beta", "logit_scale")}

    def forward(
        self, image: Tensor, spatial: Tensor | None = None, spatial_mask: Tensor | None = None
    ) -> Tensor:
        """image [B, C] -> log p [B, K]; spatial features are accepted and ignored."""
        check_image("ProtoCLIP", image, self.text)
        return mixed(*self.cosines(image), self.alpha, self.beta)

    def cosines(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image [B, C] -> cosine to the image and to the text prototypes [B, K]."""
        return ops.cosine_logits(image, self.prototypes), ops.cosine_logits(image, self.text)

    @torch.no_grad()
    def fit_support(self, support: Support) -> None:
        """The prototypes of the labelled images, in place of any before."""
        image, label = check_support("ProtoCLIP", support, self.text)
        self.prototypes = prototypes(image, label, self.text)

    @torch.no_grad()
    def choose(self, val: Support) -> None:
        """Set alpha and beta by validation images, see `most_likely`."""
        image, label = check_support("ProtoCLIP", val, self.text)
        to_image, to_text = self.cosines(image)

        def logits(at: Mapping[str, float]) -> Tensor:
            return mixed(to_image, to_text, at["odds"] / (1 + at["odds"]), at["beta"])

        alpha = min(max(self.alpha, 0.01), 0.99)
        centre = {"odds": alpha / (1 - alpha), "beta": self.beta}
        betas = [self.logit_scale * value for value in BETAS]
        found = most_likely({"odds": ODDS, "beta": betas}, centre, logits, label)
        self.alpha, self.beta = found["odds"] / (1 + found["odds"]), found["beta"]

    def extend(self, text_new: Tensor, support: Support) -> "ProtoCLIP":
        """A head over K old and K' new classes: text_new [K', C], support.label in K..K+K'-1.

        It equals the head of the same hyper-parameters that was given both supports at once.
        """
        text = extended_text("ProtoCLIP", self.text, text_new, support)
        larger = ProtoCLIP(text, **self.options())
        larger.fit_support(support)
        larger.prototypes[: self.num_classes] = self.prototypes
        return larger.train(self.training)


def prototypes(image: Tensor, label: Tensor, text: Tensor) -> Tensor:
    """[K, C] of length 1: a class's mean image [N, C], or its text where it has none."""
    Y = F.one_hot(label, len(text)).to(text)  # [N, K]
    mean = F.normalize(Y.mT @ image, dim=-1)
    return torch.where(Y.any(dim=0)[:, None], mean, F.normalize(text, dim=-1))


def mixed(to_image: Tensor, to_text: Tensor, alpha: float, beta: float) -> Tensor:
    """log p [B, K] of cosines [B, K]."""
    image, text = ((2 * beta * rows).log_softmax(dim=-1) for rows in (to_image, to_text))
    if alpha in (0, 1):
        return image if alpha else text
    return torch.logaddexp(math.log(alpha) + image, math.log(1 - alpha) + text)
