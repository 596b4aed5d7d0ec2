# SPDX-License-Identifier: Apache-2.0
"""What heads that keep labelled images share: their rows, their checks, their search."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtclip import ops
from vtclip.heads._check import check_least, check_positive
from vtclip.heads._contributions import Contributions, of_kernel, zero_shot_alone
from vtclip.heads._head import ImageHead, Support

# Support rows up to which hyper-parameters are searched over all classes. Beyond it every j-th
# class is searched over, so that the time and memory of a search stop growing with the support.
SEARCH_ROWS = 2048
PRIOR_FACTOR = 2.0  # a hyper-parameter off its centre by this factor costs half a nat
NO_FACTORS: Mapping[str, float] = MappingProxyType({})


class Candidates(NamedTuple):
    """Points of a search: the values of each hyper-parameter, and the point the prior is about.

    centre: without those that have no prior. logits_of: logits [n + m, K] at one point; label
    [n + m]. The first n rows are validation images, the m others images of the support that say
    something themselves. factors: of hyper-parameters whose prior is not as wide as PRIOR_FACTOR.
    """

    grid: Mapping[str, Sequence[float]]
    centre: Mapping[str, float]
    logits_of: Callable[[Mapping[str, float]], Tensor]
    label: Tensor
    factors: Mapping[str, float] = NO_FACTORS


class SupportHead(ImageHead):
    """text [K, C], and the support: `keys` [N, C] of length 1 with their classes `label` [N].

    num_support: N. The rows are zeros until `fit_support` or a loaded state brings them. Without
        any (N = 0) the logits are zero-shot's.

    votes_per_class: as how many images each class counts, see `class_weights`; None lets every
        image count once. A fit of up to N images per class sets it to the mean number of them.

    A class needs no support, and classes may have different numbers of images. The order of the
    support does not matter; an image that is there twice counts twice next to others of its class,
    and without `votes_per_class` next to those of other classes, too.
    """

    searched: ClassVar[tuple[str, ...]] = ()  # the hyper-parameters that `choose` sets
    keys: Tensor
    label: Tensor

    def __init__(
        self,
        text: Tensor,
        *,
        num_support: int = 0,
        votes_per_class: float | None = None,
        logit_scale: float = 100.0,
    ) -> None:
        super().__init__(text, logit_scale=logit_scale)
        name = type(self).__name__
        check_least(name, 0, num_support=num_support)
        check_positive(name, logit_scale=logit_scale)
        if votes_per_class is not None:
            check_positive(name, votes_per_class=votes_per_class)
        self.votes_per_class = votes_per_class
        keys = text.new_zeros(num_support, text.shape[1])
        if self.trains_keys:
            self.keys = nn.Parameter(keys)
        else:
            self.register_buffer("keys", keys)
        label = torch.zeros(num_support, dtype=torch.long, device=text.device)
        self.register_buffer("label", label)

    @property
    def num_support(self) -> int:
        """N, the number of labelled images that it keeps."""
        return len(self.keys)

    @torch.no_grad()
    def fit_support(self, support: Support) -> None:
        """Keep the labelled images, in place of any earlier ones."""
        keys, self.label = check_support(type(self).__name__, support, self.text)
        self.keys = nn.Parameter(keys) if self.trains_keys else keys

    def keep_support(self, support: Support) -> None:
        """As `fit_support`, of a head that `choose` or `chosen_by` is asked for next.

        They solve anew at what they choose: a head that has to solve does not here, and has no
        logits until then.
        """
        self.fit_support(support)

    @torch.no_grad()
    def choose(self, val: Support) -> None:
        """Set `searched` by validation images, see `most_likely`; centred on present values.

        Above SEARCH_ROWS support rows every j-th class is searched over, with its images alone.
        """
        image, label = check_support(type(self).__name__, val, self.text)
        head, _, image, label = self._searched(image, label)
        self.take(most_likely(*head.candidates(image, label)))

    @torch.no_grad()
    def chosen_by(self, val: Support, parts: Sequence[Tensor]) -> Iterator[SupportHead]:
        """As `Head.chosen_by`, by one search: each point is computed once for all of `val`."""
        image, label = check_support(type(self).__name__, val, self.text)
        masks = torch.zeros(len(parts), len(label), dtype=torch.bool, device=label.device)
        for mask, rows in zip(masks, parts, strict=True):
            mask[rows] = True
        head, rows, image, label = self._searched(image, label)
        # few points are chosen, and a solve is long
        taken: dict[tuple[float, ...], SupportHead] = {}
        for best in most_likely_by(*head.candidates(image, label), parts=masks[:, rows]):
            point = tuple(best.values())
            if point not in taken:
                taken[point] = copy.deepcopy(self)
                taken[point].take(best)
            yield copy.deepcopy(taken[point])

    def take(self, best: Mapping[str, float]) -> None:
        """Set hyper-parameters, and what follows from them."""
        for name, value in best.items():
            setattr(self, name, value)

    def candidates(self, image: Tensor, label: Tensor) -> Candidates:
        """What is searched over for image [n, C] of length 1 with label [n]."""
        raise NotImplementedError

    def search(self, image: Tensor, label: Tensor) -> dict[str, float]:
        """The best hyper-parameters for image [n, C] of length 1 with label [n]."""
        return most_likely(*self.candidates(image, label))

    def extend(self, text_new: Tensor, support: Support) -> SupportHead:
        """As `Head.extend`: the head of the same hyper-parameters fitted to both supports."""
        text = extended_text(type(self).__name__, self.text, text_new, support)
        head = type(self)(text, **{**self.options(), "num_support": 0})
        image, label = check_support(type(self).__name__, support, text)
        with torch.no_grad():
            rows = torch.cat([self.keys, image]), torch.cat([self.label, label])
            head.fit_support(Support(*rows))
            if self.trains_keys:  # a trained key need not have length 1
                head.keys[: len(self.keys)] = self.keys
        return head.train(self.training)

    def _searched(self, image: Tensor, label: Tensor) -> tuple[SupportHead, Tensor, Tensor, Tensor]:
        """The head that is searched, and the rows of image and label that it is searched by."""
        step = -(-len(self.keys) // SEARCH_ROWS)
        rows = label % step == 0 if step > 1 else torch.ones_like(label, dtype=torch.bool)
        if step > 1:
            return self._every(step), rows, image[rows], label[rows] // step
        return self, rows, image, label

    def _every(self, step: int) -> SupportHead:
        """The head over classes 0, step, 2 step, ... alone, without what a solve made."""
        rows = self.label % step == 0
        thinned = type(self)(self.text[::step], **{**self.options(), "num_support": 0})
        thinned.label = self.label[rows] // step
        keys = self.keys[rows]
        thinned.keys = nn.Parameter(keys) if self.trains_keys else keys
        return thinned

    def zero_shot(self, image: Tensor) -> Tensor:
        """image [B, C] -> logits [B, K] of the class texts alone."""
        return ops.cosine_logits(image, self.text, scale=self.logit_scale)

    def contributions_of(
        self, image: Tensor, z: Tensor, near: Callable[[Tensor], Tensor], A: Tensor
    ) -> Contributions:
        """Of logits z [B, K] + near(image) @ A, see `of_kernel`; of z alone without support."""
        if not self.num_support:
            return zero_shot_alone(image, z, self.text)
        return of_kernel(image, z, near, A, self.keys, self.label, self.text)

    def one_hot(self) -> Tensor:
        """Y [N, K] of the support."""
        return F.one_hot(self.label, self.num_classes).to(self.text)

    def class_weights(self) -> Tensor:
        """m / n_k of each class [K], by which its images count, m = votes_per_class; 1 where None.

        Exactly 1 where a class has m images, too.
        """
        wide = torch.promote_types(self.text.dtype, torch.float32)
        if self.votes_per_class is None:
            return torch.ones_like(self.text[:, 0], dtype=wide)
        count = F.one_hot(self.label, self.num_classes).sum(dim=0)
        return self.votes_per_class / count.clamp(min=1).to(wide)


def check_support(head: str, support: Support, text: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of length 1 in the dtype and on the device of text [K, C], and their labels."""
    K, C = text.shape
    image, label = support.image, support.label
    if image.ndim != 2 or image.shape[1] != C or label.shape != image.shape[:1]:
        shapes = f"{list(image.shape)} and {list(label.shape)}"
        raise ValueError(f"{head}: support must be image [N, {C}] and label [N], got {shapes}")
    if label.is_floating_point() or label.dtype == torch.bool:
        raise TypeError(f"{head}: support labels must be integers, got {label.dtype}")
    if len(label) and not 0 <= int(label.min()) <= int(label.max()) < K:
        fact = f"{int(label.min())}..{int(label.max())}"
        raise ValueError(f"{head}: support labels must lie in 0..{K - 1}, got {fact}")
    if not bool(image.isfinite().all()):
        row = int((~image.isfinite()).any(dim=1).nonzero()[0])
        raise ValueError(f"{head}: support must be finite, got NaN or infinity in row {row}")
    return F.normalize(image.to(text), dim=-1), label.to(text.device, torch.long)


