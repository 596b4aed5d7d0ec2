# SPDX-License-Identifier: Apache-2.0
"""Pseudo-labels: which images are kept, and that no true label of the pool decides anything."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from sealing import opened
from torch.nn import functional as F

import vtclip
from vtclip.cli import main
from vtclip.data.records import Records
from vtclip.data.splits import few_shot_split
from vtclip.train.pseudo_labels import pseudo_labelled, surest, unlabelled_split

CPU = torch.device("cpu")
QUICK = {"vtclip": {"epochs": 1}, "rada": {"epochs": 1}, "tip-adapter-f": {"epochs": 1}}
METHODS = ["rada", "vtclip", "tip-adapter", "tip-adapter-f", "proker"]


def test_keeps_the_surest_of_each_named_class():
    p = torch.tensor(
        [[0.6, 0.3, 0.1], [0.9, 0.1, 0.0], [0.1, 0.8, 0.1], [0.7, 0.2, 0.1], [0.4, 0.5, 0.1]]
    )
    kept, label = surest(p.log(), 2)
    assert kept.tolist() == [1, 2, 3, 4]
    assert label.tolist() == [0, 1, 0, 1]
    kept, label = surest(p.log(), 1)
    assert (kept.tolist(), label.tolist()) == ([1, 2], [0, 1])


def test_probability_decides_not_the_logit():
    """The first row's logits are larger and its probability smaller."""
    kept, _ = surest(torch.tensor([[50.0, 49.0], [3.0, 0.0]]), 1)
    assert kept.tolist() == [1]


def test_of_equally_sure_rows_the_first_are_kept():
    kept, label = surest(torch.tensor([[2.0, 0.0]] * 40 + [[0.0, 2.0]] * 40), 3)
    assert kept.tolist() == [0, 1, 2, 40, 41, 42]
    assert label.tolist() == [0] * 3 + [1] * 3


def test_against_a_plain_loop(records):
    split = unlabelled_split(records, 1, 0.5)
    named, kept = pseudo_labelled(records, split, 5, CPU)
    logits = records.logit_scale * F.normalize(records.batch(split.train).image) @ records.text.T
    sure: dict[int, list[tuple[float, int]]] = {}
    for row, share in zip(split.train.tolist(), logits.softmax(dim=1).tolist(), strict=True):
        best = max(range(4), key=lambda k: share[k])
        sure.setdefault(best, []).append((-share[best], row))
    wanted = {row: k for k, rows in sure.items() for _, row in sorted(rows)[:5]}
    assert dict(zip(kept.train.tolist(), named.label[kept.train].tolist(), strict=True)) == wanted


def test_test_images_are_those_of_a_labelled_run_and_never_kept(records):
    labelled = few_shot_split(records.label, records.names, shots=4, seed=1)
    split = unlabelled_split(records, 1, 0.5)
    assert torch.equal(split.test, labelled.test)
    assert sorted([*split.train.tolist(), *split.test.tolist()]) == list(range(len(records)))
    named, kept = pseudo_labelled(records, split, 100, CPU)
    assert not set(kept.train.tolist()) & set(split.test.tolist())
    assert len(kept.train) == len(split.train)
    assert len(kept.val) == 0
    others = torch.ones(len(records), dtype=torch.bool)
    others[kept.train] = False
    assert not bool(named.label[others].any())  # no true label is left in what training gets
    assert bool(records.label[others].any())  # and the caller's own are untouched


def test_official_lists_give_their_training_rows(records):
    roles = torch.arange(len(records)) % 3
    split = unlabelled_split(with_roles(records, records.label, roles), 1, 0.5)
    assert torch.equal(split.train, (roles == 0).nonzero().flatten())
    assert torch.equal(split.test, (roles == 2).nonzero().flatten())
    assert len(split.val) == 0


def with_roles(records: Records, label: torch.Tensor, roles: torch.Tensor) -> Records:
    every = records.batch(torch.arange(len(records)))
    made = Records.from_tensors(
        every.image, label, records.text, records.class_names, spatial=every.spatial,
        logit_scale=records.logit_scale,
    )  # fmt: skip
    made.roles = roles.to(torch.int8)
    return made


