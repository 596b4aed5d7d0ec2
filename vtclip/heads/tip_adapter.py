# SPDX-License-Identifier: Apache-2.0
"""Tip-Adapter: the support images vote for their classes.

    logits = z + alpha * exp(-beta * (1 - v S^T)) Y     z: zero-shot logits, v and S of length 1

arXiv 2111.03930, where Y is one-hot and every class has as many images. The votes of a class are a
sum over its images: with unequal numbers the large classes win by their size. `votes_per_class` m
replaces the one of an image of class k, of which there are n_k, by m / n_k, which makes the votes
m times the mean over the images of the class. Where n_k = m for all k that is the published
equation, bit for bit. With the trained keys of Tip-Adapter-F, S is a parameter. As
attention over the support: exp(-beta * (1 - v S^T)) Y = exp(lse - beta) * softmax(beta v S^T) Y,
where lse is the logarithm of what the softmax divides by.
"""

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from vtclip.heads._check import check_image, check_not_negative, check_positive
from vtclip.heads._contributions import Contributions
from vtclip.heads._support import Candidates, SupportHead, steps
from vtclip.heads.config import FitConfig

ALPHAS = steps(0.005, 1.28, 2)  # times logit_scale
BETAS = steps(1.0, 45.3, 2**0.5)


class TipAdapter(SupportHead):
    """Training-free cache over `num_support` images.

    alpha: weight of the votes, in logits; 0 leaves zero-shot's. Default 0.16 * logit_scale.
    beta: sharpness of the votes, default 8. `choose` sets both.
    votes_per_class: as how many images each class counts, see the module.

    As well as validation images, `choose` asks each support image of a class with several what the
    others say of it, its own class's votes multiplied by n / (n - 1) for the one that is left out.
    By `benchmarks/choose_search.py` that gains 1.3 points with 16 shots on RN50 and elsewhere
    between -0.1 and 0.3.

    Expected: 90.1 / 94.6 / 96.0 % from 81.6 % zero-shot with 1 / 4 / 16 shots, mean of seeds 1-3,
        on 500 satellite photos of 19 classes through ViT-B/32; 84.0 / 88.6 / 94.7 from 71.6 % RN50.
    Cost: 0.3 s for 16 shots of 100 classes of width 512 on two CPU cores.
    Command: vtclip fit SOURCE --method tip-adapter --shots 16
    """

    method = "tip-adapter"
    searched: ClassVar[tuple[str, ...]] = ("alpha", "beta")
    default_alpha = 0.16  # times logit_scale
    default_beta = 8.0
    alpha: float
    beta: float

    def __init__(
        self,
        text: Tensor,
        *,
        num_support: int = 0,
        alpha: float | None = None,
        beta: float | None = None,
        votes_per_class: float | None = None,
        logit_scale: float = 100.0,
    ) -> None:
        super().__init__(
            text,
            num_support=num_support,
            votes_per_class=votes_per_class,
            logit_scale=logit_scale,
        )
        alpha = self.default_alpha * logit_scale if alpha is None else alpha
        beta = self.default_beta if beta is None else beta
        check_positive(type(self).__name__, beta=beta)
        check_not_negative(type(self).__name__, alpha=alpha)
        self.alpha, self.beta = float(alpha), float(beta)

    def image_logits(self, image: Tensor) -> Tensor:
        z = self.zero_shot(image)
        return z + self.alpha * (self.affinity(self.similarity(image), self.beta) @ self.values())

    @torch.no_grad()
    def contributions(
        self, image: Tensor, spatial: Tensor | None = None, spatial_mask: Tensor | None = None
    ) -> Contributions:
        check_image(type(self).__name__, image, self.text)

        def votes(rows: Tensor) -> Tensor:
            return self.zero_shot_and_votes(rows)[1]

        z = self.zero_shot_and_votes(image)[0]
        return self.contributions_of(image, z, votes, self.values())

    def zero_shot_and_votes(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image [B, C] -> z [B, K] and by how much each support image votes [B, N]:
        logits = z + votes @ `values`.
        """
        votes = self.alpha * self.affinity(self.similarity(image), self.beta)
        return self.zero_shot(image), votes

    def values(self) -> Tensor:
        """What each support image votes, [N, K]: Y, or m / n_k in place of its ones."""
        if self.votes_per_class is None:
            return self.one_hot()
        return self.one_hot() * self.class_weights().to(self.text)

    def similarity(self, image: Tensor) -> Tensor:
        """image [B, C] -> v S^T [B, N]."""
        return F.normalize(image, dim=-1) @ self.keys.mT

    @staticmethod
    def affinity(similarity: Tensor, beta: float) -> Tensor:
        """exp(-beta (1 - similarity)), of any shape: how much a kept image votes."""
        return torch.exp(-beta * (1 - similarity))

    def candidates(self, image: Tensor, label: Tensor) -> Candidates:
        z, label, votes_of = self.evidence(image, label)
        similarity = self.similarity(image), self.similarity(self.keys)
        votes = {
            beta: votes_of(*(self.affinity(rows, beta) for rows in similarity)) for beta in BETAS
        }

        def logits(at: Mapping[str, float]) -> Tensor:
            return z + at["alpha"] * votes[at["beta"]]

        grid = {"alpha": [self.logit_scale * value for value in ALPHAS], "beta": BETAS}
        return Candidates(grid, self.centre(), logits, label)

    def centre(self) -> dict[str, float]:
        """Present values; for a zero, which has no logarithm, the smallest alpha tried."""
        smallest = self.logit_scale * min(ALPHAS)
        return {name: getattr(self, name) or smallest for name in self.searched}

    def evidence(
        self, image: Tensor, label: Tensor
    ) -> tuple[Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]:
        """Zero-shot logits [n + m, K] and labels of the n images and of m support rows.

        The function makes votes [n + m, K] of affinities [n, N] and [N, N]; in the latter each of
        the m rows is left out of its own.
        """
        Y, values = self.one_hot(), self.values()
        count = Y.sum(dim=0)
        # trained keys have fitted their own labels, and say nothing about other images
        several = (count[self.label] > 1) & (not self.trains_keys)

        def votes(to_val: Tensor, to_support: Tensor) -> Tensor:
            others = to_support.clone().fill_diagonal_(0)[several] @ values
            others = others * torch.where(Y.bool(), count / (count - 1).clamp(min=1), 1)[several]
            return torch.cat([to_val @ values, others])

        z = self.zero_shot(torch.cat([image, self.keys[several]]))
        return z, torch.cat([label, self.label[several]]), votes


class TipAdapterF(TipAdapter):
    """Tip-Adapter whose keys are trained; they start at the support images.

    Training runs at the given alpha and beta, defaults 0.04 * logit_scale and 5.5: each image's own
    key votes for it, and a larger alpha leaves little loss to learn from. `choose` follows.

    Its `extend` is a warm start, not a new training: trained keys stay and each image of a new
    class joins as it is.
    """

    method = "tip-adapter-f"
    trains_keys = True
    default_alpha = 0.04
    default_beta = 5.5

    @classmethod
    def recipe(cls, shots: int) -> FitConfig:
        """AdamW with the published rate, epsilon and epochs; alpha and beta by validation after it.

        Batches of 32: the published 256 are a single step per epoch where classes are few.

        Expected: 90.5 / 96.3 / 97.9 % from 81.6 % zero-shot with 1 / 4 / 16 shots, mean of seeds
            1-3, on 500 satellite photos of 19 classes through ViT-B/32; 84.5 / 92.0 / 95.6 from
            71.6 % RN50.
        Cost: 5 s for 16 shots of 100 classes of width 512 on two CPU cores.
        Command: vtclip fit SOURCE --method tip-adapter-f --shots 16
        """
        del shots
        return FitConfig(
            epochs=20,
            optimizer="adamw",
            lr=1e-3,
            eps=1e-4,
            weight_decay=1e-2,
            batch_size=32,
            warmup="linear",
        )
