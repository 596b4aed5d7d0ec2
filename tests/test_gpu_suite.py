# SPDX-License-Identifier: Apache-2.0
"""The script that runs on a GPU machine: its refusals, a rehearsal on CPU, what it keeps."""

from __future__ import annotations

import csv
import importlib
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
SCRIPT = BENCHMARKS / "gpu_suite.sh"
pytestmark = pytest.mark.skipif(os.name != "posix", reason="a shell script")


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """The modules next to the script, which import each other by their plain names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("cuda_registry", "gpu_suite", "gpu_summary", "sanitize_ops", "streamed", "targets")
    return types.SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def run(*arguments: object, timeout: float = 50) -> subprocess.CompletedProcess[str]:
    options = {"env": os.environ | {"PYTHON": sys.executable}, "timeout": timeout}
    command = [SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_every_path_it_names_exists(benchmarks):
    suite = benchmarks.gpu_suite
    paths = {*suite.TESTS, *suite.LEFT_OUT, suite.REHEARSED[0]}
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
    for path in suite.LEFT_OUT:  # else there is nothing to leave out
        assert path.startswith(suite.TESTS)


def hide_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def test_without_a_device_one_line_and_exit_2(tmp_path, monkeypatch):
    hide_cuda(monkeypatch)
    done = run(tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.startswith("gpu_suite: needs a CUDA device, torch ")
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("0",), "MINUTES must be above 0, got 0"),
        (("1", "--rehearse"), "OUT_DIR must be empty, "),
        (("soon",), "invalid float value: 'soon'"),
    ],
)
def test_bad_arguments(arguments, message, tmp_path):
    (tmp_path / "something").write_text("kept")
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["something"]


def test_rehearsal_goes_through_every_step_and_keeps_what_it_found(tmp_path):
    out = tmp_path / "out"
    done = run(out, 10, "--rehearse", timeout=300)
    assert done.returncode == 0, done.stderr
    assert "gpu_suite: missing here: " in done.stdout
    state = json.loads((out / "state.json").read_text())
    notes = {step["step"]: step["note"] for step in state["steps"]}
    steps = ["build", "tests", "sanitizer", "benchmarks", "benchmarks with compiled baselines"]
    assert list(notes) == steps
    assert state["not_reached"] == []
    assert notes["tests"] == "finished", (out / "tests-0.log").read_text()[-2000:]
    assert notes["benchmarks"] == "finished", (out / "benchmarks.log").read_text()[-2000:]
    (watched,) = state["sanitizer"]
    assert watched["calls"] >= 4  # of at least two operators, in two dtypes each
    suite = ElementTree.parse(out / "junit.xml").getroot()
    assert suite.get("failures") == suite.get("errors") == "0"
    assert int(suite.get("tests")) > int(suite.get("skipped")) > 0
    with (out / "benchmarks" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["mode"] for row in rows} == {"forward", "forward+backward"}
    assert {"sdpa flash", "vtclip", "naive"} <= {row["provider"] for row in rows}
    page = (out / "summary.md").read_text()
    for part in (torch.__version__, "Not reached in the time: nothing.", "tests/gpu/test_ops.py"):
        assert part in page
    assert "cuda: no CUDA device" in page
    assert "not measured" in page


def test_no_time_is_no_step_but_a_page(tmp_path):
    out = tmp_path / "out"
    done = run(out, 0.001, "--rehearse")
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "state.json").read_text())["steps"] == []
    page = (out / "summary.md").read_text()
    assert "Not reached in the time: build, tests, sanitizer, benchmarks" in page
    assert "No test was begun." in page


CRASHING = """
import os, time
import pytest

