# SPDX-License-Identifier: Apache-2.0
"""Few-shot draws of the protocol: against the rule written down again, and published picks."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vtclip.data.coop_sampling import coop_picks

# the positions of the picks in the official lists as others published them
# (cross_modal_adaptation, indices/caltech101/shot_1-seed_1.json, first and last ones)
CALTECH_TRAIN = [34, 290, 709, 719, 875, 1148, 1181, 1201, 1226, 1258, 1273, 1303, 1347, 1405]
CALTECH_TRAIN_END = [3769, 3823, 3864, 3939, 3997, 4023, 4038, 4055, 4094, 4105]
CALTECH_VAL_END = [1525, 1542, 1545, 1593, 1599, 1614, 1620, 1629, 1648]
# indices/oxford_flowers/shot_16-seed_2.json: passion flower, then the first of the next class
FLOWERS = "112 225 47 70 154 199 85 208 250 92 148 198 157 203 50 158 434 387"
# indices/eurosat/shot_16-seed_3.json: the first picks of classes 0 and 5
EUROSAT = {0: [2418, 655, 1515, 2103, 616, 91], 80: [1530, 301, 1978, 185, 199, 971]}


def rule(train: list[int], val: list[int], shots: int, seed: int) -> tuple[list[int], list[int]]:
    """The rule by the global generator, as the protocol has it."""
    random.seed(seed)
    out: list[list[int]] = []
    for label, count in ((train, shots), (val, min(shots, 4))):
        chosen: list[int] = []
        for k in dict.fromkeys(label):
            rows = [row for row, other in enumerate(label) if other == k]
            chosen += random.sample(rows, count) if len(rows) >= count else rows
        out.append(chosen)
    return out[0], out[1]


def test_a_small_list_by_hand() -> None:
    """Written down from an interpreter: random.seed(1), then sample by sample."""
    train, val = [2, 2, 2, 2, 0, 0, 0, 1, 1, 1], [0, 0, 2, 1, 1, 1]
    got = coop_picks(train, val, shots=2, seed=1)
    assert got.train == [1, 2, 4, 5, 7, 8]
    assert got.val == [1, 0, 2, 5, 4]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=60),
    st.lists(st.integers(0, 4), max_size=30),
    st.integers(1, 16),
    st.integers(0, 2**32 - 1),
)
def test_draws_equal_the_rule(train: list[int], val: list[int], shots: int, seed: int) -> None:
    if min(train.count(k) for k in train) < shots:
        with pytest.raises(ValueError, match="the smallest has"):
            coop_picks(train, val, shots=shots, seed=seed)
        return
    assert tuple(coop_picks(train, val, shots=shots, seed=seed)) == rule(train, val, shots, seed)


def test_order_decides_and_the_global_generator_stays() -> None:
    train = [0] * 20 + [1] * 20
    random.seed(5)
    before = random.getstate()
    first = coop_picks(train, train, shots=4, seed=1)
    assert random.getstate() == before
    assert first == coop_picks(train, train, shots=4, seed=1)
    assert first != coop_picks(train, train, shots=4, seed=2)
    swapped = coop_picks(train[::-1], train, shots=4, seed=1)
    assert [train[::-1][row] for row in swapped.train] == [1] * 4 + [0] * 4
    assert swapped.train == first.train  # the positions, which are other images


def test_without_a_val_list_validation_is_drawn_from_what_is_left() -> None:
    train = [0] * 20 + [1] * 17 + [2] * 40
    got = coop_picks(train, None, shots=16, seed=3)
    assert got.train == rule(train, [], 16, 3)[0]
    assert not set(got.train) & set(got.val)
    assert [train[row] for row in got.val] == [0] * 4 + [1] + [2] * 4


def test_too_few_images_and_bad_numbers_are_named() -> None:
    with pytest.raises(ValueError, match="16 needs 16 training images per class, the smallest has"):
        coop_picks([0] * 16 + [1] * 3, [], shots=16, seed=1)
    message = "has 0: class 'dog', class 'eel'"
    with pytest.raises(ValueError, match=message):
        coop_picks([0], [], shots=1, seed=1, class_names=["cat", "dog", "eel"])
    with pytest.raises(ValueError, match=r"seed must lie in 0\.\.4294967295, got -1"):
        coop_picks([0], [], shots=1, seed=-1)
    with pytest.raises(TypeError, match="shots must be an int, got bool"):
        coop_picks([0], [], shots=True, seed=1)
    assert coop_picks([0], [0], shots=0, seed=1) == ([], [])


def lists(shared_data: Path, file: str) -> dict[str, list[list[object]]]:
    rows: dict[str, list[list[object]]] = json.loads(
        (shared_data / "splits" / f"split_zhou_{file}.json").read_bytes()
    )
    return rows


def labels(rows: list[list[object]]) -> list[int]:
    return [int(str(row[1])) for row in rows]


def test_published_picks_of_caltech101(shared_data: Path) -> None:
    rows = lists(shared_data, "Caltech101")
    got = coop_picks(labels(rows["train"]), labels(rows["val"]), shots=1, seed=1)
    assert len(got.train) == len(got.val) == 100
    assert got.train[: len(CALTECH_TRAIN)] == CALTECH_TRAIN
    assert got.train[-len(CALTECH_TRAIN_END) :] == CALTECH_TRAIN_END
    assert got.val[-len(CALTECH_VAL_END) :] == CALTECH_VAL_END


def test_published_picks_of_flowers_and_eurosat(shared_data: Path) -> None:
    rows = lists(shared_data, "OxfordFlowers")
    got = coop_picks(labels(rows["train"]), labels(rows["val"]), shots=16, seed=2)
    names = [str(rows["train"][row][0]) for row in got.train]
    assert names[:18] == [f"image_{int(number):05d}.jpg" for number in FLOWERS.split()]
    rows = lists(shared_data, "EuroSAT")
    got = coop_picks(labels(rows["train"]), labels(rows["val"]), shots=16, seed=3)
    names = [str(rows["train"][row][0]) for row in got.train]
    for start, numbers in EUROSAT.items():
        files = [name.rpartition("_")[2] for name in names[start : start + len(numbers)]]
        assert files == [f"{number}.jpg" for number in numbers]
