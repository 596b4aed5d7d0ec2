# SPDX-License-Identifier: Apache-2.0
"""Damage to what a run leaves behind is noticed, in every byte that means something."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from sealing import as_older, resealed
from torch import nn

from vtclip import files
from vtclip.bench.report import read_benchmark
from vtclip.bench.rows import RowFile, read_bench, read_rows
from vtclip.files import sealed, to_json
from vtclip.runs.adapter import TENSORS, load_adapter
from vtclip.runs.result import RESULT, Run
from vtclip.train.checkpoint import Checkpoint

OLD = Path(__file__).with_name("old")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run of an earlier version, written again by this one."""
    folder = Path(shutil.copytree(OLD / "rada", tmp_path / "run"))
    Run.load(folder).save()
    return Run.load(folder)


def flipped(data: bytes, place: int, bit: int) -> bytes:
    damaged = bytearray(data)
    damaged[place] ^= 1 << bit
    return bytes(damaged)


def check_line(error: ValueError) -> bool:
    """Whether it says in one line what the file is not."""
    assert str(error).startswith("not a vtclip ")
    assert "\n" not in str(error)
    return True


def test_no_flipped_bit_changes_a_result(run):
    path, wanted = run.folder / RESULT, run.result
    whole, draw = path.read_bytes(), random.Random(3)
    refused = 0
    for _ in range(600):
        place, bit = draw.randrange(len(whole)), draw.randrange(8)
        path.write_bytes(flipped(whole, place, bit))
        try:
            assert Run.load(run.folder).result == wanted
        except ValueError as error:
            refused += check_line(error)
    assert refused > 590  # what is left is a letter's case in an escape, or spaces


def test_a_changed_number_is_refused_by_name(run):
    path = run.folder / RESULT
    path.write_text(path.read_text().replace('"accuracy": 0.', '"accuracy": 0.1', 1))
    with pytest.raises(ValueError, match=r"result\.json was changed after it was written"):
        Run.load(run.folder)


def test_a_result_of_this_version_must_carry_its_digest(run):
    path = run.folder / RESULT
    value = json.loads(path.read_text())
    del value["digest"]
    path.write_text(json.dumps(value))
    with pytest.raises(ValueError, match="has format version 2 and no digest"):
        Run.load(run.folder)
    path.write_bytes(to_json(sealed({**value, "format_version": 3})))
    with pytest.raises(ValueError, match="has format version 3, this vtclip reads up to 2"):
        Run.load(run.folder)


def test_a_result_of_an_earlier_version_loads_and_one_line_says_so(run, caplog):
    folder = Path(shutil.move(run.folder, run.folder.with_name("older")))
    as_older(folder / RESULT)
    for _ in range(3):
        assert Run.load(folder).result == run.result
    assert caplog.text.count("carries no digest") == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict.clear, "method is missing"),
        (lambda r: r.update(classes="ant"), "classes must be a list of at least 1, got 'ant'"),
        (lambda r: r.update(seed=10**400), "seed must be a whole number from 0, got a huge number"),
        (lambda r: r.update(config=[]), "config must be an object, got list of 0"),
        (lambda r: r["adapted"].update(accuracy=1.5), "adapted.accuracy must be a finite number"),
        (lambda r: r["adapted"].pop("count"), "adapted.count is missing"),
    ],
    ids=["empty", "classes", "seed", "config", "accuracy", "count"],
)
def test_a_result_with_other_contents_is_refused_though_its_digest_fits(run, change, message):
    resealed(run.folder / RESULT, change)
    with pytest.raises(ValueError, match="not a vtclip run") as error:
        Run.load(run.folder)
    assert message in str(error.value)


def test_every_flip_in_the_header_of_an_adapter_is_noticed(run):
    path = run.folder / TENSORS
    whole = path.read_bytes()
    state = load_adapter(run.folder).head.state_dict()
    wanted = {name: value.clone() for name, value in state.items()}
    length = 8 + int.from_bytes(whole[:8], "little")
    for place in range(length):
        path.write_bytes(flipped(whole, place, place % 8))
        try:
            state = load_adapter(run.folder).head.state_dict()
        except ValueError as error:
            check_line(error)
        else:
            assert all(torch.equal(value, wanted[name]) for name, value in state.items()), place


