# SPDX-License-Identifier: Apache-2.0
"""The settings of one fit, checked when they are made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_SEED = 2**32 - 1  # the range that torch, NumPy and random all take


@dataclass(frozen=True)
class FitConfig:
    """How a head is built (`head`: its options) and trained; epochs = 0 means there is no training.

    Epoch 0 .. warmup_epochs - 1 run at the constant `warmup_lr`; from then on epoch e runs at
    lr * (1 + cos(pi * (e - warmup_epochs) / epochs)) / 2.
    """

    epochs: int
    optimizer: str = "sgd"  # or "adamw"
    lr: float = 2e-3
    weight_decay: float = 5e-4
    batch_size: int = 32
    warmup_epochs: int = 1
    warmup_lr: float = 1e-5
    checkpoint_every: int = 10  # epochs between checkpoints and looks at the validation rows
    head: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.optimizer not in ("sgd", "adamw"):
            raise ValueError(f"optimizer must be sgd or adamw, got {self.optimizer!r}")
        for name, least in (
            ("epochs", 0),
            ("batch_size", 1),
            ("warmup_epochs", 0),
            ("checkpoint_every", 1),
        ):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < least:
                raise ValueError(
                    f"{name} must be an integer >= {least}, got {getattr(self, name)!r}"
                )
        for name in ("lr", "warmup_lr"):
            if not 0 < getattr(self, name) <= 1e3:
                raise ValueError(
                    f"{name} must be above 0 and at most 1000, got {getattr(self, name)!r}"
                )
        if not 0 <= self.weight_decay <= 1e3:
            raise ValueError(f"weight_decay must be in 0..1000, got {self.weight_decay!r}")


def check_seed(seed: int) -> int:
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed must be in 0..{MAX_SEED}, got {seed}")
    return seed
