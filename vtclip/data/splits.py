# SPDX-License-Identifier: Apache-2.0
"""Few-shot splits that depend on names and seed alone.

Per class the images are ordered by sha256(name); the first floor(n * test_fraction) are test,
whatever the seed, the shots or the order of rows. The others are ordered by sha256(seed, name):
the first `shots` train, the next min(shots, 4), or as many as are left, validate. No random
generator is involved, so a split is the same on every machine, and with the same seed the training
images of fewer shots are among those of more.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vtclip.names import MAX_SEED

MAX_VAL = 4


@dataclass(frozen=True)
class Split:
    """Disjoint rows in ascending order; `digest` names the split by image names and roles."""

    train: Tensor
    val: Tensor
    test: Tensor
    digest: str

    def counts(self) -> dict[str, int]:
        return {"train": len(self.train), "val": len(self.val), "test": len(self.test)}


def few_shot_split(
    label: Tensor,
    names: Sequence[str],
    *,
    shots: int,
    seed: int,
    test_fraction: float = 0.5,
    class_names: Sequence[str] | None = None,
) -> Split:
    """Train, validation and test rows per class; see the module's docstring for the rule.

    shots = 0 gives a test set only; test_fraction = 1.0 makes every image a test image.
    """
    check_int("few_shot_split", "shots", shots, 0, 2**31 - 1)
    check_int("few_shot_split", "seed", seed, 0, MAX_SEED)
    if not (
        isinstance(test_fraction, (int, float))
        and math.isfinite(test_fraction)
        and 0 <= test_fraction <= 1
    ):
        raise ValueError(f"few_shot_split: test_fraction must lie in 0..1, got {test_fraction}")
    if len(label) != len(names):
        raise ValueError(f"few_shot_split: names must hold {len(label)} entries, got {len(names)}")
    if len(set(names)) != len(names):
        raise ValueError("few_shot_split: names must differ from each other")
    num_val = min(shots, MAX_VAL)
    by_class: dict[int, list[int]] = {k: [] for k in range(len(class_names or ()))}
    for row, k in enumerate(label.tolist()):
        by_class.setdefault(int(k), []).append(row)
    roles: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    too_small: list[str] = []
    for k in sorted(by_class):
        rows = sorted(by_class[k], key=lambda row: _digest("test", names[row]))
        num_test = int(len(rows) * test_fraction)
        pool = sorted(rows[num_test:], key=lambda row: _digest(f"seed {seed}", names[row]))
        if len(pool) < shots:
            name = repr(class_names[k]) if class_names is not None else str(k)
            too_small.append(f"{name} has {len(pool)}")
        roles["test"] += rows[:num_test]
        roles["train"] += pool[:shots]
        roles["val"] += pool[shots : shots + num_val]
    if too_small:
        more = f" and {len(too_small) - 3} more classes" if len(too_small) > 3 else ""
        raise ValueError(
            f"few_shot_split: shots = {shots} needs {shots} images per class "
            f"besides the test share of {test_fraction:g}, but class "
            f"{', class '.join(too_small[:3])}{more}"
        )
    return _split(roles, label, names)


def split_by_roles(label: Tensor, names: Sequence[str], roles: Tensor) -> Split:
    """The split that a source prescribes: roles [N] hold 0 (train), 1 (validation) and 2 (test)."""
    rows = {role: (roles == number).nonzero().flatten().tolist()
            for number, role in enumerate(("train", "val", "test"))}  # fmt: skip
    return _split(rows, label, names)


def _split(roles: dict[str, list[int]], label: Tensor, names: Sequence[str]) -> Split:
    total = hashlib.sha256()
    for role, rows in roles.items():
        lines = sorted(f"{role}\0{int(label[row])}\0".encode() + _bytes(names[row]) for row in rows)
        for line in lines:
            total.update(len(line).to_bytes(8, "little") + line)
    tensors = {role: torch.tensor(sorted(rows), dtype=torch.long) for role, rows in roles.items()}
    return Split(**tensors, digest=total.hexdigest())


def check_int(caller: str, argument: str, value: int, low: int, high: int) -> None:
    """Raises unless `value` is an int, not a bool, in low..high."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{caller}: {argument} must be an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{caller}: {argument} must lie in {low}..{high}, got {value}")


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _digest(salt: str, name: str) -> bytes:
    return hashlib.sha256(salt.encode() + b"\0" + _bytes(name)).digest()
