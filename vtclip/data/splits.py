# SPDX-License-Identifier: Apache-2.0
"""Few-shot splits that depend on names and seed alone.

Per class the images are ordered by sha256(name); the first floor(n * test_fraction) are test,
whatever the seed, the shots or the order of rows. The others, the pool of the class, are ordered by
sha256(seed, name) and dealt by one of two rules:

    "exact"   the first `shots` train, the next min(shots, 4), or as many as are left, validate; a
              class whose pool has fewer than `shots` images is an error. Published numbers are of
              equal shots: benchmarks and data sets are drawn so.
    "up to"   up to `shots` train, and validation keeps its share of a smaller pool. Of n images,
                  v = min(shots, 4, max(1, round(n / 5))), or 0 where n = 1, are kept back;
                  min(shots, n - v) train;
                  min(shots, 4) of those left, or as many as there are, validate.
              With 16 shots 15 images are 12 + 3, 8 are 6 + 2, 2 are 1 + 1, and 1 is 1 + 0. With
              shots = "all" a fifth validates, at least 1 and at most 20 of a class, and the others
              train.

Where the source has validation images of its own none are carved out, and where it has test images
of its own the whole rest is the pool. No random generator is involved, so a split is the same on
every machine. With the same seed the training images of fewer shots are among those of more: all
are the first of one order.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vtclip.names import MAX_SEED, option

MAX_VAL = 4
MAX_VAL_OF_ALL = 20  # validation images of a class with shots = "all"
ALL = "all"
EXACT, UP_TO = RULES = ("exact", "up to")


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
    shots: int | str,
    seed: int,
    test_fraction: float = 0.5,
    class_names: Sequence[str] | None = None,
    rule: str = EXACT,
    roles: Tensor | None = None,
    validate: bool = True,
) -> Split:
    """Train, validation and test rows per class; see the module's docstring for the rules.

    shots = 0 gives a test set only; test_fraction = 1.0 makes every image a test image.
    shots = "all" is for the rule "up to", by which a class without an image to train on is an
    error where shots is not 0.
    roles [N]: what the source says of its images: 0 are the pool; where there are any, 1 validate
    and 2 test, all of them.
    validate: False where nothing is chosen by validation images: none are carved out.
    """
    _check_draw(shots, seed, test_fraction, rule)
    if len(label) != len(names):
        raise ValueError(f"few_shot_split: names must hold {len(label)} entries, got {len(names)}")
    if len(set(names)) != len(names):
        raise ValueError("few_shot_split: names must differ from each other")
    own = set() if roles is None else set(roles.tolist())
    fraction = 0.0 if 2 in own else test_fraction
    drawn: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    by_class: dict[int, list[int]] = {k: [] for k in range(len(class_names or ()))}
    given = [0] * len(names) if roles is None else roles.tolist()
    for row, (k, role) in enumerate(zip(label.tolist(), given, strict=True)):
        if role:
            drawn[("train", "val", "test")[role]].append(row)
        else:
            by_class.setdefault(int(k), []).append(row)
    too_small: list[tuple[int, int]] = []
    for k in sorted(by_class):
        rows = sorted(by_class[k], key=lambda row: _digest("test", names[row]))
        num_test = int(len(rows) * fraction)
        pool = sorted(rows[num_test:], key=lambda row: _digest(f"seed {seed}", names[row]))
        train, val = dealt(len(pool), shots, rule, own_val=not validate or 1 in own)
        if train < _least(shots, rule):
            too_small.append((k, len(pool)))
        drawn["test"] += rows[:num_test]
        drawn["train"] += pool[:train]
        drawn["val"] += pool[train : train + val]
    if too_small:
        raise ValueError(_too_small(too_small, shots, fraction, rule, class_names))
    return _split(drawn, label, names)


def dealt(n: int, shots: int | str, rule: str = EXACT, *, own_val: bool = False) -> tuple[int, int]:
    """How many of a pool of n images train and validate; see the module's docstring.

    own_val: none are taken from the pool to validate, as where the source has its own.
    """
    most = n if isinstance(shots, str) else shots
    if own_val:
        return min(most, n), 0
    if rule == EXACT:
        train = min(most, n)
        return train, min(most, MAX_VAL, n - train)
    num_val = MAX_VAL_OF_ALL if isinstance(shots, str) else min(most, MAX_VAL)
    kept_back = min(num_val, max(1, round(n / 5))) if n > 1 else 0
    train = min(most, n - kept_back)
    return train, min(num_val, n - train)


def check_counts(
    counts: Sequence[int],
    shots: int | str,
    test_fraction: float,
    rule: str,
    class_names: Sequence[str],
) -> None:
    """The error of `few_shot_split`, if any, from the number of images of each class alone.

    counts: of the images that neither validate nor test by the source's own word. test_fraction: 0
    where the source has test images of its own.
    """
    _check_draw(shots, 0, test_fraction, rule)
    least = _least(shots, rule)
    pools = [n - int(n * test_fraction) for n in counts]
    # a pool that has enough trains on enough, by either rule
    too_small = [(k, n) for k, n in enumerate(pools) if n < least]
    if too_small:
        raise ValueError(_too_small(too_small, shots, test_fraction, rule, class_names))


def _least(shots: int | str, rule: str) -> int:
    """The training images that every class must have."""
    return int(shots) if rule == EXACT else int(shots != 0)


def _check_draw(shots: int | str, seed: int, test_fraction: float, rule: str) -> None:
    if rule not in RULES:
        raise ValueError(f"few_shot_split: rule must be one of {', '.join(RULES)}, got {rule!r}")
    if not (shots == ALL and rule == UP_TO):
        check_int("few_shot_split", "shots", shots, 0, 2**31 - 1)
    check_int("few_shot_split", "seed", seed, 0, MAX_SEED)
    if not (
        isinstance(test_fraction, (int, float))
        and math.isfinite(test_fraction)
        and 0 <= test_fraction <= 1
    ):
        raise ValueError(f"few_shot_split: test_fraction must lie in 0..1, got {test_fraction}")


def _too_small(
    classes: Sequence[tuple[int, int]],
    shots: int | str,
    test_fraction: float,
    rule: str,
    class_names: Sequence[str] | None,
) -> str:
    """The error of classes whose pools, of so many images, have too few to train on."""
    shown = [repr(class_names[k]) if class_names is not None else str(k) for k, _ in classes[:3]]
    more = f" and {len(classes) - 3} more classes" if len(classes) > 3 else ""
    beside = f" besides the test share of {test_fraction:g}" if test_fraction else ""
    if rule == UP_TO:
        asked = f"{option('shots')} {shots}"
        return f"{asked}: no training images{beside} in class {', class '.join(shown)}{more}"
    counted = [f"{name} has {n}" for name, (_, n) in zip(shown, classes, strict=False)]
    return (
        f"few_shot_split: shots = {shots} needs {shots} images per class{beside}, but class "
        f"{', class '.join(counted)}{more}"
    )


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


def check_int(caller: str, argument: str, value: object, low: int, high: int) -> None:
    """Raises unless `value` is an int, not a bool, in low..high."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{caller}: {argument} must be an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{caller}: {argument} must lie in {low}..{high}, got {value}")


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _digest(salt: str, name: str) -> bytes:
    return hashlib.sha256(salt.encode() + b"\0" + _bytes(name)).digest()
