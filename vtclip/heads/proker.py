# SPDX-License-Identifier: Apache-2.0
"""ProKeR: kernel ridge regression that is pulled towards zero-shot instead of towards 0.

    logits = z(x) + k(x, S) (k(S, S) + lam I)^-1 (alpha Y - z(S))
    k(x, s) = exp(-beta |x - s|^2) = exp(-2 beta (1 - x s^T)),  x and s of length 1

z, Y: zero-shot logits and one-hot labels. arXiv 2501.11175, whose target is Y and whose z is scaled
to it; here z keeps its scale and alpha scales Y, which multiplies all logits by one number. Inside
the solve z and Y have no means over the classes, which adds one number to all logits of an image.

That is the minimum over f of sum_i w_i |f(s_i) - alpha y_i|^2 + lam |f - z|^2 with all w_i = 1.
Where classes have unequal numbers n_k of images, `votes_per_class` m gives those of class k the
weight w_i = m / n_k, and lam W^-1 takes the place of lam I; with n_k = m for all k nothing changes,
bit for bit. With half of the classes of the photos below cut to 6 images, these have through
ViT-B/32 96.8 % and through RN50 91.2 % instead of 96.3 % and 88.3 %, all classes 97.4 % and 94.1 %
instead of 97.2 % and 92.9 % (--shots all, mean of seeds 1-3).
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from vtclip.heads._check import check_image, check_positive
from vtclip.heads._contributions import Contributions
from vtclip.heads._head import Support
from vtclip.heads._kernel_solve import kernel_solve
from vtclip.heads._support import Candidates, SupportHead, kernel, steps

ALPHAS = steps(0.025, 0.8, 2)  # times logit_scale
BETAS = (0.25, 1.0, 4.0)
LAMBDAS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
LEAST_LAM = 1e-6  # below it duplicates would make the system singular in float64


class ProKeR(SupportHead):
    """Closed form: `coefficients` [N, K], from one solve in `fit_support`.

    alpha: how far, in logits, the true class of a support image is pulled above the others.
        Default 0.15 * logit_scale.
    beta: sharpness of the kernel.
    lam: weight of the pull to zero-shot, at least 1e-6. `choose` sets all three and solves again.
    votes_per_class: as how many images each class counts, see the module.

    The solve is float64 up to 4,096 images. Above them it is float32 as long as that fits the
    targets to 1e-3 of them, see `vtclip.heads._kernel_solve`, and holds one table of [N, N]: 1 GB
    of 16,000 images, 2 GB where it has to be float64.

    No training: alpha, beta and lam by validation.

    Expected: 89.9 / 95.9 / 98.4 % from 81.6 % zero-shot with 1 / 4 / 16 shots, mean of seeds 1-3,
        on 500 satellite photos of 19 classes through ViT-B/32; 85.4 / 92.8 / 97.2 from 71.6 % RN50.
    Cost: 0.7 s for 16 shots of 100 classes of width 512 on two CPU cores.
    Command: vtclip fit SOURCE --method proker --shots 16
    """

    method = "proker"
    searched = ("alpha", "beta", "lam")
    coefficients: Tensor
    alpha: float
    beta: float
    lam: float

    def __init__(
        self,
        text: Tensor,
        *,
        num_support: int = 0,
        alpha: float | None = None,
        beta: float = 1.0,
        lam: float = 0.1,
        votes_per_class: float | None = None,
        logit_scale: float = 100.0,
    ) -> None:
        super().__init__(
            text,
            num_support=num_support,
            votes_per_class=votes_per_class,
            logit_scale=logit_scale,
        )
        alpha = 0.15 * logit_scale if alpha is None else alpha
        check_positive("ProKeR", alpha=alpha, beta=beta, lam=lam)
        if lam < LEAST_LAM:
            raise ValueError(f"ProKeR: lam must be at least {LEAST_LAM:g}, got {lam}")
        self.alpha, self.beta, self.lam = float(alpha), float(beta), float(lam)
        self.register_buffer("coefficients", text.new_zeros(num_support, text.shape[0]))

    def image_logits(self, image: Tensor) -> Tensor:
        x = F.normalize(image, dim=-1)
        return self.zero_shot(image) + kernel(x, self.keys, self.beta) @ self.coefficients

    @torch.no_grad()
    def contributions(
        self, image: Tensor, spatial: Tensor | None = None, spatial_mask: Tensor | None = None
    ) -> Contributions:
        check_image(type(self).__name__, image, self.text)

        def near(rows: Tensor) -> Tensor:
            return kernel(F.normalize(rows.double(), dim=-1), self.keys.double(), self.beta)

        return self.contributions_of(image, self.zero_shot(image), near, self.coefficients)

    @torch.no_grad()
    def fit_support(self, support: Support) -> None:
        """Keep the labelled images, in place of any before, and solve for their coefficients."""
        super().fit_support(support)
        Y, z = self._targets()
        solved = kernel_solve(
            self.keys.double(),
            self.beta,
            self.lam / self._weights(),
            self.alpha * Y - z,
            narrow=self.text.dtype != torch.float64,
        )
        # row by row, as a loaded adapter has them: products of another layout differ in last bits
        self.coefficients = solved.to(self.text).contiguous()

    @torch.no_grad()
    def keep_support(self, support: Support) -> None:
        super().fit_support(support)
        self.coefficients = self.text.new_empty(0, self.num_classes)

    def take(self, best: Mapping[str, float]) -> None:
        super().take(best)
        self.fit_support(Support(self.keys, self.label))

    def candidates(self, image: Tensor, label: Tensor) -> Candidates:
        """One eigendecomposition per beta serves every alpha and lam; in float32 or float64.

        Of r K r with r the square roots of the weights: (K + lam / w)^-1 = r (r K r + lam)^-1 r.
        """
        wide = torch.promote_types(self.text.dtype, torch.float32)
        base, (Y, z) = self.zero_shot(image).to(wide), self._targets()
        root = self._weights().sqrt()
        both = (root[:, None] * torch.cat([Y, z], dim=1)).to(wide)
        root = root.to(wide)
        image, keys = image.to(wide), self.keys.to(wide)
        solutions: dict[tuple[float, float], tuple[Tensor, Tensor]] = {}
        for beta in BETAS:
            values, vectors = torch.linalg.eigh(root[:, None] * kernel(keys, keys, beta) * root)
            to_val, right = (kernel(image, keys, beta) * root) @ vectors, vectors.mT @ both
            for lam in LAMBDAS:
                shrunk = to_val / (values.clamp(min=0) + lam)
                Y_part, z_part = (shrunk @ right).tensor_split(2, dim=1)
                solutions[beta, lam] = Y_part, base - z_part

        def logits(at: Mapping[str, float]) -> Tensor:
            Y_part, rest = solutions[at["beta"], at["lam"]]
            return at["alpha"] * Y_part + rest

        alphas = [self.logit_scale * value for value in ALPHAS]
        grid = {"alpha": alphas, "beta": BETAS, "lam": LAMBDAS}
        centre = {name: getattr(self, name) for name in self.searched}
        return Candidates(grid, centre, logits, label)

    def _weights(self) -> Tensor:
        """w [N] of the support, float64."""
        return self.class_weights().double()[self.label]

    def _targets(self) -> tuple[Tensor, Tensor]:
        """Y and z(S) [N, K] without their means over the classes, float64."""
        Y = self.one_hot().double()
        z = self.logit_scale * (self.keys.double() @ F.normalize(self.text.double(), dim=-1).mT)
        return Y - Y.mean(dim=1, keepdim=True), z - z.mean(dim=1, keepdim=True)
