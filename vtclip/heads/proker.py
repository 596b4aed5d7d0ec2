# SPDX-License-Identifier: Apache-2.0
"""ProKeR: kernel ridge regression that is pulled towards zero-shot instead of towards 0.

    logits = z(x) + k(x, S) (k(S, S) + lambda I)^-1 (alpha Y - z(S))
    k(x, s) = exp(-beta * (1 - x s^T) * 2) = exp(-beta * |x - s|^2),  x and s of length 1

z and Y without their means over the classes, which a softmax ignores: lambda -> infinity is
zero-shot exactly. alpha is the height, in logits, that the true class of a support image is pulled
to. arXiv 2501.11175, eq. 9 and 10; there z is scaled to the one-hot Y instead of Y to z.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vtclip.heads._support import SupportHead, best, extended, grid, options_above_zero
from vtclip.support import Support

ALPHAS = (2.5, 5.0, 10.0, 20.0, 40.0)
BETAS = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0)
LAMBDAS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


class ProKeR(SupportHead):
    """Closed form; `coefficients` [N, K] are what the solve gives, made by `fit_support`.

    alpha, beta, lam: target in logits, sharpness of the kernel, weight of the pull to zero-shot;
    `choose` sets all three by validation images.
    """

    method = "proker"
    coefficients: Tensor

    def __init__(
        self,
        text: Tensor,
        *,
        num_support: int = 0,
        alpha: float = 10.0,
        beta: float = 0.5,
        lam: float = 0.1,
        logit_scale: float = 100.0,
    ) -> None:
        super().__init__(text, num_support=num_support, logit_scale=logit_scale)
        options_above_zero("ProKeR", alpha=alpha, beta=beta, lam=lam)
        self.alpha, self.beta, self.lam = float(alpha), float(beta), float(lam)
        self.register_buffer("coefficients", text.new_zeros(num_support, text.shape[0]))

    def options(self) -> dict[str, Any]:
        names = "alpha", "beta", "lam"
        return {**super().options(), **{name: getattr(self, name) for name in names}}

    def forward(
        self, image: Tensor, spatial: Tensor | None = None, spatial_mask: Tensor | None = None
    ) -> Tensor:
        """image [B, C] -> logits [B, K]; spatial features are accepted and ignored."""
        x = F.normalize(image, dim=-1)
        return self.zero_shot(image) + kernel(x, self.keys, self.beta) @ self.coefficients

    @torch.no_grad()
    def fit_support(self, support: Support) -> None:
        """Keep the labelled images and solve for their coefficients, in float64."""
        super().fit_support(support)
        Y, z = self._targets()
        gram = kernel(self.keys.double(), self.keys.double(), self.beta)
        self.coefficients = solve(gram, self.alpha * Y - z, self.lam).to(self.text)

    @torch.no_grad()
    def choose(self, val: Support) -> None:
        """alpha, beta and lam of the least NLL over validation images; solves again."""
        if not len(self.keys):
            return
        image, label = self.checked(val)
        base = self.zero_shot(image).double()
        Y, z = self._targets()
        keys, rows = self.keys.double(), image.double()
        parts: dict[tuple[float, float], tuple[Tensor, Tensor]] = {}
        for beta in BETAS:
            to_val = kernel(rows, keys, beta)
            values, vectors = torch.linalg.eigh(kernel(keys, keys, beta))
            right = vectors.mT @ torch.cat([Y, z], dim=1)
            left = to_val @ vectors
            for lam in LAMBDAS:
                both = left @ (right / (values[:, None].clamp(min=0) + lam))
                Y_part, z_part = both.split(self.num_classes, dim=1)
                parts[beta, lam] = Y_part, z_part

        def logits(at: Mapping[str, float]) -> Tensor:
            Y_part, z_part = parts[at["beta"], at["lam"]]
            return base + at["alpha"] * Y_part - z_part

        found = best(grid(alpha=ALPHAS, beta=BETAS, lam=LAMBDAS), logits, label)
        self.alpha, self.beta, self.lam = found["alpha"], found["beta"], found["lam"]
        self.fit_support(Support(self.keys, self.label))

    def extend(self, text_new: Tensor, support: Support) -> SupportHead:
        """The head over old and new classes; support.label of the new images starts at K.

        Solved again over all support images with the same alpha, beta and lam.
        """
        options = {**self.options(), "num_support": 0}
        return extended(self, text_new, support, lambda text: ProKeR(text, **options))

    def _targets(self) -> tuple[Tensor, Tensor]:
        """Y and z(S) [N, K] without their means over the classes, float64."""
        Y, z = self.one_hot().double(), self.zero_shot(self.keys).double()
        return Y - Y.mean(dim=1, keepdim=True), z - z.mean(dim=1, keepdim=True)


def kernel(x: Tensor, s: Tensor, beta: float) -> Tensor:
    """exp(-beta |x - s|^2) [B, N] of rows of length 1."""
    return torch.exp(-2 * beta * (1 - x @ s.mT))


def solve(gram: Tensor, residual: Tensor, lam: float) -> Tensor:
    """(gram + lam I)^-1 residual, gram symmetric [N, N]."""
    ridge = gram + lam * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    found: Tensor = torch.linalg.solve(ridge, residual)
    return found
