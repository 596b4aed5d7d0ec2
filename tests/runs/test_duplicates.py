# SPDX-License-Identifier: Apache-2.0
"""Copies across roles: counted, named, kept out of the test, refused where that is asked for."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from pictures import dots

import vtclip
from vtclip.data.records import MemoryStore, Records
from vtclip.data.splits import few_shot_split
from vtclip.runs import duplicates
from vtclip.runs.duplicates import check_duplicates, copies_across
from vtclip.runs.seen import Seen


class Known(MemoryStore):
    """A store that also knows pixels and perceptual digests."""

    pixels: list[str | None]
    perceptual: list[str | None]


class Pictures(Records):
    """Records of `Known`."""

    pixels = property(lambda self: self.store.pixels)
    perceptual = property(lambda self: self.store.perceptual)


def records(copies: dict[int, int] | None = None) -> Pictures:
    """Twelve rows of two classes; `copies`: rows to the rows that they repeat."""
    image = torch.randn(12, 8, generator=torch.Generator().manual_seed(3))
    for row, of in (copies or {}).items():
        image[row] = image[of]
    store = Known(image)
    store.pixels = [f"pixels {row}" for row in range(12)]
    store.perceptual = [f"{0x1111111111111111 * row:016x}" for row in range(12)]
    return Pictures(
        store,
        class_names=["ant", "bee"],
        text=torch.eye(8)[:2],
        label=torch.arange(12) % 2,
        names=[f"{row:02d}.png" for row in range(12)],
    )


SPLIT = few_shot_split(
    torch.arange(12) % 2, [f"{row:02d}.png" for row in range(12)], shots=1, seed=1
)
TRAIN, VAL, TEST = (getattr(SPLIT, role).tolist() for role in ("train", "val", "test"))


def test_no_copy_is_no_word(caplog):
    split, left_out = check_duplicates(records(), SPLIT, strict=True)
    assert split is SPLIT
    assert left_out == {"trained": 0, "validated": 0}
    assert not caplog.records


def test_copies_of_rows_are_kept_out_of_the_test_and_said_once(caplog):
    table = records({TEST[0]: TRAIN[0], TEST[1]: TRAIN[0], TEST[2]: VAL[0]})
    split, left_out = check_duplicates(table, SPLIT, strict=False)
    assert split.test.tolist() == TEST[3:]
    assert (split.train, split.val, split.digest) == (SPLIT.train, SPLIT.val, SPLIT.digest)
    assert left_out == {"trained": 2, "validated": 1}
    (record,) = caplog.records
    said = record.getMessage()
    assert "2 test images have the same content as a training image" in said
    assert "1 test image has the same content as a validation image" in said
    first = min(TEST[:3])
    assert f"e.g. {first:02d}.png and " in said
    assert "3 test images are left out" in said
    with pytest.raises(ValueError, match=r"training image, .*; strict refuses such a source"):
        check_duplicates(table, SPLIT, strict=True)


def test_pixels_count_as_content_and_looks_are_only_said(caplog):
    table = records()
    table.store.pixels[TEST[0]] = table.store.pixels[TRAIN[0]]
    near = int(table.store.perceptual[TRAIN[1]], 16) ^ 0b101
    table.store.perceptual[TEST[1]] = f"{near:016x}"
    split, left_out = check_duplicates(table, SPLIT, strict=False)
    assert split.test.tolist() == TEST[1:]
    assert left_out == {"trained": 1, "validated": 0}
    said = caplog.records[0].getMessage()
    assert "1 test image has the same pixels as a training image" in said
    assert "1 test image has nearly the same picture as a training image" in said
    near ^= 0b1010
    table.store.perceptual[TEST[1]] = f"{near:016x}"
    assert {copy.kind for copy in copies_across(table, SPLIT)} == {"pixels"}


def test_a_validation_image_that_trains_is_said_and_stays(caplog):
    split, _ = check_duplicates(records({VAL[0]: TRAIN[0]}), SPLIT, strict=False)
    assert split.val.tolist() == VAL
    said = caplog.records[0].getMessage()
    assert "1 validation image has the same content as a training image" in said
    assert "left out" not in said


def test_a_method_that_learns_nothing_has_no_training_images():
    table = records({TEST[0]: TRAIN[0]})
    assert check_duplicates(table, SPLIT, strict=True, learns=False)[0] is SPLIT


def test_no_test_image_left_is_an_error():
    with pytest.raises(ValueError, match="no test image is left"):
        check_duplicates(records(dict.fromkeys(TEST, TRAIN[0])), SPLIT, strict=False)


def test_a_fit_leaves_copies_out_and_its_evaluation_agrees(tmp_path, caplog):
    source = dots(tmp_path / "photos")
    options = {"method": "tip-adapter", "shots": 2, "cache_dir": tmp_path / "cache"}
    first = vtclip.fit(source, out=tmp_path / "one", refit=False, **options)
    seen = Seen.read(first.folder, first.result["seen"])
    drawn = dict(zip(seen.names, seen.roles, strict=True))
    trained = next(name for name, role in drawn.items() if role == "train")
    tested = next(name for name, role in drawn.items() if role == "test")
    shutil.copy(source / trained, source / tested)
    caplog.clear()
    second = vtclip.fit(source, out=tmp_path / "two", **options)
    assert second.result["left_out"] == {"trained": 1, "validated": 0}
    assert second.result["test"]["images"] == first.result["test"]["images"] - 1
    assert second.result["images"]["test"] == second.result["adapted"]["count"]
    assert f"e.g. {tested} and {trained}; 1 test image is left out" in caplog.text
    again = vtclip.evaluate(second, cache_dir=tmp_path / "cache")
    assert again["accuracy"] == second.accuracy
    assert again["test"] == second.result["test"]
    assert vtclip.repeat(second, cache_dir=tmp_path / "cache")["verdict"] == "MATCH"
    assert Path(second.folder / "images.csv").is_file()


@pytest.mark.parametrize("block", [2**20, 7])
def test_pairs_of_few_bits_are_those_that_a_comparison_of_all_finds(block, monkeypatch):
    monkeypatch.setattr(duplicates, "BLOCK", block)
    draw = np.random.default_rng(3)
    theirs = draw.integers(0, 2**64, 200, dtype=np.uint64, endpoint=False)
    flips = [np.uint64(sum(1 << int(bit) for bit in draw.choice(64, n % 5, replace=False)))
             for n in range(300)]  # fmt: skip
    mine = np.array([theirs[draw.integers(200)] ^ flip for flip in flips], dtype=np.uint64)
    expected = []
    for n, value in enumerate(mine.tolist()):
        bits = [bin(value ^ other).count("1") for other in theirs.tolist()]
        near = [place for place, count in enumerate(bits) if count <= duplicates.NEAR_BITS]
        expected += [(n, near[0])] if near else []
    assert 150 < len(expected) < 300
    assert duplicates._close(mine, theirs) == expected
