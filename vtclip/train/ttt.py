# SPDX-License-Identifier: Apache-2.0
"""Test-time training: fit a head to one unlabelled image, predict it, forget (TPT, 2209.07511).

For every image by itself, with V views of which view 0 is the model's own crop:

    p_v  = softmax(head(view v)), with the run's parameters
    S    = the floor(keep * V) views of lowest entropy H(p_v), chosen once
    loss = H(mean over S of p_v), the entropy of the mean
    `steps` steps of AdamW on `loss`, then the prediction is head(view 0)

Parameters and optimiser state start afresh for every image, so its result depends on nothing but
the image, its name and the seed. The objective needs nothing of the head but parameters.

Batched: the parameters of N images are stacked, [N, ...], and adapted by one forward, backward
and step (`heads._each`). AdamW works element by element, so a step on the stack is the step of
every image. A head without such a form goes image by image; encoding, selection and prediction of
the plain view are batched for all.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from vtclip.heads import Head
from vtclip.heads._each import StackedRAda, bytes_per_image, can_stack
from vtclip.heads.config import check_seed
from vtclip.machine import Stopwatch
from vtclip.names import option

# views through the frozen encoder and the selection at a time
ENCODE_VIEWS = 256
# of the images that are adapted in one step
STEP_BYTES = 2**30
MAX_IMAGES = 32

Encode = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""Pixels [n, 3, H, W] -> image [n, C] and, for heads that want it, spatial [n, L, Cs]."""


@dataclass(frozen=True)
class TTT:
    """Settings of test-time training, checked on construction."""

    views: int = 64
    keep: float = 0.1
    steps: int = 1
    lr: float = 5e-3
    seed: int = 0
    weight_decay: float = 1e-2  # torch's default for AdamW

    def __post_init__(self) -> None:
        for name in ("views", "steps", "seed"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"ttt: {name} must be an int, got {type(value).__name__}")
            if name != "seed" and value < 1:
                raise ValueError(f"ttt: {name} must be at least 1, got {value}")
        for name in ("keep", "lr", "weight_decay"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"ttt: {name} must be a number, got {type(value).__name__}")
        check_seed(self.seed)
        if not 0 < self.keep <= 1:
            raise ValueError(f"ttt: keep must be above 0 and at most 1, got {self.keep}")
        if not 0 < self.lr <= 1e3:
            raise ValueError(f"ttt: lr must be above 0 and at most 1000, got {self.lr}")
        if not 0 <= self.weight_decay <= 1e3:
            raise ValueError(f"ttt: weight_decay must be in 0..1000, got {self.weight_decay}")
        if self.kept < 1:
            raise ValueError(
                f"ttt: {option('keep')} * {option('views')} must be at least 1 view, got "
                f"{self.keep} * {self.views}"
            )

    @property
    def kept(self) -> int:
        """How many views the loss sees."""
        return math.floor(self.keep * self.views + 1e-9)  # 0.29 * 100 is 28.999999999999996


@dataclass(frozen=True)
class Outcome:
    """Rows [N, K] per image, log-probabilities up to a constant, and seconds per stage.

    plain: logits of view 0 before. kept_mean, all_mean: log of the mean probability of the kept
    and of all views before, which costs no training. adapted: logits of view 0 after.
    """

    plain: Tensor
    kept_mean: Tensor
    all_mean: Tensor
    adapted: Tensor
    seconds: dict[str, float] = field(default_factory=dict)


def entropy(logits: Tensor) -> Tensor:
    """H(softmax(logits)) in nats: [..., K] -> [...]."""
    log_p = F.log_softmax(logits, dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1)


def mean_log_prob(logits: Tensor) -> Tensor:
    """log of the mean of the softmaxes over the views: [..., V, K] -> [..., K]."""
    return F.log_softmax(logits, dim=-1).logsumexp(dim=-2) - math.log(logits.shape[-2])


def confident(logits: Tensor, count: int) -> Tensor:
    """Indices [N, count] of the views of least entropy, logits [N, V, K]; equals by index."""
    return entropy(logits).sort(dim=-1, stable=True).indices[..., :count]


def trainable(head: Head) -> dict[str, Tensor]:
    """The parameters that are adapted, by name; a ValueError where there are none."""
    named: dict[str, Tensor] = {name: p for name, p in head.named_parameters() if p.requires_grad}
    if not named:
        raise ValueError(f"ttt: the head must have parameters to train, {head.method} has none")
    return named


@torch.enable_grad()
def adapt_one(
    head: Head,
    kept: Tensor,
    first: Tensor,
    kept_spatial: Tensor | None = None,
    first_spatial: Tensor | None = None,
    *,
    config: TTT,
) -> Tensor:
    """One image: kept views [m, C] with [m, L, Cs], view 0 [C] with [L, Cs] -> logits [K]."""
    copies = {name: p.detach().clone().requires_grad_() for name, p in trainable(head).items()}
    optimizer = torch.optim.AdamW(copies.values(), config.lr, weight_decay=config.weight_decay)
    for _ in range(config.steps):
        loss = entropy(mean_log_prob(functional_call(head, copies, (kept, kept_spatial))))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    plain = first[None], None if first_spatial is None else first_spatial[None]
    with torch.no_grad():
        logits: Tensor = functional_call(head, copies, plain)
    return logits[0]


