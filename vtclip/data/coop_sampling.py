# SPDX-License-Identifier: Apache-2.0
"""Few-shot draws of the field's protocol, equal draw for draw to the published picks.

One generator per seed (`random.Random(seed)`, as `random.seed(seed)` before the first draw). The
classes come in the order in which they first appear in the list; for each, `random.sample` takes
`shots` images of the train list, and then, with the same generator, min(shots, 4) of the val list.
A class with fewer val images gives all of them without a draw. Order matters: the same images in
another order give other picks.

A set without a val list (ImageNet) has its validation images drawn, after all training images, from
the train images that were left over. The training images are not affected by that.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import NamedTuple

from vtclip.data.splits import MAX_VAL, check_int
from vtclip.names import MAX_SEED


class Picks(NamedTuple):
    """Positions in the train list and in the val list, in the order in which they were drawn.

    Where there is no val list, `val` holds positions in the train list.
    """

    train: list[int]
    val: list[int]


def coop_picks(
    train: Sequence[int],
    val: Sequence[int] | None,
    *,
    shots: int,
    seed: int,
    class_names: Sequence[str] | None = None,
) -> Picks:
    """Positions drawn from a train list and a val list of labels; `val` None: no val list.

    Every class of the train list, and every one of `class_names`, needs `shots` images.
    """
    check_int("coop_picks", "shots", shots, 0, 2**31 - 1)
    check_int("coop_picks", "seed", seed, 0, MAX_SEED)
    if shots == 0:
        return Picks([], [])
    by_class = _by_class(train)
    if class_names is not None:
        for label in range(len(class_names)):
            by_class.setdefault(label, [])
    too_small = [
        f"{class_names[k]!a}" if class_names is not None else f"{k}"
        for k, rows in by_class.items()
        if len(rows) < shots
    ]
    if too_small:
        least = min(len(rows) for rows in by_class.values())
        more = f" and {len(too_small) - 3} more classes" if len(too_small) > 3 else ""
        raise ValueError(
            f"coop_picks: shots = {shots} needs {shots} training images per class, the smallest "
            f"has {least}: class {', class '.join(too_small[:3])}{more}"
        )
    draw = random.Random(seed)
    chosen = [row for rows in by_class.values() for row in draw.sample(rows, shots)]
    if val is None:
        taken = set(chosen)
        pools = {k: [row for row in rows if row not in taken] for k, rows in by_class.items()}
    else:
        pools = _by_class(val)
    num_val = min(shots, MAX_VAL)
    validation: list[int] = []
    for rows in pools.values():
        validation += draw.sample(rows, num_val) if len(rows) >= num_val else rows
    return Picks(chosen, validation)


def _by_class(label: Sequence[int]) -> dict[int, list[int]]:
    """Positions per class, classes in order of first appearance."""
    out: dict[int, list[int]] = {}
    for row, k in enumerate(label):
        out.setdefault(k, []).append(row)
    return out
