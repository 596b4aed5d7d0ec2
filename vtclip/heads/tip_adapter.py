# SPDX-License-Identifier: Apache-2.0
"""Tip-Adapter: the support images vote for their classes.

    logits = z + alpha * exp(-beta * (1 - v S^T)) Y     z: zero-shot logits, v and S of length 1

arXiv 2111.03930, eq. 5 and 6. With the trained keys of Tip-Adapter-F, S is a parameter.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtclip.heads._support import SupportHead, best, extended, grid, options_above_zero
from vtclip.support import Support

ALPHAS = tuple(0.25 * 2 ** (step / 2) for step in range(17))  # 0.25 .. 64
BETAS = tuple(0.5 * 2 ** (step / 2) for step in range(13))  # 0.5 .. 32


class TipAdapter(SupportHead):
    """Training-free cache over `num_support` images.

    alpha, beta: weight and sharpness of the votes; `choose` sets both by validation images.
    `alpha` may be 0: then the logits are zero-shot's.
    """

    method = "tip-adapter"

    def __init__(
        self,
        text: Tensor,
        *,
        num_support: int = 0,
        alpha: float = 1.0,
        beta: float = 5.5,
        logit_scale: float = 100.0,
    ) -> None:
        super().__init__(text, num_support=num_support, logit_scale=logit_scale)
        options_above_zero(type(self).__name__, beta=beta)
        if not 0 <= alpha < float("inf"):
            raise ValueError(f"{type(self).__name__}: alpha must be at least 0, got {alpha}")
        self.alpha, self.beta = float(alpha), float(beta)

    def options(self) -> dict[str, Any]:
        return {**super().options(), "alpha": self.alpha, "beta": self.beta}

    def forward(
        self, image: Tensor, spatial: Tensor | None = None, spatial_mask: Tensor | None = None
    ) -> Tensor:
        """image [B, C] -> logits [B, K]; spatial features are accepted and ignored."""
        return self.zero_shot(image) + self.alpha * self.votes(self.similarity(image), self.beta)

    def similarity(self, image: Tensor) -> Tensor:
        """image [B, C] -> cosine to each support row [B, N]."""
        return F.normalize(image, dim=-1) @ F.normalize(self.keys, dim=-1).mT

    def votes(self, similarity: Tensor, beta: float) -> Tensor:
        """[B, N] -> [B, K]."""
        return torch.exp(-beta * (1 - similarity)) @ self.one_hot()

    @torch.no_grad()
    def choose(self, val: Support) -> None:
        """alpha and beta of the least NLL over validation images."""
        image, label = self.checked(val)
        z, similarity = self.zero_shot(image), self.similarity(image)
        votes = {beta: self.votes(similarity, beta) for beta in BETAS}

        def logits(at: Mapping[str, float]) -> Tensor:
            return z + at["alpha"] * votes[at["beta"]]

        found = best(grid(alpha=ALPHAS, beta=BETAS), logits, label)
        self.alpha, self.beta = found["alpha"], found["beta"]

    def extend(self, text_new: Tensor, support: Support) -> SupportHead:
        """The head over old and new classes; support.label of the new images starts at K.

        Equal to a head fitted on everything at once with the same alpha and beta.
        """
        options = {**self.options(), "num_support": 0}
        return extended(self, text_new, support, lambda text: type(self)(text, **options))


class TipAdapterF(TipAdapter):
    """Tip-Adapter whose keys are trained; they start at the support images.

    An extended head keeps the trained keys beside the new images as they are: a warm start.
    """

    method = "tip-adapter-f"

    def __init__(self, text: Tensor, *, num_support: int = 0, **options: Any) -> None:
        super().__init__(text, num_support=num_support, **options)
        keys = self.keys
        del self.keys
        self.keys = nn.Parameter(keys)

    def fit_support(self, support: Support) -> None:
        """Start the keys at the labelled images."""
        keys, self.label = self.checked(support)
        self.keys = nn.Parameter(keys)