def extended_text(head: str, text: Tensor, text_new: Tensor, support: Support) -> Tensor:
    """[K + K', C], where every label of `support` is one of the K' new classes."""
    K, C = text.shape
    if text_new.ndim != 2 or text_new.shape[1] != C:
        raise ValueError(f"{head}: text_new must be [K', {C}], got {list(text_new.shape)}")
    if len(support.label) and int(support.label.min()) < K:
        fact = int(support.label.min())
        raise ValueError(f"{head}: support labels of new classes must be {K} or more, got {fact}")
    return torch.cat([text, text_new.to(text)])


def kernel(x: Tensor, s: Tensor, beta: float) -> Tensor:
    """exp(-beta |x - s|^2) [B, N] of rows of length 1, in the memory of one product."""
    return (x @ s.mT).neg_().add_(1).mul_(-2 * beta).exp_()


def steps(low: float, high: float, factor: float) -> tuple[float, ...]:
    """low, low * factor, ... up to high."""
    count = round(math.log(high / low) / math.log(factor)) + 1
    return tuple(low * factor**i for i in range(count))


def most_likely(
    grid: Mapping[str, Sequence[float]],
    centre: Mapping[str, float],
    logits_of: Callable[[Mapping[str, float]], Tensor],
    label: Tensor,
    factors: Mapping[str, float] = NO_FACTORS,
) -> dict[str, float]:
    """The point of the grid under which labels [n] are most probable, given a prior about `centre`.

    cost = min_T sum_i -log softmax(logits_i / T)[label_i] + log(T)^2 / 2
           + sum_p log(p / centre_p)^2 / (2 log(PRIOR_FACTOR)^2)

    where `factors` may replace PRIOR_FACTOR and p runs over what `centre` has.

    logits_of returns [n, K] for one point. T, see `scaled_nll`, judges a point by which
    classes it separates and not by the size of its logits; its prior is that of
    `metrics.fit_temperature`. With a few images many points are as good as tied, and the prior then
    keeps close to a centre that suits most tables; each further image counts for more against it.
    Every image counts once, validation images as the classes have them: a search over a source of
    unequal classes is, as its accuracy, mostly about the large ones. `votes_per_class` weighs the
    votes of the support alone.

    Chosen by `benchmarks/choose_search.py` on images that neither train nor validate nor test: for
    every head the mean accuracy over two tables and 1, 4 and 16 shots is 0.2 to 0.6 points above
    that of likelihood without the prior, and 0.2 to 0.7 above that of validation accuracy.
    """
    best: dict[str, float] = {}
    least = math.inf
    for point, far in _points(grid, centre, factors):
        cost = scaled_nll(logits_of(point), label) + far
        if cost < least:
            best, least = point, cost
    return best


