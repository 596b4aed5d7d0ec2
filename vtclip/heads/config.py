# SPDX-License-Identifier: Apache-2.0
"""The settings of one fit, checked on construction; a head's `recipe` returns them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from vtclip.names import LOSSES, MAX_SEED, OPTIMIZERS, option


@dataclass(frozen=True)
class FitConfig:
    """How a head is built (`head`: its options) and trained; epochs = 0 means there is no training.

    enough_pairs: training ends with the epoch after so many pairs of an image and a class, but not
        before `least_epochs`; 0 for all epochs.
    loss: "ce", cross-entropy, or "gce", (1 - p^q) / q of the true class's probability p with q =
        gce_q, which wrong labels pull less (arXiv 1805.07836, eq. 6).
    penalty_weight: what the head's penalty, averaged over the batch, counts next to cross-entropy.
    label_smoothing: share of each label that is spread evenly over all classes.
    warmup "constant": the first `warmup_epochs` run at `warmup_lr` and the others, epoch by epoch,
        at lr * (1 + cos(pi * (epoch - warmup_epochs) / epochs)) / 2.
    warmup "linear": step by step, lr rises linearly over `warmup_epochs` and then falls to 0 as
        half a cosine.
    """

    epochs: int
    enough_pairs: int = 0
    least_epochs: int = 1
    optimizer: str = "sgd"  # of names.OPTIMIZERS
    lr: float = 2e-3
    weight_decay: float = 5e-4
    eps: float = 1e-8  # AdamW's
    batch_size: int = 32
    warmup: str = "constant"  # or "linear"
    warmup_epochs: int = 1
    warmup_lr: float = 1e-5
    checkpoint_every: int = 10  # epochs between checkpoints and looks at the validation rows
    loss: str = "ce"  # of names.LOSSES
    gce_q: float = 0.5
    penalty_weight: float = 0.0
    label_smoothing: float = 0.0
    head: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            names = " or ".join(OPTIMIZERS)
            raise ValueError(f"optimizer must be {names}, got {self.optimizer!r}")
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be {' or '.join(LOSSES)}, got {self.loss!r}")
        if not 0 < self.gce_q <= 1:
            raise ValueError(f"gce_q must be above 0 and at most 1, got {self.gce_q!r}")
        if self.loss == "gce" and self.label_smoothing:
            raise ValueError(f"{option('label_smoothing')} must be 0 with {option('loss')} gce")
        if self.warmup not in ("constant", "linear"):
            raise ValueError(f"warmup must be constant or linear, got {self.warmup!r}")
        check_integers(self, 0, "epochs", "enough_pairs", "warmup_epochs")
        check_integers(self, 1, "least_epochs", "batch_size", "checkpoint_every")
        check_rates(self, "lr", "warmup_lr", "eps")
        check_weight(self, "weight_decay", 1e3)
        check_weight(self, "penalty_weight", 1e6)
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"label_smoothing must be at least 0 and below 1, got {self.label_smoothing!r}"
            )

    def num_epochs(self, steps: int, num_classes: int) -> int:
        """The epochs that are trained, of so many steps each."""
        if not self.enough_pairs:
            return self.epochs
        enough = math.ceil(self.enough_pairs / (steps * self.batch_size * num_classes))
        return min(self.epochs, max(self.least_epochs, enough))

    def is_due(self, epoch: int) -> bool:
        """Whether a checkpoint and a look at the validation rows follow this epoch."""
        return epoch + 1 == self.epochs or (epoch + 1) % self.checkpoint_every == 0

    def rate(self, number: int, steps: int) -> float:
        """The learning rate of step `number` of epochs * steps."""
        epoch, warm, total = number // steps, self.warmup_epochs * steps, self.epochs * steps
        if self.warmup == "linear":
            if number < warm:
                return self.lr * (number + 1) / warm
            return self.lr * (1 + math.cos(math.pi * (number - warm) / max(1, total - warm))) / 2
        if number < warm:
            return self.warmup_lr
        return self.lr * (1 + math.cos(math.pi * (epoch - self.warmup_epochs) / self.epochs)) / 2


def check_integers(config: object, least: int, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")


def check_rates(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not 0 < value <= 1e3:
            raise ValueError(f"{name} must be above 0 and at most 1000, got {value!r}")


def check_weight(config: object, name: str, highest: float) -> None:
    value = getattr(config, name)
    if not 0 <= value <= highest:
        raise ValueError(f"{name} must be in 0..{highest:g}, got {value!r}")


def check_seed(seed: int) -> int:
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed must be in 0..{MAX_SEED}, got {seed}")
    return seed