def test_passes(): pass
def test_fails(): assert 1 == 2, "a | b"
def test_skips(): pytest.skip("no such device")
def test_crashes(): os._exit(77)
def test_after(): pass
"""


def stream(path: Path, log: Path, *options: str) -> int:
    environment = os.environ | {"PYTHONPATH": f"{BENCHMARKS}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "streamed"]
    command += ["--stream", str(log), *options, str(path)]
    place = {"cwd": path.parent, "env": environment}
    return subprocess.run(command, **place, capture_output=True).returncode


def test_a_crash_is_kept_and_the_next_run_goes_on_behind_it(tmp_path, benchmarks):
    path, log = tmp_path / "test_crashing.py", tmp_path / "log.jsonl"
    path.write_text(CRASHING)
    assert stream(path, log) == 77
    assert stream(path, log) == 0  # only what is left
    found = {name.split("::")[1]: entry for name, entry in benchmarks.streamed.read(log).items()}
    assert {name: entry["outcome"] for name, entry in found.items()} == {
        "test_passes": "passed",
        "test_fails": "failed",
        "test_skips": "skipped",
        "test_crashes": "crashed",
        "test_after": "passed",
    }
    assert found["test_skips"]["reason"] == "no such device"
    assert "a | b" in found["test_fails"]["reason"]
    benchmarks.streamed.mark_stopped(log)
    assert [e["outcome"] for e in benchmarks.streamed.read(log).values()].count("stopped") == 1


def test_parts_share_the_tests(tmp_path, benchmarks):
    path = tmp_path / "test_many.py"
    path.write_text("".join(f"def test_{i}(): pass\n" for i in range(7)))
    names: list[str] = []
    for part in range(3):
        log = tmp_path / f"{part}.jsonl"
        assert stream(path, log, "--stream-part", f"{part}/3") == 0
        names += benchmarks.streamed.read(log)
    assert sorted(name.split("::")[1] for name in names) == [f"test_{i}" for i in range(7)]


MEMCHECK = """
triton cosine_logits torch.float32
========= Invalid __global__ read of size 4 bytes
=========     at cosine_logits_fwd_kernel+0x1f0
=========     by thread (0,0,0) in block (1,0,0)
=========     Address 0x7f00 is out of bounds
8 calls finished
========= ERROR SUMMARY: 3 errors
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (MEMCHECK, {"calls": 8, "errors": 3, "kernels": ["cosine_logits_fwd_kernel"]}),
        ("2 calls finished\n========= ERROR SUMMARY: 0 errors\n", {"calls": 2, "errors": 0}),
        (
            "========= RACECHECK SUMMARY: 5 hazards displayed (5 errors, 0 warnings)\n",
            {"calls": None, "errors": 5},
        ),
        ("Killed\n", {"calls": None, "errors": None}),
    ],
)
def test_what_the_sanitizer_prints_is_read(text, expected, benchmarks):
    found = benchmarks.sanitize_ops.parse(text, "memcheck", "triton", 7)
    assert {key: found[key] for key in expected} == expected


def test_every_target_is_a_case_and_the_committed_table_is_its_own(benchmarks, tmp_path):
    graphs = {case.name: case.graph for case in benchmarks.cuda_registry.CASES}
    for target in benchmarks.targets.TARGETS:
        assert target.case in graphs
        if target.what == "median_ms":
            assert target.graph == graphs[target.case]
    assert {target.case for target in benchmarks.targets.TARGETS} == set(graphs)
    fresh = tmp_path / "targets.csv"
    benchmarks.targets.write(fresh, benchmarks.targets.table([]))
    assert fresh.read_text() == benchmarks.targets.CSV.read_text()
    assert "not measured" in fresh.read_text()


def test_measured_rows_are_held_against_their_targets(benchmarks):
    case, mode = "cross_attn[B32,H8,K1000,L49,d128,bfloat16]", "forward"
    times = {"vtclip": "2.0", "vtclip, impl=cuda": "5.0", "sdpa flash": "4.0", "sdpa cudnn": "1.0"}
    rows = [
        {"case": case, "mode": mode, "provider": provider, "median_ms": ms, "device": "D"}
        for provider, ms in times.items()
    ]
    rows.append({"case": case, "mode": mode, "provider": "sdpa efficient", "median_ms": ""})
    found = {
        line["what"]: (line["measured"], line["reached"], line["device"])
        for line in benchmarks.targets.table(rows)
        if (line["case"], line["mode"]) == (case, mode)
    }
    assert found == {
        "vtclip / best sdpa": ("2", "no", "D"),
        "vtclip, impl=cuda / vtclip": ("2.5", "yes", "D"),
    }
