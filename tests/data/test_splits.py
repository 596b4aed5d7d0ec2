# SPDX-License-Identifier: Apache-2.0
"""Few-shot splits: sizes, disjointness, a test half that no seed moves, and errors that name."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vtclip.data import few_shot_split
from vtclip.data.splits import ALL, EXACT, UP_TO, check_counts, dealt


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


@pytest.mark.parametrize("own", ["val", "test"])
def test_a_role_of_the_source_stays_and_replaces_what_would_be_drawn(own: str) -> None:
    label, names = case([7, 7])
    roles = torch.tensor([1 if own == "val" else 2, 0, 0, 0, 0, 0, 0] * 2)
    split = few_shot_split(label, names, shots=3, seed=1, test_fraction=0.5, roles=roles)
    assert getattr(split, own).tolist() == [0, 7]
    drawn = [split.train, split.test if own == "val" else split.val]
    assert [[int((label[rows] == k).sum()) for k in (0, 1)] for rows in drawn] == [[3, 3], [3, 3]]
    assert not {0, 7} & set(torch.cat(drawn).tolist())


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


# pool of a class, shots -> training and validation images by the rule "up to"
DEALT = [
    *[(20, 16, (16, 4)), (100, 16, (16, 4)), (19, 16, (15, 4)), (18, 16, (14, 4))],
    *[(15, 16, (12, 3)), (12, 16, (10, 2)), (8, 16, (6, 2)), (5, 16, (4, 1)), (3, 16, (2, 1))],
    *[(2, 16, (1, 1)), (1, 16, (1, 0)), (0, 16, (0, 0)), (7, 4, (4, 3)), (6, 4, (4, 2))],
    *[(2, 1, (1, 1)), (1, 1, (1, 0)), (3, 2, (2, 1)), (4, 2, (2, 2)), (9, 0, (0, 0))],
    *[(15, ALL, (12, 3)), (50, ALL, (40, 10)), (100, ALL, (80, 20)), (500, ALL, (480, 20))],
    *[(2, ALL, (1, 1)), (1, ALL, (1, 0))],
]


@pytest.mark.parametrize(("n", "shots", "wanted"), DEALT)
def test_what_up_to_so_many_shots_deal_of_a_pool(n, shots, wanted):
    assert dealt(n, shots, UP_TO) == wanted
    train, val = wanted
    assert dealt(n, shots, UP_TO, own_val=True) == (n if shots == ALL else min(n, shots), 0)
    if shots != ALL and train == shots:  # nobody is short of images: both rules are one
        assert dealt(n, shots) == (train, val)


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.integers(1, 45), min_size=1, max_size=5),
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 0.25, 0.5]),
)
def test_more_shots_add_training_images_and_move_no_test_image(
    sizes: list[int], seed: int, fraction: float
) -> None:
    label, names = case(sizes)
    before: set[int] = set()
    test = few_shot_split(label, names, shots=0, seed=7, test_fraction=fraction).test.tolist()
    for shots in (1, 2, 3, 4, 5, 8, 16, 30, 60):
        split = few_shot_split(
            label, names, shots=shots, seed=seed, test_fraction=fraction, rule=UP_TO
        )
        train, val = set(split.train.tolist()), set(split.val.tolist())
        assert before <= train
        assert split.test.tolist() == test
        assert not train & val
        assert not (train | val) & set(test)
        for k, size in enumerate(sizes):
            pool = size - int(size * fraction)
            counts = [int((label[rows] == k).sum()) for rows in (split.train, split.val)]
            assert 1 <= counts[0] <= shots
            assert counts[1] == (0 if pool == 1 else max(1, counts[1])) <= 4
            assert sum(counts) == min(pool, shots + min(shots, 4))
        before = train
    every = few_shot_split(label, names, shots=ALL, seed=seed, test_fraction=fraction, rule=UP_TO)
    assert len(every.train) + len(every.val) + len(test) == sum(sizes)


def test_a_small_class_costs_the_others_nothing() -> None:
    label, names = case([60, 3, 60])
    short = few_shot_split(label, names, shots=16, seed=1, rule=UP_TO)
    counts = [(label[short.train] == k).sum().item() for k in range(3)]
    assert counts == [16, 1, 16]
    alone, same = (few_shot_split(*case(sizes), shots=16, seed=1, rule=UP_TO)
                   for sizes in ([60, 3, 60], [60, 30, 60]))  # fmt: skip
    first = [{names[i] for i in split.train.tolist() if i < 60} for split in (alone, same)]
    assert first[0] == first[1]


def test_a_class_without_a_training_image_is_named() -> None:
    label, names = case([20, 1])
    with pytest.raises(ValueError, match="shots 16: no training images .* in class 'dog'$"):
        few_shot_split(
            label[:20], names[:20], shots=16, seed=1, class_names=["cat", "dog"], rule=UP_TO
        )


@pytest.mark.parametrize("rule", [EXACT, UP_TO])
def test_images_with_roles_keep_them_and_the_rest_is_the_pool(rule: str) -> None:
    label, names = case([20, 20])
    roles = torch.zeros(40, dtype=torch.int8)
    roles[[0, 1, 20]] = 2
    split = few_shot_split(label, names, shots=8, seed=1, rule=rule, roles=roles)
    assert split.test.tolist() == [0, 1, 20]  # and nothing beside them by the fraction
    assert (len(split.train), len(split.val)) == (16, 8)
    roles[[2, 21]] = 1
    split = few_shot_split(label, names, shots=18, seed=1, rule=UP_TO, roles=roles)
    assert split.val.tolist() == [2, 21]  # and nothing beside them out of the pool
    assert (len(split.train), len(split.test)) == (35, 3)


def test_counts_alone_are_refused_as_the_split_is() -> None:
    classes = ["cat", "dog"]
    for sizes, shots, rule in [([20, 9], 8, EXACT), ([20, 0], 8, UP_TO), ([20, 0], ALL, UP_TO)]:
        label, names = case(sizes)
        options = {"shots": shots, "rule": rule, "class_names": classes}
        with pytest.raises(ValueError, match="dog") as split:
            few_shot_split(label, names, seed=1, **options)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="dog") as counts:
            check_counts(sizes, shots, 0.5, rule, classes)
        assert str(split.value) == str(counts.value)
    check_counts([20, 1], 8, 0.5, UP_TO, classes)
    for bad in ({"rule": "at least"}, {"shots": "some"}, {"shots": ALL, "rule": EXACT}):
        with pytest.raises((TypeError, ValueError), match="rule must be|shots must be an int"):
            few_shot_split(*case([9]), **{"shots": 1, "seed": 1, **bad})  # type: ignore[arg-type]
