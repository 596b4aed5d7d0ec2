# SPDX-License-Identifier: Apache-2.0
"""Memory that runs out: smaller batches with the same results, then one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pictures
import pytest
import torch
from commands import call, json_of, refused

from vtclip.clip.model import Clip
from vtclip.data.extract import cached_features
from vtclip.data.options import FeatureOptions
from vtclip.machine import BatchSize, OutOfMemory, why_out_of_memory
from vtclip.runs.classifier import Classifier
from vtclip.train import engine

FULL = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory: "
        "you tried to allocate 8 bytes. Error code 12 (Cannot allocate memory)"
    ),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("std::bad_alloc\nraised from here"),
    RuntimeError('torch_call_dispatcher( "aten::new_empty", "", stack.data(), 1) API call failed'),
    MemoryError(),
]
FIT = ("--method", "proker", "--shots", "2", "--device", "cpu", "--threads", "1")


def limited(patch: pytest.MonkeyPatch, most: int, error: Exception = FULL[0]) -> list[int]:
    """Encoding more than `most` images raises `error`; the list is of batches that went through."""
    real, sizes = Clip.encode_image, []

    def encode_image(clip: Clip, pixels: torch.Tensor, spatial: str | None = None) -> Any:
        if len(pixels) > most:
            raise error
        sizes.append(len(pixels))
        return real(clip, pixels, spatial)

    patch.setattr(Clip, "encode_image", encode_image)
    return sizes


@pytest.mark.parametrize("error", FULL, ids=range(len(FULL)))
def test_a_batch_is_halved_until_it_fits(error, caplog):
    taken = []

    def function(part: torch.Tensor) -> torch.Tensor:
        if len(part) > 5:
            raise error
        taken.append(len(part))
        return part * 2

    size = BatchSize()
    batch = torch.arange(23)
    assert torch.equal(torch.cat(size.map(function, batch)), batch * 2)
    assert taken == [5, 5, 5, 5, 3]
    assert [record.message for record in caplog.records] == [
        "memory does not hold 23 images at a time; going on with 5"
    ]
    size.map(function, batch)  # said once, and remembered
    assert len(caplog.records) == 1


def test_other_errors_and_no_rows_pass_through():
    def broken(part: torch.Tensor) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        BatchSize(4).map(broken, torch.arange(8))
    assert why_out_of_memory(ValueError("out of memory")) == ""
    assert [len(part) for part in BatchSize(4).map(lambda part: part, torch.arange(9))] == [4, 4, 1]
    assert [len(part) for part in BatchSize(4).map(lambda part: part, torch.arange(0))] == [0]


def test_one_row_that_does_not_fit_is_the_end():
    def full(part: torch.Tensor) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nmore")

    with pytest.raises(OutOfMemory, match=r"not even one of the images fits .*CUDA out of memory"):
        BatchSize().map(full, torch.arange(8))


@pytest.mark.parametrize("augment_passes", [0, 2])
def test_features_are_the_same_in_smaller_batches(tmp_path, monkeypatch, augment_passes):
    source = pictures.dots(tmp_path / "dots")
    options = {"spatial": "default", "augment_passes": augment_passes, "progress": False}

    def rows(name: str) -> Any:
        made, _ = cached_features(source, FeatureOptions(cache_dir=tmp_path / name, **options))
        records = made.records()
        return records.batch(torch.arange(len(records)), augment_passes)

    whole = rows("whole")
    sizes = limited(monkeypatch, 7)
    parts = rows("parts")
    assert max(sizes) <= 7
    torch.testing.assert_close(parts.image, whole.image)
    torch.testing.assert_close(parts.spatial, whole.spatial, rtol=2e-3, atol=2e-3)  # float16
    assert torch.equal(parts.label, whole.label)


def test_predictions_are_the_same_in_smaller_batches(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = pictures.dots(tmp_path / "dots")
    assert call("fit", source, *FIT, "--out", "run") == 0
    classifier = Classifier.load("run", device="cpu")
    images = sorted(source.rglob("*.png"))
    whole = classifier.predict(images)
    sizes = limited(monkeypatch, 5)
    parts = classifier.predict(images)
    assert max(sizes) <= 5
    for before, after in zip(whole, parts, strict=True):
        assert [row.label for row in before] == [row.label for row in after]
        # rounding differs, as it does between batches of any two sizes
        expected = pytest.approx([row.probability for row in before], abs=1e-5)
        assert [row.probability for row in after] == expected


def test_evaluation_takes_fewer_rows_at_a_time(records, monkeypatch):
    index = torch.arange(len(records))
    head = torch.nn.Module()

    def compute(head: Any, batch: Any, device: torch.device) -> torch.Tensor:
        if len(batch.label) > 3:
            raise FULL[1]
        return batch.image[:, :4]

    monkeypatch.setattr(engine, "compute_logits", compute)
    logits, label = engine.all_logits(head, records, index, device=torch.device("cpu"))
    assert torch.equal(logits, records.batch(index, 0).image[:, :4])
    assert torch.equal(label, records.label)


class TestCommands:
    @pytest.fixture(autouse=True)
    def _place(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("VTCLIP_CACHE", str(tmp_path / "cache"))
        pictures.dots(tmp_path / "dots")

    def test_nothing_fits(self, capsys, monkeypatch):
        limited(monkeypatch, 0)
        assert call("features", "dots", "--out", "f", "--spatial", "none") == 1
        note, line = capsys.readouterr().err.splitlines()
        assert "--model demo" in note
        assert line.startswith("vtclip features: out of memory: not even one of the images fits")
        assert "--device" in line
        assert "--threads" in line
        assert "--encoder-batch-size" not in line

    def test_training_that_does_not_fit_names_its_options(self, capsys, monkeypatch):
        assert call("features", "dots", "--out", "f") == 0

        def full(*_args: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

        monkeypatch.setattr(engine, "train_head", full)
        words = ("fit", "f", "--method", "vtclip", "--shots", "2", "--out", "r")
        line = refused(capsys, *words, status=1)
        assert "out of memory: CUDA out of memory. Tried to allocate 2.00 GiB.; try" in line
        assert "a smaller --batch-size" in line

    @pytest.mark.parametrize("option", ["--batch-size", "--encoder-batch-size"])
    def test_the_size_can_be_given(self, capsys, monkeypatch, option):
        sizes = limited(monkeypatch, 1000)
        words = ("features", "dots", "--out", "f", "--spatial", "none", option, "4")
        assert call(*words, "--device", "cpu") == 0
        assert max(sizes) == 4
        assert call("fit", "dots", *FIT, "--out", "r", "--encoder-batch-size", "3") == 0
        assert sizes[-1] == 3
        sizes.clear()
        json_of(capsys, "predict", "r", "dots", option, "5")
        assert max(sizes) == 5
