# SPDX-License-Identifier: Apache-2.0
"""What `fit` can reach: no label and no feature of a test image decides anything of an adapter.

Two proofs for every method and option. A store raises where a forbidden row is read outside of an
evaluation, and must be seen to raise. And the adapter has the same bytes where the test images have
other labels and noise for features, while its test numbers change.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pictures import dots
from torch import Tensor
from torch.nn import functional as F

import vtclip
from vtclip.data.records import MemoryStore, Records
from vtclip.data.sources import open_source
from vtclip.heads import HEADS
from vtclip.heads.config import FitConfig
from vtclip.runs import base_to_new
from vtclip.runs.result import Run
from vtclip.train import auto, engine
from vtclip.train.methods import fits_images
from vtclip.train.rows import split_rows

K, C, L, TRAIN, VAL, TEST = 4, 16, 5, 4, 2, 6
PASSES = 1
NEEDS_ENCODER = {"coop"}


class OutOfReach(AssertionError):
    """A row was read that must not be."""


class Guard:
    """A store whose forbidden rows can be read while `open` only; `seen` are the rows read."""

    def __init__(self, inner: Any, forbidden: Tensor) -> None:
        self.inner, self.forbidden, self.open = inner, forbidden, False
        self.seen: set[int] = set()
        for name in ("width", "num_passes", "spatial_width", "spatial_tokens"):
            setattr(self, name, getattr(inner, name))

    def _check(self, row: Tensor) -> None:
        if not self.open and bool(self.forbidden[row].any()):
            raise OutOfReach(f"row {row[self.forbidden[row]].tolist()[:3]}")
        self.seen.update(row.tolist())

    def image(self, row: Tensor, augment_pass: int) -> Tensor:
        self._check(row)
        found: Tensor = self.inner.image(row, augment_pass)
        return found

    def spatial(self, row: Tensor, augment_pass: int) -> Tensor:
        self._check(row)
        found: Tensor = self.inner.spatial(row, augment_pass)
        return found


@dataclass
class Table:
    """A source as arrays; roles 0 train, 1 validation, 2 test."""

    image: Tensor  # [N, 1 + P, C]
    spatial: Tensor  # [N, 1 + P, L, C]
    label: Tensor
    roles: Tensor
    text: Tensor

    def records(self, forbidden: Tensor | None = None) -> tuple[Records, Guard]:
        none = torch.zeros(len(self.label), dtype=torch.bool)
        guard = Guard(
            MemoryStore(self.image, self.spatial), none if forbidden is None else forbidden
        )
        records = Records(
            guard,
            class_names=["ant", "bee", "cat", "dog"],
            text=self.text,
            text_views=torch.stack([self.text, self.text.roll(1, dims=1)], dim=1),
            label=self.label,
            names=[f"{row}.png" for row in range(len(self.label))],
            roles=self.roles,
            logit_scale=20.0,
            info={"kind": "tensors", "digests": {"images": "none"}, "augment_passes": PASSES},
        )
        return records, guard


def table() -> Table:
    draw = torch.Generator().manual_seed(11)
    text = F.normalize(torch.randn(K, C, generator=draw), dim=-1)
    roles = torch.tensor([0] * TRAIN + [1] * VAL + [2] * TEST).repeat(K)
    label = torch.arange(K).repeat_interleave(TRAIN + VAL + TEST)
    order = torch.randperm(len(label), generator=draw)
    roles, label = roles[order], label[order]
    noise = torch.randn(len(label), 1 + PASSES, C, generator=draw) * 0.3
    image = text[label][:, None] + 0.8 * text[(label + 1) % K][:, None] + noise
    spatial = torch.randn(len(label), 1 + PASSES, L, C, generator=draw) * 0.2
    spatial[:, :, 0] += text[label][:, None]
    return Table(image, spatial, label, roles, text)


def spoiled(one: Table, rows: Tensor, labels: Tensor) -> Table:
    """Noise for the features of `rows`, and other labels at `labels`."""
    draw = torch.Generator().manual_seed(5)
    image, spatial, label = one.image.clone(), one.spatial.clone(), one.label.clone()
    image[rows] = torch.randn(int(rows.sum()), *image.shape[1:], generator=draw)
    spatial[rows] = torch.randn(int(rows.sum()), *spatial.shape[1:], generator=draw)
    label[labels] = (label[labels] + 1 + torch.arange(int(labels.sum())) % (K - 1)) % K
    assert not (label[labels] == one.label[labels]).any()
    return Table(image, spatial, label, one.roles, one.text)


@contextlib.contextmanager
def guarded(guard: Guard, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the forbidden rows be read while `engine.head_metrics` runs, which `fit` calls last."""
    evaluate = engine.head_metrics

    def opening(*args: Any, **options: Any) -> Any:
        guard.open = True
        try:
            return evaluate(*args, **options)
        finally:
            guard.open = False

    with monkeypatch.context() as patch:
        patch.setattr(engine, "head_metrics", opening)
        yield


def quick(method: str) -> dict[str, Any] | None:
    """Two epochs, where the method trains."""
    return {"epochs": 2, "batch_size": 6} if HEADS[method].recipe(TRAIN).epochs else None


