# SPDX-License-Identifier: Apache-2.0
"""Peak memory of each stage: what one stage held is not counted in another."""

from __future__ import annotations

import mmap
import time
from pathlib import Path

import pytest
import torch

import vtclip
from vtclip import machine
from vtclip.machine import Stopwatch

MB = 96


def hold(megabytes: int, seconds: float = 0.0) -> None:
    # pages of the system's own, not from what malloc keeps: they go back when the map is closed
    with mmap.mmap(-1, megabytes * 2**20) as block:
        for page in range(0, len(block), mmap.PAGESIZE):
            block[page] = 1
        time.sleep(seconds)


def stages() -> dict[str, float]:
    watch = Stopwatch(torch.device("cpu"))
    with watch.stage("large"):
        hold(MB, 0.4)
    with watch.stage("small"):
        hold(1, 0.4)
    with watch.stage("both"):
        hold(1)
    with watch.stage("both"):
        hold(MB // 2, 0.4)
    assert set(watch.memory_mb) == set(watch.seconds)
    return watch.memory_mb


@pytest.mark.parametrize("counter", ["high-water mark", "sampled"])
def test_a_stage_counts_its_own_peak(counter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if counter == "sampled":
        monkeypatch.setattr(machine, "CLEAR_REFS", Path("/nowhere/clear_refs"))
    elif not machine._reset_counter(torch.device("cpu")):
        pytest.skip("this system does not let the high-water mark be set back")
    found = stages()
    assert found["large"] - found["small"] == pytest.approx(MB - 1, abs=16)
    assert found["both"] - found["small"] == pytest.approx(MB // 2 - 1, abs=16)


def test_no_counter_at_all_gives_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CLEAR_REFS", Path("/nowhere/clear_refs"))
    monkeypatch.setattr(machine, "STATM", Path("/nowhere/statm"))
    watch = Stopwatch(torch.device("cpu"))
    with watch.stage("one"):
        pass
    assert (set(watch.seconds), watch.memory_mb) == ({"one"}, {})


def test_the_peak_of_the_process_outlives_its_stages() -> None:
    cpu = torch.device("cpu")
    machine.reset_peak_memory(cpu)
    before = machine.peak_memory_mb(cpu)
    assert before is not None
    found = stages()
    assert machine.peak_memory_mb(cpu) == pytest.approx(found["large"], abs=16)
    machine.reset_peak_memory(cpu)
    assert machine.peak_memory_mb(cpu) == pytest.approx(before, abs=16)


def test_a_run_names_the_memory_of_each_stage(npz: Path, tmp_path: Path) -> None:
    result = vtclip.fit(npz, method="rada", shots=1, out=tmp_path / "run").result
    assert set(result["memory_mb"]) == {"features", "train", "evaluate"}
    assert set(result["seconds"]) == {*result["memory_mb"], "total"}
    assert max(result["memory_mb"].values()) <= result["peak_memory_mb"] + 1
    assert min(result["memory_mb"].values()) > 50  # torch alone is larger


def test_a_run_names_what_decides_its_last_bits(npz: Path, tmp_path: Path) -> None:
    found = vtclip.fit(npz, method="zeroshot", out=tmp_path / "run").result["environment"]
    assert found["device"] == "cpu"
    assert (found["threads"], found["processes"]) == (torch.get_num_threads(), 1)
    assert found["instructions"]["torch"] == torch.backends.cpu.get_cpu_capability()
    assert found["name"]