@torch.enable_grad()
def adapt_stack(stacked: StackedRAda, kept: Tensor, first: Tensor, config: TTT) -> Tensor:
    """N images at once: kept views [N, m, C] and view 0 [N, C] -> logits [N, K]."""
    parameters = stacked.stacks.values()
    optimizer = torch.optim.AdamW(parameters, config.lr, weight_decay=config.weight_decay)
    for _ in range(config.steps):
        # images share no element, so the gradient of the sum is that of each image's own loss
        loss = entropy(mean_log_prob(stacked(kept))).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        stacked.decay(1 - config.lr * config.weight_decay)
    with torch.no_grad():
        return stacked(first[:, None])[:, 0]


@dataclass(frozen=True)
class KeptViews:
    """What is left of n images after selection; the other views are let go."""

    kept: Tensor  # [n, m, C]
    first: Tensor  # [n, C], view 0
    kept_spatial: Tensor | None  # [n, m, L, Cs]
    first_spatial: Tensor | None  # [n, L, Cs]


def adapt(
    head: Head, views: Iterable[Tensor], encode: Encode, config: TTT, *, batch: int | None = None
) -> Outcome:
    """Adapt `head` to each image by itself; `views` yields one [V, 3, H, W] per image.

    batch: images per step; None takes what fits STEP_BYTES, at most MAX_IMAGES. It changes results
        by rounding only. The head itself is not touched.
    """
    trainable(head)
    if batch is not None and batch < 1:
        raise ValueError(f"ttt: batch must be at least 1, got {batch}")
    batch = batch or images_per_step(head, config)
    head.eval()
    rows: dict[str, list[Tensor]] = {"plain": [], "kept_mean": [], "all_mean": [], "adapted": []}
    per_encode = max(1, min(batch, ENCODE_VIEWS // config.views))
    source, more = iter(views), True
    waiting: list[KeptViews] = []
    watch = Stopwatch()
    while more:
        with watch.stage("views"):
            pixels = list(itertools.islice(source, per_encode))
        more = len(pixels) == per_encode
        if pixels:
            with watch.stage("encode and select"), torch.no_grad():
                image, spatial = encode(torch.cat(pixels))
                logits = head(image, spatial).reshape(len(pixels), config.views, -1)  # [n, V, K]
                best = confident(logits, config.kept)  # [n, m]
                rows["plain"].append(logits[:, 0])
                rows["kept_mean"].append(mean_log_prob(take(logits, best)))
                rows["all_mean"].append(mean_log_prob(logits))
                waiting.append(keep_views(image, spatial, best, config.views))
                synchronize(logits)
        # the next images would not fit
        if waiting and (
            not more or sum(len(views.first) for views in waiting) + per_encode > batch
        ):
            with watch.stage("adapt"):
                rows["adapted"].append(adapt_waiting(head, waiting, config))
                synchronize(rows["adapted"][-1])
            waiting = []
    if not rows["plain"]:
        raise ValueError("ttt: there are no images")
    tables = {name: torch.cat(chunks).float().cpu() for name, chunks in rows.items()}
    return Outcome(**tables, seconds=watch.seconds)


def images_per_step(head: Head, config: TTT) -> int:
    """How many images fit one step; 1 for a head that goes image by image."""
    if not can_stack(head):
        return 1
    return max(1, min(MAX_IMAGES, STEP_BYTES // bytes_per_image(head, config.kept)))


def keep_views(image: Tensor, spatial: Tensor | None, best: Tensor, views: int) -> KeptViews:
    """image [n * V, C], spatial [n * V, L, Cs], best [n, m]."""
    image = image.reshape(-1, views, *image.shape[1:])
    if spatial is None:
        return KeptViews(take(image, best), image[:, 0].clone(), None, None)
    spatial = spatial.reshape(-1, views, *spatial.shape[1:])
    first = image[:, 0].clone(), spatial[:, 0].clone()
    return KeptViews(take(image, best), first[0], take(spatial, best), first[1])


def take(values: Tensor, best: Tensor) -> Tensor:
    """values [n, V, ...], best [n, m] -> [n, m, ...], a copy."""
    return values[torch.arange(len(best), device=best.device)[:, None], best]


def adapt_waiting(head: Head, waiting: Sequence[KeptViews], config: TTT) -> Tensor:
    """Logits [N, K] of view 0 after the steps, in one stack or image by image."""
    kept = torch.cat([views.kept for views in waiting])
    first = torch.cat([views.first for views in waiting])
    if can_stack(head):
        stacked = StackedRAda(head, len(kept), first_step_only=config.steps == 1)
        logits = adapt_stack(stacked, kept, first, config)
    else:
        rows = []
        for views in waiting:
            features = [views.kept, views.first, views.kept_spatial, views.first_spatial]
            for image in zip(*(x for x in features if x is not None), strict=True):
                rows.append(adapt_one(head, *image, config=config))
        logits = torch.stack(rows)
    broken = (~logits.isfinite()).any(dim=1)
    if bool(broken.any()):
        raise FloatingPointError(
            f"ttt: logits must be finite after the step, {int(broken.sum())} of {len(broken)} "
            f"images have others; lr {config.lr:g} may be too large"
        )
    return logits


def synchronize(values: Tensor) -> None:
    """Wait for the device, so that a stage is charged with its own work."""
    if values.is_cuda:
        torch.cuda.synchronize(values.device)