@pytest.fixture(autouse=True)
def _quick_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Method auto trains its candidates for one epoch."""

    def quicker(recipe: Any) -> Any:
        def config(shots: int) -> FitConfig:
            usual: FitConfig = recipe(shots)
            return dataclasses.replace(usual, epochs=min(usual.epochs, 1))

        return staticmethod(config)

    for name in auto.CANDIDATES:
        monkeypatch.setattr(HEADS[name], "recipe", quicker(HEADS[name].recipe))


def files(run: Run) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in run.folder.iterdir()
        if path.name in ("adapter.safetensors", "adapter_config.json", "encoders.safetensors")
    }


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gce": {"overrides": {"epochs": 2, "loss": "gce"}},
    "smoothing": {"overrides": {"epochs": 2, "label_smoothing": 0.1}},
    "pseudo-labels": {"pseudo_labels": True},
    "no validation": {"val": False},
    "refit": {"refit": True},
}
TRAINED = [name for name in sorted(HEADS) if HEADS[name].recipe(TRAIN).epochs]
LEARNING = [name for name in sorted(HEADS) if HEADS[name].learns]
CASES = [
    *((method, "plain") for method in sorted(HEADS)),
    *((method, option) for method in TRAINED for option in ("gce", "smoothing")),
    *((method, "pseudo-labels") for method in LEARNING),
    *((method, "no validation") for method in LEARNING),
    *((method, "refit") for method in LEARNING if fits_images(method)),
]
CASES = [(method, option) for method, option in CASES if method not in NEEDS_ENCODER]


@pytest.mark.parametrize(("method", "option"), CASES)
def test_nothing_of_the_test_images_reaches_an_adapter(method, option, tmp_path, monkeypatch):
    arguments: dict[str, Any] = {"shots": TRAIN, "method": method, **OPTIONS[option]}
    arguments.setdefault("overrides", quick(method))
    pseudo = bool(arguments.get("pseudo_labels"))
    one = table()
    if not arguments.pop("val", True):
        one.roles[one.roles == 1] = 0
    test = one.roles == 2
    hidden = test | (one.roles == 0) if pseudo else test  # the labels that must not matter
    runs = []
    for name, source in ("plain", one), ("spoiled", spoiled(one, test, hidden)):
        records, guard = source.records(test)
        with guarded(guard, monkeypatch):
            runs.append(vtclip.fit("table.npz", records=records, out=tmp_path / name, **arguments))
        assert guard.seen >= set(test.nonzero().flatten().tolist())  # it was evaluated on
    assert files(runs[0]) == files(runs[1])
    assert {"adapter.safetensors", "adapter_config.json"} <= set(files(runs[0]))
    first, second = (run.result for run in runs)
    assert first["accuracy"] > second["accuracy"]
    assert first["adapted"]["temperature"] == second["adapted"]["temperature"]
    for row, other in zip(first.get("candidates", []), second.get("candidates", []), strict=True):
        assert {**row, "seconds": 0} == {**other, "seconds": 0}


ANY_CLASSES = [m for m in sorted(HEADS) if HEADS[m].any_classes and m != "coop"]


@pytest.mark.parametrize("method", ANY_CLASSES)
def test_base_to_new_reads_nothing_of_new_classes_before_its_end(method, tmp_path, monkeypatch):
    one = table()
    new = one.label >= (K + 1) // 2
    base_test = (one.roles == 2) & ~new
    options: dict[str, Any] = {"shots": TRAIN, "base_to_new": True, "overrides": quick(method)}
    runs = []
    for name, source in (
        ("plain", one),
        ("spoiled", spoiled(one, new | base_test, base_test & ~base_test)),
    ):
        records, guard = source.records(new | (one.roles == 2))
        with guarded(guard, monkeypatch):
            made = vtclip.fit(
                "t.npz", records=records, method=method, out=tmp_path / name, **options
            )
        runs.append(made)
    assert files(runs[0]) == files(runs[1])
    assert runs[0].result["new"]["adapted"]["nll"] != runs[1].result["new"]["adapted"]["nll"]
    assert base_to_new.HALVES == ("base", "new")


def test_the_guard_bites(tmp_path, monkeypatch):
    records, guard = table().records(table().roles == 0)
    with guarded(guard, monkeypatch), pytest.raises(OutOfReach):
        vtclip.fit(
            "table.npz", records=records, method="tip-adapter", shots=TRAIN, out=tmp_path / "a"
        )
    # and training images that change do change the adapter
    train = table().roles == 0
    runs = []
    for name, source in ("plain", table()), ("spoiled", spoiled(table(), train, train & ~train)):
        records, _ = source.records()
        options: dict[str, Any] = {"method": "tip-adapter", "shots": TRAIN}
        runs.append(vtclip.fit("t.npz", records=records, out=tmp_path / name, **options))
    assert files(runs[0])["adapter.safetensors"] != files(runs[1])["adapter.safetensors"]


FOLDER_CASES: dict[str, dict[str, Any]] = {
    "encoders": {"method": "rada", "train_encoders": True, "overrides": {"epochs": 1}},
    **{name: {"method": name, "overrides": {"epochs": 1}} for name in NEEDS_ENCODER & set(HEADS)},
}


@pytest.mark.parametrize("case", FOLDER_CASES)
def test_nothing_of_the_test_pictures_reaches_an_adapter(case, tmp_path):
    source = dots(tmp_path / "photos")
    records = open_source(source, cache_dir=tmp_path / "cache", progress=False)
    options = {**FOLDER_CASES[case], "shots": 2, "cache_dir": tmp_path / "cache"}
    first = vtclip.fit(source, out=tmp_path / "one", **options)
    split = split_rows(records, True, 2, 1, 0.5)
    assert split.digest == first.result["split"]
    test = {records.names[row] for row in split.test.tolist()}
    assert len(test) == 12
    second = vtclip.fit(dots(tmp_path / "other", test), out=tmp_path / "two", **options)
    assert files(first) == files(second)
    assert first.result["adapted"]["nll"] != second.result["adapted"]["nll"]
    assert first.result["adapted"]["temperature"] == second.result["adapted"]["temperature"]
