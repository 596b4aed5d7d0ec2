# SPDX-License-Identifier: Apache-2.0
"""Few-shot splits: sizes, disjointness, a test half that no seed moves, and errors that name."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtclip.data import few_shot_split


def case(sizes: list[int]) -> tuple[torch.Tensor, list[str]]:
    label = torch.tensor([k for k, size in enumerate(sizes) for _ in range(size)], dtype=torch.long)
    return label, [f"class{k}/{i}.jpg" for i, k in enumerate(label.tolist())]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(40, 60), min_size=1, max_size=4),
    st.integers(0, 16),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 0.25, 0.5]),
)
def test_sizes_and_disjointness(sizes: list[int], shots: int, seed: int, fraction: float) -> None:
    label, names = case(sizes)
    split = few_shot_split(label, names, shots=shots, seed=seed, test_fraction=fraction)
    for k, size in enumerate(sizes):
        count = [int((label[rows] == k).sum()) for rows in (split.train, split.val, split.test)]
        assert count == [shots, min(shots, 4), int(size * fraction)]
    rows = torch.cat([split.train, split.val, split.test]).tolist()
    assert len(set(rows)) == len(rows)
    assert all(
        part.tolist() == sorted(part.tolist()) for part in (split.train, split.val, split.test)
    )


def test_test_half_is_fixed_and_training_follows_the_seed() -> None:
    label, names = case([30, 31])
    splits = {
        (shots, seed): few_shot_split(label, names, shots=shots, seed=seed)
        for shots in (1, 4, 8)
        for seed in (1, 2, 3)
    }
    assert len({tuple(split.test.tolist()) for split in splits.values()}) == 1
    assert len({split.digest for split in splits.values()}) == 9
    assert len({tuple(splits[4, seed].train.tolist()) for seed in (1, 2, 3)}) == 3
    assert set(splits[4, 1].train.tolist()) < set(splits[8, 1].train.tolist())


def test_split_does_not_depend_on_the_order_of_rows() -> None:
    label, names = case([20, 20])
    order = torch.randperm(40)
    one = few_shot_split(label, names, shots=4, seed=1)
    two = few_shot_split(label[order], [names[i] for i in order.tolist()], shots=4, seed=1)
    assert one.digest == two.digest
    for name in ("train", "val", "test"):
        shuffled = {names[int(order[i])] for i in getattr(two, name).tolist()}
        assert shuffled == {names[i] for i in getattr(one, name).tolist()}


def test_a_new_image_moves_no_other_between_test_and_pool_by_its_label() -> None:
    label, names = case([20, 20])
    one = few_shot_split(label, names, shots=4, seed=1)
    label, more = torch.cat([label, torch.tensor([0])]), [*names, "new.jpg"]
    two = few_shot_split(label, more, shots=4, seed=1)
    assert one.digest != two.digest
    ones, twos = ({n[i] for i in s.test.tolist() if "class1" in n[i]} for s, n in
                  ((one, names), (two, more)))  # fmt: skip
    assert ones == twos


def test_known_digest_holds_on_every_machine() -> None:
    label, names = case([10, 10])
    split = few_shot_split(label, names, shots=2, seed=1)
    assert split.train.tolist() == KNOWN_TRAIN
    assert split.digest.startswith(KNOWN_DIGEST)


KNOWN_TRAIN = [4, 9, 11, 14]
KNOWN_DIGEST = "9924cdef2d480740"


def test_everything_test_and_nothing_test() -> None:
    label, names = case([3, 4])
    assert len(few_shot_split(label, names, shots=0, seed=1, test_fraction=1.0).test) == 7
    assert len(few_shot_split(label, names, shots=1, seed=1, test_fraction=0).test) == 0
    with pytest.raises(ValueError, match="test share of 1, but class 0 has 0"):
        few_shot_split(label, names, shots=1, seed=1, test_fraction=1.0)


def test_too_few_images_name_class_have_and_need() -> None:
    label, names = case([60, 7, 60])
    with pytest.raises(ValueError, match=r"shots = 16 needs 16 images .* class 'dog' has 4$"):
        few_shot_split(label, names, shots=16, seed=1, class_names=["cat", "dog", "eel"])


def test_class_without_any_image_is_named() -> None:
    label, names = case([20, 20])
    with pytest.raises(ValueError, match="class 'eel' has 0"):
        few_shot_split(label, names, shots=1, seed=1, class_names=["cat", "dog", "eel"])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"shots": -1}, ValueError, r"shots must lie in 0\.\."),
        ({"shots": 1.5}, TypeError, "shots must be an int, got float"),
        ({"shots": True}, TypeError, "shots must be an int, got bool"),
        ({"seed": -1}, ValueError, r"seed must lie in 0\.\.4294967295, got -1"),
        ({"seed": 2**32}, ValueError, r"seed must lie in"),
        ({"test_fraction": -0.1}, ValueError, r"test_fraction must lie in 0\.\.1"),
        ({"test_fraction": 1.1}, ValueError, r"test_fraction must lie in 0\.\.1"),
        ({"test_fraction": float("nan")}, ValueError, r"test_fraction must lie in 0\.\.1"),
    ],
)
def test_bad_numbers(change: dict[str, float], error: type[Exception], message: str) -> None:
    label, names = case([20])
    with pytest.raises(error, match=message):
        few_shot_split(label, names, **{"shots": 1, "seed": 1, **change})  # type: ignore[arg-type]


def test_names_must_fit_and_differ() -> None:
    label, names = case([20])
    with pytest.raises(ValueError, match="names must hold 20 entries, got 19"):
        few_shot_split(label, names[1:], shots=1, seed=1)
    with pytest.raises(ValueError, match="names must differ"):
        few_shot_split(label, [names[0], *names[:-1]], shots=1, seed=1)


def test_undecodable_file_names_are_split_too() -> None:
    label = torch.zeros(4, dtype=torch.long)
    split = few_shot_split(label, ["a\udcff", "b", "\U0001f408", "c\n"], shots=1, seed=1)
    assert len(split.test) == 2
