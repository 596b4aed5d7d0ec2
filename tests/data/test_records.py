# SPDX-License-Identifier: Apache-2.0
"""Records: rows, selections, labels, class names and what is refused."""

from __future__ import annotations

import pytest
import torch

from vtclip.data import Records
from vtclip.data.joined import JoinedStore
from vtclip.data.records import MemoryStore, check_class_names, digest_of

NAMES = ["cat", "dog", "eel"]


def table(n: int = 6, passes: int = 0, **more: object) -> Records:
    image = torch.arange(1.0, 1 + n * (1 + passes) * 4).reshape(n, 1 + passes, 4)
    text = torch.eye(4)[:3] * 7
    return Records.from_tensors(image, torch.arange(n) % 3, text, NAMES, **more)  # type: ignore[arg-type]


def test_batch_gives_rows_in_the_order_asked() -> None:
    records = table()
    batch = records.batch(torch.tensor([4, 0]))
    assert batch.label.tolist() == [1, 0]
    assert batch.image.tolist() == [[17, 18, 19, 20], [1, 2, 3, 4]]
    assert batch.image.dtype == torch.float32
    assert batch.spatial is None
    assert batch.spatial_mask is None
    assert records.batch(torch.tensor([], dtype=torch.long)).image.shape == (0, 4)


def test_text_rows_have_norm_one() -> None:
    assert torch.equal(table().text, torch.eye(4)[:3])


def test_augment_passes_are_other_rows() -> None:
    records = table(passes=2)
    assert records.num_passes == 2
    plain, second = (records.batch(torch.tensor([1]), p).image for p in (0, 2))
    assert torch.equal(second, plain + 8)
    with pytest.raises(ValueError, match=r"augment_pass must lie in 0\.\.2, got 3"):
        records.batch(torch.tensor([0]), 3)


def test_select_keeps_classes_and_names() -> None:
    records = table(spatial=torch.rand(6, 2, 5)).select(torch.tensor([5, 2]))
    assert (len(records), records.names, records.class_names) == (2, ["5", "2"], NAMES)
    assert records.label.tolist() == [2, 2]
    assert records.has_spatial
    again = records.select(torch.tensor([1]))
    assert again.names == ["2"]
    assert torch.equal(again.batch(torch.tensor([0])).image, table().batch(torch.tensor([2])).image)


def test_subset_classes_relabels() -> None:
    records = table().subset_classes([2, 0])
    assert records.class_names == ["eel", "cat"]
    assert records.names == ["0", "2", "3", "5"]
    assert records.label.tolist() == [1, 0, 1, 0]
    assert torch.equal(records.text, table().text[[2, 0]])
    assert records.info["digests"]["text"] != table().info["digests"]["text"]
    with pytest.raises(ValueError, match="different indices below 3"):
        table().subset_classes([0, 0])


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (torch.tensor([6]), r"0\.\.5, got 6\.\.6"),
        (torch.tensor([-1, 2]), r"0\.\.5, got -1\.\.2"),
        (torch.tensor([0.5]), "row of integers"),
        (torch.tensor([[1]]), "row of integers"),
        (torch.ones(6, dtype=torch.bool), "row of integers"),
    ],
)
def test_bad_index_is_refused(index: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table().batch(index)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ([1, 2, 3], r"0\.\.2 for 3 classes, got 1\.\.3, first class without images: 0"),
        ([0, 1, -1], r"got -1\.\.1, first class without images: 2"),
        ([0, 1, 9], r"got 0\.\.9, first class without images: 2"),
    ],
)
def test_labels_out_of_range_name_range_and_gap(label: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Records.from_tensors(torch.ones(3, 4), torch.tensor(label), torch.eye(4)[:3], NAMES)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["Cat", "cat"], "'Cat' and 'cat' are the same name"),
        (["a b", "a_b "], "'a b' and 'a_b ' are the same"),
        (["caf\u00e9", "cafe\u0301"], "are the same name"),
        (["cat", "  "], "name 1 is empty"),
        (["x\udcff"], "not valid UTF-8"),
        ([], "at least one class"),
    ],
)
def test_class_names_must_differ_in_more_than_spelling(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_class_names(names)


def test_class_names_may_hold_any_script_and_braces() -> None:
    names = ["{}", "100 %", "\u732b", "\u05d7\u05ea\u05d5\u05dc", "a\nb", "\U0001f408"]
    assert check_class_names(names) == names


def test_nan_zero_rows_widths_and_names_are_refused() -> None:
    label, text = torch.zeros(3, dtype=torch.long), torch.eye(4)[:3]
    bad = torch.ones(3, 4)
    bad[1, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity in 1 rows: 1"):
        Records.from_tensors(bad, label, text, NAMES)
    bad[1] = 0
    with pytest.raises(ValueError, match="no zero rows, got 1: 1"):
        Records.from_tensors(bad, label, text, NAMES)
    with pytest.raises(ValueError, match="share their width, got 4 and 5"):
        Records.from_tensors(torch.ones(3, 5), label, text, NAMES)
    with pytest.raises(ValueError, match="'a' more than once"):
        Records.from_tensors(torch.ones(3, 4), label, text, NAMES, names=["b", "a", "a"])
    with pytest.raises(ValueError, match="K = 3"):
        Records.from_tensors(torch.ones(3, 4), label, torch.eye(4), NAMES)
    with pytest.raises(ValueError, match="spatial must be"):
        MemoryStore(torch.ones(3, 4), torch.ones(2, 5, 4))


def test_projection_is_applied_per_batch_in_float32() -> None:
    spatial = torch.randn(3, 5, 2).half()
    projection = torch.randn(2, 4)
    store = MemoryStore(torch.ones(3, 4), spatial, projection)
    assert (store.spatial_width, store.spatial_tokens) == (4, 5)
    got = store.spatial(torch.tensor([2]), 0)
    torch.testing.assert_close(got, spatial[[2]].float() @ projection, rtol=1e-6, atol=1e-6)


def test_digest_depends_on_values_shape_and_dtype() -> None:
    values = torch.arange(6.0)
    others = [values + 1, values.reshape(2, 3), values.double()]
    assert digest_of(values) == digest_of(values.clone())
    assert len({digest_of(values), *map(digest_of, others)}) == 4


def test_digests_follow_their_rows() -> None:
    records = table(spatial=torch.rand(6, 2, 5))
    assert len(set(records.digests)) == 6
    chosen = records.select(torch.tensor([5, 2])).without_spatial()
    assert chosen.digests == [records.digests[5], records.digests[2]]
    assert records.subset_classes([2]).digests == chosen.digests[::-1]
    assert (records.pixels, records.perceptual) == (None, None)  # a table has no pictures


def test_digests_of_pictures_follow_their_rows() -> None:
    one, two = table(), table()
    one.store.pixels = [f"p{row}" for row in range(6)]  # type: ignore[attr-defined]
    joined = Records(
        JoinedStore([one.store, two.store], [6, 6]),
        class_names=NAMES,
        text=one.text,
        label=torch.cat([one.label, two.label]),
        names=[str(row) for row in range(12)],
    )
    assert joined.digests == one.digests * 2
    assert joined.pixels == [*(f"p{row}" for row in range(6)), *[None] * 6]
    assert joined.select(torch.tensor([7, 3])).pixels == [None, "p3"]
    assert joined.select(torch.tensor([7])).pixels is None
    assert joined.perceptual is None