def checkpoint(folder: Path) -> tuple[Checkpoint, nn.Module, torch.optim.Optimizer]:
    head = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(head.parameters())
    head(torch.ones(4, 3)).sum().backward()
    optimizer.step()
    made = Checkpoint(folder / "checkpoint.safetensors", {"method": "rada", "lr": 0.1})
    made.save(head, optimizer, 10, 1.5)
    return made, head, optimizer


def test_step_10_does_not_become_step_50(tmp_path):
    made, head, optimizer = checkpoint(tmp_path)
    assert made.load(head, optimizer) == (10, 1.5)
    whole = made.path.read_bytes()
    assert whole.count(b'\\"step\\": 10') == 1
    made.path.write_bytes(whole.replace(b'\\"step\\": 10', b'\\"step\\": 50'))
    with pytest.raises(ValueError, match="do not have the digest it names"):
        made.load(head, optimizer)


def test_every_flip_in_the_header_of_a_checkpoint_is_noticed(tmp_path):
    made, head, optimizer = checkpoint(tmp_path)
    whole = made.path.read_bytes()
    length = 8 + int.from_bytes(whole[:8], "little")
    for place in range(length):
        for bit in (place % 8, (place + 3) % 8):
            made.path.write_bytes(flipped(whole, place, bit))
            try:
                assert made.load(head, optimizer) == (10, 1.5), place
            except ValueError as error:
                check_line(error)


def test_a_checkpoint_of_an_earlier_version_goes_on(tmp_path, monkeypatch, caplog):
    """Its digest is of the tensors alone; one line says that damage to the rest is not noticed."""
    monkeypatch.setattr(
        "vtclip.train.checkpoint.safetensors_digest",
        lambda tensors, metadata: files.tensors_digest(tensors),
    )
    made, head, optimizer = checkpoint(tmp_path)
    with pytest.raises(ValueError, match="do not have the digest it names"):
        made.load(head, optimizer)  # one of this version's must cover its state
    monkeypatch.setattr(
        "vtclip.train.checkpoint.to_json", lambda value: files.to_json(_without_version(value))
    )
    made, head, optimizer = checkpoint(tmp_path)
    assert made.load(head, optimizer) == (10, 1.5)
    assert caplog.text.count("carries a digest of its tensors alone") == 1


def _without_version(value: dict[str, object]) -> dict[str, object]:
    return {name: item for name, item in value.items() if name != "format_version"}


def rows(folder: Path) -> Path:
    file = RowFile(folder / "results.jsonl")
    for seed in (1, 2):
        file.append({"key": f"k{seed}", "source": "s", "method": "rada", "shots": 1, "seed": seed,
                     "failed": "no reason"})  # fmt: skip
    file.close()
    return folder / "results.jsonl"


def test_a_damaged_row_is_left_out_by_its_number(tmp_path, caplog):
    path = rows(tmp_path)
    assert [row["seed"] for row in read_rows(tmp_path)] == [1, 2]
    path.write_text(path.read_text().replace('"shots": 1, "seed": 2', '"shots": 9, "seed": 2'))
    assert [row["seed"] for row in read_rows(tmp_path)] == [1]
    assert "results.jsonl, line 2 was damaged; its job runs again" in caplog.text
    found, notes = read_benchmark(tmp_path)
    assert [row["seed"] for row in found] == [1]
    assert notes == ["results.jsonl, line 2: damaged after it was written, not counted."]


def test_rows_of_an_earlier_version_count(tmp_path, caplog):
    path = rows(tmp_path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        del line["digest"], line["format_version"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [row["seed"] for row in read_rows(tmp_path)] == [1, 2]
    assert caplog.text.count("carries no digest") == 1


def test_bench_json_is_under_a_digest(tmp_path):
    path = tmp_path / "bench.json"
    body = {"format": "vtclip-bench", "version": 2, "settings": {"model": "demo"}, "sources": {}}
    path.write_bytes(to_json(sealed(body)))
    assert read_bench(tmp_path) == body
    path.write_text(path.read_text().replace("demo", "deme"))
    with pytest.raises(ValueError, match=r"bench\.json was changed after it was written"):
        read_bench(tmp_path)
    path.write_bytes(to_json(sealed({**body, "sources": []})))
    with pytest.raises(ValueError, match="sources must be an object"):
        read_bench(tmp_path)
