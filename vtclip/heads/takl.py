# SPDX-License-Identifier: Apache-2.0
"""TAKL, text-anchored kernel logistic regression: logistic regression that starts at zero-shot.

    logits = z(x) / T0 + k(x, S) A
    A      = argmin  sum_i w_i CE(z(s_i) / T0 + k(s_i, S) A, y_i) + lam / 2 tr(A^T k(S, S) A)
    k(x, s) = x s^T  or  exp(-beta |x - s|^2),  x and s of length 1

z: zero-shot logits. S [N + K, C]: the N labelled images and under them the K class texts, each a
row of its own class, so that a class without images has a row, too. Nothing is centred: what all
images share serves each class as a bias that the penalty keeps small. T0, by which zero-shot
counts, is not trained: shots that are fitted cannot say how sure zero-shot may be of other images.

The objective is convex. With B such that B^T k(S, S) B = 1 and A = B W it is that of logistic
regression on R = k(S, S) B with the penalty lam / 2 |W|^2, see `vtclip.heads._logistic`. The linear
kernel needs no table of [N + K, N + K]: R is S in a basis of the features. Of the other kernel B
spans the eigenvectors of the RANK largest eigenvalues.

Texts as training rows and weights that are pulled to the texts are those of the cross-modal linear
probe (arXiv 2301.06267) and of the zero-shot linear probe (arXiv 2312.12730); the kernel expansion
about zero-shot is that of ProKeR (arXiv 2501.11175), with logistic loss in place of squares.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from vtclip.heads import _logistic
from vtclip.heads._check import check_image, check_not_negative, check_positive
from vtclip.heads._contributions import Contributions, expansion
from vtclip.heads._head import Support
from vtclip.heads._logistic import Problem
from vtclip.heads._support import Candidates, SupportHead, kernel

logger = logging.getLogger(__name__)

BETAS = (0.0, 1.0)
LAMBDAS = tuple(10 ** (-step / 2) for step in range(1, 9))  # each solution helps to the next
LAM_FACTOR = 10.0  # off its centre by this, lam costs half a nat
LEAST_LAM = 1e-6
RANK = 512
EXACT_ROWS = 640  # above them eigenvectors are approximated, see `leading`
ITERATIONS = 2
KERNEL_ROWS = 4096  # images and classes up to which the search tries kernels that need their table
# of a search, in float32 (float64 for a float64 head)
ROUGH, ROUGH_STEPS = 0.1, 12
# of more than KERNEL_ROWS images and classes, solved in the dtype of the search: steps of each
# strength on the way, and of that which is kept, by rounds until the objective is so close
MANY_ROUGH_STEPS, MANY_STEPS, MANY_ROUNDS, MANY_EXCESS = 4, 8, 6, 1e-2
# of what is kept, solved in float64, by the dtype of the search: well below its rounding of logits
CLOSENESS = {torch.float32: 1e-6, torch.float64: 1e-10}
LEAST_STEPS = 8
WORK, WORK_PER_STEP = 1.2e9, 6e6  # products with R in all; what a step costs beside its own


class TAKL(SupportHead):
    """`coefficients`: S^T A [C, K] of the linear kernel, A [N + K, K] of the other.

    beta: sharpness of the kernel exp(-beta |x - s|^2); 0 is the linear kernel. `choose` tries 0
        and, up to 4096 images and classes, 1.
    lam: strength of the penalty, at least 1e-6. `choose` sets it between 10^-0.5 and 10^-4.
    zero_shot_temperature: T0.
    votes_per_class: as how many images each class counts (m / n_k each); its text counts once.

    Solutions along decreasing lam in float32 serve the search and as starts; kernels, eigenvectors
    and the last steps are float64. These end at the optimum or, where they would take long, before
    it (see WORK): the logits of 16 shots of 101 classes are then 0.01 to 0.4 of 2 to 3 from it,
    root mean squares, by lam from 1e-2 to 3e-4, and the accuracy is the same to 0.04 points. The
    same images give the same bits on one machine.

    Above 4,096 images and classes all steps are float32 and a third as many, until the objective is
    within about 1 % of its minimum, else with a warning. The logits of 16 shots of 300 classes are
    then 0.01 of 1.2 from the optimum, and the accuracy is the same (61.7 %, lam 1e-2).

    No training: beta and lam by validation.

    Expected: 90.4 / 96.3 / 98.1 % from 81.6 % zero-shot with 1 / 4 / 16 shots, mean of seeds 1-3,
        on 500 satellite photos of 19 classes through ViT-B/32; 85.9 / 92.9 / 97.0 from 71.6 % RN50.
    Cost: 2.3 s of CPU time for 16 shots of 100 classes of width 512, 1.3 times ProKeR's beside it;
        1.6 GB for those of 1,000 classes.
    Command: vtclip fit SOURCE --method takl --shots 16
    """

    method = "takl"
    searched = ("beta", "lam")
    coefficients: Tensor
    beta: float
    lam: float

    def __init__(
        self,
        text: Tensor,
        *,
        num_support: int = 0,
        beta: float = 0.0,
        lam: float = 0.01,
        zero_shot_temperature: float = 2.0,
        votes_per_class: float | None = None,
        logit_scale: float = 100.0,
    ) -> None:
        super().__init__(
            text,
            num_support=num_support,
            votes_per_class=votes_per_class,
            logit_scale=logit_scale,
        )
        check_not_negative("TAKL", beta=beta)
        check_positive("TAKL", lam=lam, zero_shot_temperature=zero_shot_temperature)
        if lam < LEAST_LAM:
            raise ValueError(f"TAKL: lam must be at least {LEAST_LAM:g}, got {lam}")
        self.beta, self.lam = float(beta), float(lam)
        self.zero_shot_temperature = float(zero_shot_temperature)
        self.register_buffer("coefficients", text.new_zeros(self._width(), len(text)))
        self._thinned_from = 0  # rows of the head that this one is searched for
        self._fits = _Fits()

    def image_logits(self, image: Tensor) -> Tensor:
        z = self.zero_shot(image)
        if not self.num_support:  # nothing that zero-shot would have to agree with
            return z
        x = F.normalize(image, dim=-1)
        return z / self.zero_shot_temperature + self._features(x, self.beta) @ self.coefficients

    @torch.no_grad()
    def contributions(
        self, image: Tensor, spatial: Tensor | None = None, spatial_mask: Tensor | None = None
    ) -> Contributions:
        """As `Head.contributions`; texts have their own, as training rows.

        A of the linear kernel, which is not kept, is that of the optimum, and where the solve ended
        before it changed as little as makes the sum exact: `vtclip.heads._contributions.expansion`.
        """
        check_image(type(self).__name__, image, self.text)
        A = self.coefficients
        rows, offset, weight, label = self._training_rows()
        if not self.beta:
            A = expansion(rows, A, offset, weight, label, self.lam)

        def near(x: Tensor) -> Tensor:
            x = F.normalize(x.double(), dim=-1)
            return self._features(x, self.beta) if self.beta else x @ rows.mT

        z = self.zero_shot(image)
        if self.num_support:
            z = z / self.zero_shot_temperature
        return self.contributions_of(image, z, near, A)

    @torch.no_grad()
    def fit_support(self, support: Support) -> None:
        """Keep the labelled images, in place of any before, and solve for the coefficients.

        ValueError where a text, a training row here, is not finite.
        """
        self.keep_support(support)
        self._solve()

    @torch.no_grad()
    def keep_support(self, support: Support) -> None:
        finite = self.text.isfinite().all(dim=1)
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0])
            raise ValueError(f"TAKL: text must be finite, got NaN or infinity in row {row}")
        super().fit_support(support)
        self._fits = _Fits()
        self.coefficients = self.text.new_empty(0, self.num_classes)

    @torch.no_grad()
    def choose(self, val: Support) -> None:
        super().choose(val)
        self._fits = _Fits()  # their tables would serve other choices only

    def take(self, best: Mapping[str, float]) -> None:
        super().take(best)
        self._solve()

    def candidates(self, image: Tensor, label: Tensor) -> Candidates:
        """Rough solutions rank the points; they depend on the support alone, and are kept."""
        wide = torch.promote_types(self.text.dtype, torch.float32)
        z = self.zero_shot(image).to(wide) / self.zero_shot_temperature
        solutions: dict[tuple[float, float], Tensor] = {}
        betas = self._searched_betas()
        for beta in betas if self.num_support else ():
            fit = self._fit(beta)
            to_val = (self._features(image.double(), beta) @ fit.B).to(wide)
            for lam, W in zip(LAMBDAS, fit.path(len(LAMBDAS)), strict=True):
                solutions[beta, lam] = z + to_val @ W

        def logits(at: Mapping[str, float]) -> Tensor:
            return solutions.get((at["beta"], at["lam"]), z)

        grid = {"beta": betas, "lam": LAMBDAS}
        return Candidates(grid, {"lam": self.lam}, logits, label, {"lam": LAM_FACTOR})

    def _searched_betas(self) -> tuple[float, ...]:
        """The present one first: it wins a tie."""
        rows = max(self._thinned_from, self.num_support + self.num_classes)
        betas = BETAS if rows <= KERNEL_ROWS else BETAS[:1]
        return tuple(sorted(betas, key=lambda beta: beta != self.beta))

    def _every(self, step: int) -> SupportHead:
        thinned = super()._every(step)
        if isinstance(thinned, TAKL):
            thinned._thinned_from = self.num_support + self.num_classes
        return thinned

    def _features(self, x: Tensor, beta: float) -> Tensor:
        """x [B, C] of length 1 -> what `coefficients` weigh: x, or k(x, S) [B, N + K]."""
        if not beta:
            return x
        return kernel(x, self._rows().to(x), beta)

    def _rows(self) -> Tensor:
        """S [N + K, C] of length 1, in the dtype of the texts."""
        return torch.cat([self.keys, F.normalize(self.text, dim=-1)])

    def _solve(self) -> None:
        """Set `coefficients` to the optimum at beta and lam."""
        if not self.num_support:
            self.coefficients = self.text.new_zeros(self._width(), self.num_classes)
            return
        fit = self._fit(self.beta)
        self.coefficients = (fit.B @ fit.optimum(self.lam)).to(self.text).contiguous()

    def _width(self) -> int:
        """Rows of `coefficients`."""
        return self.num_support + self.num_classes if self.beta else self.text.shape[1]

    def _training_rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """S [N + K, C], its offset z / T0 [N + K, K] and weight, float64; and the classes."""
        rows = F.normalize(self._rows().double(), dim=-1)
        z = self.logit_scale * (rows @ rows[self.num_support :].mT)
        weight = self.class_weights().double()[self.label]
        every = torch.arange(self.num_classes, device=self.label.device)
        weight = torch.cat([weight, weight.new_ones(len(every))])
        return rows, z / self.zero_shot_temperature, weight, torch.cat([self.label, every])

    def _fit(self, beta: float) -> _Fit:
        if beta not in self._fits:
            rows, *others = self._training_rows()
            B, R = basis(rows, beta)
            problem = Problem(R, *others)
            rough = torch.promote_types(self.text.dtype, torch.float32)
            self._fits[beta] = _Fit(B, problem, problem.to(rough))
        return self._fits[beta]


class _Fit:
    """The solutions of one support with one kernel."""

    def __init__(self, B: Tensor, problem: Problem, rough: Problem) -> None:
        self.B, self.problem, self.rough = B, problem, rough
        self.many = len(problem.basis) > KERNEL_ROWS
        self._path: list[Tensor] = []
        self._optima: dict[float, Tensor] = {}

    def path(self, count: int) -> list[Tensor]:
        """W [r, K] near the optima of the first `count` of LAMBDAS, each from those before."""
        offset, R = self.rough.offset, self.rough.basis
        for lam in LAMBDAS[len(self._path) : count]:
            start = self._path[-1] if self._path else R.new_zeros(R.shape[1], offset.shape[1])
            if len(self._path) > 1:  # a path over equal steps of log(lam) goes on nearly as it did
                start = 2 * start - self._path[-2]
            steps = MANY_ROUGH_STEPS if self.many else ROUGH_STEPS
            W = _logistic.minimise(self.rough, start, lam, closeness=ROUGH, max_steps=steps)
            self._path.append(W)
        return self._path[:count]

    def optimum(self, lam: float) -> Tensor:
        """W [r, K] float64 at the optimum; the same bits whatever was asked for before."""
        if lam not in self._optima:
            larger = self.path(sum(value >= lam for value in LAMBDAS))
            if self.many:
                self._optima[lam] = self._near_optimum(larger, lam).double()
                return self._optima[lam]
            R, K = self.problem.basis, self.problem.offset.shape[1]
            start = larger[-1].double() if larger else R.new_zeros(R.shape[1], K)
            steps = int(WORK / (R.numel() * K + WORK_PER_STEP))
            self._optima[lam] = _logistic.minimise(
                self.problem,
                start,
                lam,
                closeness=CLOSENESS[self.rough.basis.dtype],
                max_steps=max(steps, LEAST_STEPS),
            )
        return self._optima[lam]

    def _near_optimum(self, larger: list[Tensor], lam: float) -> Tensor:
        """W [r, K] of so many rows that a step takes long, in the dtype of the search."""
        R, K = self.rough.basis, self.rough.offset.shape[1]
        W = larger[-1] if larger else R.new_zeros(R.shape[1], K)
        closeness = CLOSENESS[R.dtype]
        for _ in range(MANY_ROUNDS):
            W = _logistic.minimise(self.rough, W, lam, closeness=closeness, max_steps=MANY_STEPS)
            left = _logistic.excess(self.rough, W, lam)
            if left <= MANY_EXCESS:
                return W
        logger.warning(
            "takl: lam %g: %d steps end %.1f %% above the optimum of %d images and classes, "
            "wanted %.1f %%",
            lam, MANY_ROUNDS * MANY_STEPS, 100 * left, len(R), 100 * MANY_EXCESS,
        )  # fmt: skip
        return W


class _Fits(dict[float, _Fit]):
    """By beta. Copies of a head have the same support and share them; files do not hold them."""

    def __deepcopy__(self, memo: object) -> _Fits:
        return self

    def __reduce__(self) -> tuple[type[_Fits], tuple[()]]:
        return _Fits, ()


def basis(rows: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """B and R = k(S, S) B [M, r] with B^T k(S, S) B = 1, for S = rows [M, C] float64 of length 1.

    Of the linear kernel k(S, S) A = R W is S (S^T A), and S^T B [C, r] is given in place of B; r
    is its rank. Of the other one r is RANK or less; above EXACT_ROWS the space of its eigenvectors
    is found by `leading`, and B^T k(S, S) B = 1 still holds to rounding.
    """
    if not beta:
        if len(rows) > rows.shape[1]:
            values, vectors = torch.linalg.eigh(rows.mT @ rows)
            B = vectors[:, values > _negligible(values)]
        else:
            values, vectors = torch.linalg.eigh(rows @ rows.mT)
            kept = values > _negligible(values)
            B = rows.mT @ (vectors[:, kept] / values[kept].sqrt())
        return B, rows @ B
    gram = kernel(rows, rows, beta)
    if len(rows) <= EXACT_ROWS:
        values, vectors = torch.linalg.eigh(gram)
        images = vectors * values
    else:
        span = leading(gram)
        images = gram @ span
        values, inner = torch.linalg.eigh(span.mT @ images)
        vectors, images = span @ inner[:, -RANK:], images @ inner[:, -RANK:]
    values, vectors, images = values[-RANK:], vectors[:, -RANK:], images[:, -RANK:]
    kept = values > _negligible(values)
    root = values[kept].sqrt()
    return vectors[:, kept] / root, images[:, kept] / root


def leading(gram: Tensor) -> Tensor:
    """Columns [M, RANK + RANK / 8], float64, that span nearly the RANK largest eigenvectors.

    By subspace iteration (Halko, Martinsson and Tropp 2011, algorithm 4.4) in float32 from a fixed
    start; orthonormal to float32's rounding.
    """
    narrow = gram.float()
    start = torch.randn(len(gram), RANK + RANK // 8, generator=torch.Generator().manual_seed(0))
    span = start.to(narrow)
    for _ in range(ITERATIONS):
        span = torch.linalg.qr(narrow @ span).Q
    return span.double()


def _negligible(values: Tensor) -> float:
    """Eigenvalues up to which there is only rounding."""
    return 1e-12 * float(values[-1])