@pytest.mark.parametrize("method", METHODS)
def test_true_labels_of_the_pool_decide_nothing(records, method, tmp_path):
    """Other labels in the pool: the same adapter, byte for byte, and another reported accuracy."""
    roles = torch.arange(len(records)) % 2 * 2
    pool = (roles == 0).nonzero().flatten()
    label = records.label.clone()
    label[pool] = label[pool].flip(0)
    assert not torch.equal(label, records.label)
    runs = [
        vtclip.fit(
            "table", records=with_roles(records, one, roles), method=method, shots=3,
            pseudo_labels=True, overrides=QUICK.get(method), out=tmp_path / str(number), threads=1,
        )
        for number, one in enumerate((records.label, label))
    ]  # fmt: skip
    before, after = ((run.folder / "adapter.safetensors").read_bytes() for run in runs)
    assert before == after
    first, second = (run.result for run in runs)
    assert first["images"] == {"train": 12, "val": 0, "test": len(records) // 2}
    assert first["adapted"]["temperature"] is None
    assert first["adapted"] == second["adapted"]
    assert first["pseudo_labels"] is True
    assert first["pseudo_label_accuracy"] > second["pseudo_label_accuracy"]


def test_auto_chooses_by_pseudo_labels_alone(records, tmp_path, monkeypatch):
    from vtclip.train import auto

    monkeypatch.setattr(auto, "CANDIDATES", ("zeroshot", "proker"))
    roles = torch.arange(len(records)) % 2 * 2
    label = torch.where(roles == 0, records.label.flip(0), records.label)
    runs = [
        vtclip.fit("table", records=with_roles(records, one, roles), method="auto", shots=3,
                pseudo_labels=True, out=tmp_path / str(number), threads=1)
        for number, one in enumerate((records.label, label))
    ]  # fmt: skip
    before, after = ((run.folder / "adapter.safetensors").read_bytes() for run in runs)
    assert before == after


def test_a_class_with_few_images_keeps_what_it_has_and_says_so(records, caplog):
    text = records.text.clone()
    text[3] = -text[:3].sum(dim=0)  # nothing looks like it
    other = Records.from_tensors(
        records.batch(torch.arange(len(records))).image, records.label, text, records.class_names
    )
    split = unlabelled_split(other, 1, 0.5)
    with caplog.at_level(logging.WARNING):
        named, kept = pseudo_labelled(other, split, 6, CPU)
    counts = torch.bincount(named.label[kept.train], minlength=4).tolist()
    assert counts[3] < 6
    assert max(counts) == 6
    short = [f"{name} {n}" for name, n in zip(other.class_names, counts, strict=True) if n < 6]
    assert f"{len(short)} of 4 classes have fewer than 6 images" in caplog.text
    assert f": {', '.join(short)}" in caplog.text


def test_command_reports_and_evaluate_finds_the_same_images(npz, tmp_path, capsys):
    out = tmp_path / "run"
    args = ["fit", str(npz), "--method", "rada", "--epochs", "1", "--shots", "4", "--threads", "1"]
    assert main([*args, "--pseudo-labels", "--out", str(out), "--json"]) == 0
    result = opened(out / "result.json")
    printed = json.loads(capsys.readouterr().out)
    assert {key: printed[key] for key in result} == result
    assert result["pseudo_labels"] is True
    assert 0 < result["pseudo_label_accuracy"] <= 1
    assert result["config"]["pseudo_labels"] is True
    assert vtclip.evaluate(out)["accuracy"] == result["accuracy"]
    same = {"method": "rada", "shots": 4, "overrides": {"epochs": 1}, "out": out, "resume": True}
    assert vtclip.fit(npz, pseudo_labels=True, **same).result == result
    with pytest.raises(ValueError, match="another pseudo_labels"):
        vtclip.fit(npz, **same)


def test_without_shots_it_takes_16_whatever_the_labels_say(npz, tmp_path):
    run = vtclip.fit(npz, method="tip-adapter", pseudo_labels=True, out=tmp_path / "run", threads=1)
    assert run.result["shots"] == 16
    counts = run.result["images"]
    assert 16 < counts["train"] <= 48  # 48 images are no test images


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"method": "zeroshot"}, "method zeroshot learns nothing from images"),
        ({"method": "rada", "base_to_new": True}, "cannot be combined with base_to_new"),
        ({"method": "rada", "train_encoders": True}, "cannot be combined with train_encoders"),
        ({"method": "rada", "shots": 0}, "shots must be at least 1 with pseudo_labels, got 0"),
        ({"method": "tip-adapter", "test_fraction": 1.0}, "every image is a test image"),
    ],
)
def test_what_it_cannot_do_is_said_before_anything_is_written(npz, tmp_path, options, what):
    out = tmp_path / "run"
    with pytest.raises(ValueError, match=what):
        vtclip.fit(npz, pseudo_labels=True, out=out, **options)  # type: ignore[arg-type]
    assert not out.exists()


def test_a_data_set_gives_its_whole_training_list_and_no_draw(tmp_path, trees):
    """Of 18 listed training images all are in the pool, and other labels in the list change nothing
    of the adapter."""
    root = trees.make_split(tmp_path / "root", "oxford_flowers")

    def fitted(name: str) -> vtclip.Run:
        return vtclip.fit(
            "oxford_flowers", data=root, method="tip-adapter", shots=18, pseudo_labels=True,
            cache_dir=tmp_path / name / "cache", out=tmp_path / name / "run", threads=1,
        )  # fmt: skip

    run = fitted("one")
    assert run.result["images"] == {"train": 18, "val": 0, "test": 12}
    again = vtclip.evaluate(run, cache_dir=tmp_path / "one" / "cache")
    assert again["accuracy"] == run.result["accuracy"]
    rows = trees.read_rows(root, "oxford_flowers")
    classes = [row[1:] for row in rows["train"]]
    rows["train"] = [
        [row[0], *one] for row, one in zip(rows["train"], classes[5:] + classes[:5], strict=True)
    ]
    trees.write_split(root, "oxford_flowers", rows)
    other = fitted("two")
    name = "adapter.safetensors"
    assert (run.folder / name).read_bytes() == (other.folder / name).read_bytes()
    assert run.result["split"] != other.result["split"]  # the lists did change
