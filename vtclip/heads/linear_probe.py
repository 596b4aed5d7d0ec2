# SPDX-License-Identifier: Apache-2.0
"""Linear probe: logistic regression on frozen image features; the class texts take no part.

    logits = W v + b                                                   v of length 1
    W, b   = argmin  sum_n CE(W v_n + b, y_n) + l2 / 2 * |W|^2

The baseline of Radford et al. 2021 (arXiv 2103.00020, section 3.2): full-batch L-BFGS, its strength
chosen on validation images.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtclip.heads._check import check_positive
from vtclip.heads._head import ImageHead, Support
from vtclip.heads._support import check_support, scaled_nll

# one column of the search; strongest first, each starts from the one before
STRENGTHS = tuple(10 ** (step / 2) for step in range(2, -11, -1))  # 10 .. 1e-5
MAX_STEPS = 500


class LinearProbe(ImageHead):
    """Weights [K, C] and biases [K], 0 until `fit_support`: all classes are then equally likely.

    l2: strength of the penalty, per sum over the images; `choose` sets it by validation images and
        without any it stays.
    logit_scale: not used, since nothing here is a cosine; kept so that all heads are built alike.

    The default l2 is by `benchmarks/choose_defaults.py`, on the photos below and through RN50: 88.3
    % on held-out images, with 0.1 87.6, and 1e-2 to 1e-5 within 0.2 of it.

    Expected: 80.7 / 95.5 / 98.6 % next to 81.6 % zero-shot with 1 / 4 / 16 shots, mean of seeds
        1-3, on 500 satellite photos of 19 classes through ViT-B/32. With one image a class it may
        fall below zero-shot, as it takes nothing from the class texts.
    Cost: 1 / 2 / 4 s on one CPU core.
    Command: vtclip fit SOURCE --method linear-probe --shots 16
    """

    method = "linear-probe"
    class_specific = True

    def __init__(self, text: Tensor, *, l2: float = 1e-3, logit_scale: float = 100.0) -> None:
        super().__init__(text, logit_scale=logit_scale)
        check_positive("LinearProbe", l2=l2)
        self.l2 = float(l2)
        self.weight = nn.Parameter(torch.zeros_like(self.text))
        self.bias = nn.Parameter(torch.zeros_like(self.text[:, 0]))
        self._support: Support | None = None

    def image_logits(self, image: Tensor) -> Tensor:
        return F.linear(F.normalize(image, dim=-1), self.weight, self.bias)

    def fit_support(self, support: Support) -> None:
        """Fit to labelled images [N, C]; ValueError where there are none or a label is not 0..K-1.

        They are kept, outside the state, until `choose` has fitted every strength to them.
        """
        shape = list(support.image.shape)
        if len(shape) != 2 or shape[1] != self.text.shape[1] or not len(support.label):
            wish = f"[N, {self.text.shape[1]}] with N >= 1"
            raise ValueError(f"LinearProbe: support must be image {wish}, got {shape}")
        check_support("LinearProbe", support, self.text)
        self._support = support
        self._take(*logistic_regression(support, self.num_classes, [self.l2])[0])

    def choose(self, val: Support) -> None:
        """Fit every strength to the images of `fit_support`, keep what validation finds likeliest.

        The images are let go.
        """
        if self._support is None:
            raise ValueError("LinearProbe: choose needs the images of fit_support, got none")
        solved = logistic_regression(self._support, self.num_classes, STRENGTHS)
        fits = dict(zip(STRENGTHS, solved, strict=True))
        image = F.normalize(val.image.double(), dim=-1)
        self.l2 = min(fits, key=lambda l2: scaled_nll(F.linear(image, *fits[l2]), val.label))
        self._support = None
        self._take(*fits[self.l2])

    def _take(self, weight: Tensor, bias: Tensor) -> None:
        with torch.no_grad():
            self.weight.copy_(weight)
            self.bias.copy_(bias)


def logistic_regression(
    support: Support, num_classes: int, strengths: Sequence[float]
) -> list[tuple[Tensor, Tensor]]:
    """(W [K, C], b [K]) in float64 for each l2 of `strengths`, strongest first.

    Solved for images less their mean, which the unpenalised bias takes up, and within their span,
    outside of which W is 0 at the optimum.
    """
    v = F.normalize(support.image.double(), dim=-1)
    mean = v.mean(dim=0)
    centred = v - mean
    basis = torch.linalg.qr(centred.T)[0] if len(v) < v.shape[1] else None  # [C, N]
    x = centred if basis is None else centred @ basis
    flat = x.new_zeros(num_classes, x.shape[1] + 1)  # the last column is the bias
    solved = []
    for l2 in strengths:
        flat = _solve(x, support.label, flat, l2)
        weight, bias = flat[:, :-1], flat[:, -1]
        weight = weight if basis is None else weight @ basis.T
        solved.append((weight, bias - weight @ mean))
    return solved


def _solve(x: Tensor, label: Tensor, start: Tensor, l2: float) -> Tensor:
    """The minimum over [W, b] of mean CE + l2 / (2 N) |W|^2 by L-BFGS."""
    flat = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [flat],
        max_iter=MAX_STEPS,
        tolerance_grad=1e-8,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = F.linear(x, flat[:, :-1], flat[:, -1])
        penalty = l2 / (2 * len(x)) * flat[:, :-1].square().sum()
        loss = F.cross_entropy(logits, label) + penalty
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return flat.detach()