def most_likely_by(
    grid: Mapping[str, Sequence[float]],
    centre: Mapping[str, float],
    logits_of: Callable[[Mapping[str, float]], Tensor],
    label: Tensor,
    factors: Mapping[str, float] = NO_FACTORS,
    *,
    parts: Tensor,
) -> list[dict[str, float]]:
    """`most_likely` for each of P parts of the first n rows, with all rows after them.

    parts: bool [P, n]. The sums run in another order than there, so that a point that ties with
    another to the last bits may win here and lose there.
    """
    others = parts.new_ones(len(parts), len(label) - parts.shape[1])
    counted = torch.cat([parts, others], dim=1).double()
    points, costs = [], []
    for point, far in _points(grid, centre, factors):
        nll, prior = _nll_at_temperatures(logits_of(point), label)
        points.append(point)
        costs.append((counted @ nll.double() + prior).amin(dim=1) + far)
    return [points[i] for i in torch.stack(costs).nan_to_num(nan=math.inf).argmin(dim=0).tolist()]


def _points(
    grid: Mapping[str, Sequence[float]],
    centre: Mapping[str, float],
    factors: Mapping[str, float],
) -> Iterator[tuple[dict[str, float], float]]:
    """Each point, and what its distance from the centre costs."""
    for values in itertools.product(*grid.values()):
        point = dict(zip(grid, values, strict=True))
        far = 0.0
        for name, middle in centre.items():
            width = math.log(factors.get(name, PRIOR_FACTOR))
            far += (math.log(point[name] / middle) / width) ** 2 / 2
        yield point, far


def scaled_nll(logits: Tensor, label: Tensor) -> float:
    """Least sum of NLL(logits [n, K] / T) + log(T)^2 / 2 over T = 2^(-3/2), 2^-1, ... 2^(3/2).

    Infinity for logits that are not numbers, which a search then passes over.
    """
    below, true = _below_largest(logits, label)
    total = true.sum()
    costs = [sums.log().sum() - total / T + math.log(T) ** 2 / 2 for T, sums in _sums_of_exp(below)]
    return float(torch.stack(costs).nan_to_num(nan=math.inf).min())


def _nll_at_temperatures(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """NLL [n, t] of each row at the t temperatures of `scaled_nll`, and log(T)^2 / 2 [t]."""
    below, true = _below_largest(logits, label)
    nll, prior = [], []
    for T, sums in _sums_of_exp(below):
        nll.append(sums.log() - true / T)
        prior.append(math.log(T) ** 2 / 2)
    return torch.stack(nll, dim=1), logits.new_tensor(prior, dtype=torch.float64)


def _below_largest(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """logits [n, K] minus the largest of their row, and that of the row's class [n]."""
    below = logits - logits.amax(dim=1, keepdim=True)
    return below, below.gather(1, label[:, None])[:, 0]


def _sums_of_exp(below: Tensor) -> Iterator[tuple[float, Tensor]]:
    """T and sum_k exp(below [n, K] / T) [n], for T = 2^(3/2), 2^(1/2), ... and 2, 1, 1/2."""
    for first in (3, 2):
        share = (below / 2 ** (first / 2)).exp()
        for step in range(first, -4, -2):
            yield 2 ** (step / 2), share.sum(dim=1)
            share.square_()  # exp(x / T)^2 = exp(x / (T / 2))
