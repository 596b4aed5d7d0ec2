# SPDX-License-Identifier: Apache-2.0
"""The script that runs on a GPU machine: its refusals, a rehearsal on CPU, what it keeps."""

from __future__ import annotations

import csv
import importlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import types
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from bare import environment

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


def run(*arguments: object, timeout: float = 200) -> subprocess.CompletedProcess[str]:
    options = {"env": os.environ | {"PYTHON": sys.executable}, "timeout": timeout}
    command = [SCRIPT, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def test_every_path_it_names_exists(benchmarks):
    suite = benchmarks.gpu_suite
    tests = [word for phase in suite.PHASES for word in phase if word.startswith("tests/")]
    paths = {*tests, *suite.LEFT_OUT, suite.REHEARSED[0][0]}
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
    for path in suite.LEFT_OUT:  # else there is nothing to leave out
        assert path.startswith(tuple(tests))


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


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has torch and pytest, and neither vtclip nor NumPy."""
    return environment(tmp_path_factory.mktemp("bare") / "venv", "torch", "pytest")


@pytest.fixture(scope="module")
def with_numpy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with NumPy, without which Triton's interpreter does not run."""
    return environment(tmp_path_factory.mktemp("bare") / "numpy", "torch", "pytest", "numpy")


def begin(python: Path, *arguments: object) -> subprocess.Popen[str]:
    """The suite under an interpreter that is isolated from this checkout and from variables."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TRITON"))}
    command = [str(python), "-I", str(BENCHMARKS / "gpu_suite.py"), *map(str, arguments)]
    return subprocess.Popen(
        command, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def packed(out: Path) -> dict[str, object]:
    """The state of a run that has left nothing but the files that travel."""
    names = {path.name for path in out.iterdir()}
    assert names == {"summary.md", "targets.csv", "junit.xml", "state.json", "everything.tar.gz"}
    return json.loads((out / "state.json").read_text())


def test_a_bare_machine_goes_through_every_step(tmp_path, with_numpy):
    out, work = tmp_path / "out", tmp_path / "work"
    with begin(with_numpy, out, 10, "--rehearse") as suite:
        said, error = suite.communicate(timeout=500)
    assert suite.returncode == 0, error
    assert "gpu_suite: missing here: " in said
    state = packed(out)
    notes = {step["step"]: step["note"] for step in state["steps"]}
    assert list(notes) == [
        *("build", "selftest", "tests", "benchmarks", "kernel counts"),
        "benchmarks with compiled baselines",
    ]
    assert state["not_reached"] == []
    with tarfile.open(out / "everything.tar.gz") as archive:
        archive.extractall(work, filter="data")
    assert notes["selftest"] == "all right", (work / "selftest.log").read_text()[-2000:]
    assert notes["tests"] == "finished", (work / "tests-0.log").read_text()[-2000:]
    assert notes["benchmarks"] == "finished", (work / "benchmarks.log").read_text()[-2000:]
    suite = ElementTree.parse(out / "junit.xml").getroot()
    assert suite.get("failures") == suite.get("errors") == "0"
    assert int(suite.get("tests")) > int(suite.get("skipped")) > 0
    with (work / "benchmarks" / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["mode"] for row in rows} == {"forward", "forward+backward"}
    assert {"sdpa flash", "vtclip", "naive"} <= {row["provider"] for row in rows}
    page = (out / "summary.md").read_text()
    for part in (torch.__version__, "Not reached in the time: nothing.", "tests/gpu/test_ops.py"):
        assert part in page
    assert "cuda: no CUDA device" in page
    assert "not measured" in page
    assert "rational_head      reference" in page  # of the self-test's table


def test_the_sanitizer_is_a_run_of_its_own(tmp_path, with_numpy, benchmarks):
    assert "sanitizer" not in benchmarks.gpu_suite.SHARES
    with begin(with_numpy, tmp_path / "out", 10, "--rehearse", "--sanitizer") as suite:
        _, error = suite.communicate(timeout=400)
    assert suite.returncode == 0, error
    state = packed(tmp_path / "out")
    assert [step["step"] for step in state["steps"]] == ["build", "sanitizer"]
    (watched,) = state["sanitizer"]
    assert watched["calls"] >= 4  # of at least two operators, in two dtypes each


def test_a_run_that_is_ended_packs_what_it_has(tmp_path, bare):
    with begin(bare, tmp_path / "out", 10, "--rehearse") as suite:
        for line in suite.stdout:
            if line.startswith("gpu_suite: selftest"):
                suite.terminate()
                break
        suite.communicate(timeout=200)
    assert suite.returncode == 128 + signal.SIGTERM
    state = packed(tmp_path / "out")
    assert state["ended"] == "ended by SIGTERM"
    assert [step["note"] for step in state["steps"]][1:] == ["was ended in it"]
    page = (tmp_path / "out" / "summary.md").read_text()
    assert "The run was ended by SIGTERM." in page
    assert "numpy (tests of heads that read arrays)" in page


def test_tests_of_the_device_are_collected_without_numpy(tmp_path, bare, benchmarks):
    suite, log = benchmarks.gpu_suite, tmp_path / "log.jsonl"
    place = {"cwd": ROOT, "env": os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{BENCHMARKS}"}}
    paths = [path for phase in suite.PHASES[:2] for path in phase]
    command = [str(bare), "-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only"]
    command += ["-W", suite.NO_NUMPY, "--continue-on-collection-errors"]
    command += ["-p", "streamed", "--stream", str(log), *paths]
    command += [f"--ignore={path}" for path in suite.LEFT_OUT]
    done = subprocess.run(command, **place, capture_output=True, text=True)
    found = benchmarks.streamed.read(log)
    # others are skipped where Triton's interpreter cannot be had, as it needs NumPy
    assert {file for file, e in found.items() if e["outcome"] == "not collected"} == set()
    names = [line for line in done.stdout.splitlines() if "::" in line]
    assert names[0].startswith("tests/gpu/")
    assert len(names) > 1000, done.stdout[-2000:]


@pytest.fixture
def suite(benchmarks, tmp_path, monkeypatch):
    """A function that makes a suite of one step at a rehearsal, without running it."""

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # goes with the test

    def make(minutes: float = 1.0, step: str = "tests"):
        monkeypatch.setenv("PATH", os.environ["PATH"])
        rehearsed = (tmp_path / "out", minutes, {step: 1.0}, True, time.monotonic())
        return benchmarks.gpu_suite.Suite(*rehearsed)

    return make


def test_a_step_that_does_not_end_is_killed_within_the_time(suite, benchmarks, monkeypatch):
    assert benchmarks.gpu_suite.RESERVE > 2 * benchmarks.gpu_suite.GRACE_S
    monkeypatch.setattr(benchmarks.gpu_suite, "GRACE_S", 0.05)
    made = suite(0.1)
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    monkeypatch.setattr(made, "environment", lambda: None)
    command = [sys.executable, "-c", deaf]
    monkeypatch.setattr(made, "tests", lambda: str(made.run("tests", command, "deaf.log")))
    made.go()
    assert time.monotonic() - made.start < 6.0
    assert packed(made.out)["steps"][0]["note"] == "None"
    assert not made.work.exists()


def test_the_clock_starts_with_the_script(benchmarks, monkeypatch):
    suite = benchmarks.gpu_suite
    monkeypatch.setenv("GPU_SUITE_START", str(time.time() - 7.0))
    assert 6.9 < time.monotonic() - suite.start_of_clock() < 8.0
    assert suite.start_of_clock() == suite.BEGAN  # the variable is not for the children
    monkeypatch.setenv("GPU_SUITE_START", str(time.time() - 7000.0))  # of another run
    assert suite.start_of_clock() == suite.BEGAN
    script = SCRIPT.read_text()
    assert "GPU_SUITE_START=$(date +%s.%N) exec" in script
    assert "default=9.0" in (BENCHMARKS / "gpu_suite.py").read_text()


def test_the_device_is_tested_first(suite, benchmarks, monkeypatch):
    made = suite()
    made.rehearse = False
    chosen: list[list[str]] = []

    def begun(command: list[str], log: str, **extra: str) -> types.SimpleNamespace:
        chosen.append(command)
        return types.SimpleNamespace(poll=lambda: 0)

    monkeypatch.setattr(made, "begin", begun)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert made.tests().startswith("left out, as no device runs them")
    first, second, third = chosen
    assert "tests/gpu" in first
    assert "-k" not in first
    assert second[second.index("-k") + 1] == "triton or cuda"
    assert {"tests/ops", "tests/kernels"} <= set(second)
    assert "tests/heads" in third


@pytest.mark.parametrize(
    ("warning", "code"),
    [
        ("TensorFloat32 tensor cores for float32 matrix multiplication available but not", 0),
        ("Something else", 1),
    ],
)
def test_inductors_advice_is_no_failure(warning, code, tmp_path, suite):
    path = tmp_path / "test_it.py"
    path.write_text(f"import warnings\ndef test_it(): warnings.warn({warning!r})\n")
    command = [*suite().pytest(str(path)), "-c", str(ROOT / "pyproject.toml"), "--noconftest"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == code, done.stdout


def test_a_baseline_that_warns_is_a_row_with_the_reason(benchmarks, monkeypatch):
    speed = importlib.import_module("test_speed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def refuses() -> None:
        raise UserWarning("Memory efficient kernel not used because: ...\nmore")

    calls = {"vtclip": lambda: None, "sdpa efficient": refuses}
    timed, columns, refused = speed._on_device(calls, None, False)
    assert set(timed) == set(columns) == {"vtclip"}
    reason = "UserWarning: Memory efficient kernel not used because: ..."
    assert refused == {"sdpa efficient": reason}


def test_kernels_are_counted_in_another_process_than_times(benchmarks, tmp_path):
    assert "kernel_count" not in vars(importlib.import_module("test_speed"))
    assert "kernel counts" in benchmarks.gpu_suite.SHARES
    path = BENCHMARKS / "conftest.py"
    spec = importlib.util.spec_from_file_location("benchmarks_conftest", path)
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    for count, left_out in ((True, "test_speed.py"), (False, "test_kernels.py")):
        config = types.SimpleNamespace(getoption=lambda name, count=count: count)
        files = sorted(BENCHMARKS.glob("test_*.py"))
        ignored = {path.name for path in files if conftest.pytest_ignore_collect(path, config)}
        assert ignored == {left_out}
    row = {"case": "A", "mode": "forward", "provider": "vtclip"}
    for folder, more in {
        "benchmarks": {"median_ms": "2"},
        "kernel-counts": {"kernels": "7"},
    }.items():
        (tmp_path / folder).mkdir()
        with (tmp_path / folder / "results.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, [*row, *more])
            writer.writeheader()
            writer.writerow({**row, **more})
    (merged,) = benchmarks.gpu_summary.rows_of(tmp_path)
    assert (merged["median_ms"], merged["kernels"]) == ("2", "7")


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("77.0.1", ""),
        ("65.5.0", "setuptools 65.5.0 is older than 77"),
        (None, "setuptools is not installed (needs 77 or newer)"),
    ],
)
def test_an_old_setuptools_is_said_at_once(version, reason, benchmarks, suite, monkeypatch):
    assert benchmarks.gpu_suite.why_no_build(version) == reason
    monkeypatch.setattr(benchmarks.gpu_suite, "version_of", lambda name: version)
    made = suite(step="build")
    made.rehearse = False
    monkeypatch.setattr(made, "there", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(made, "run", lambda step, command, log, **extra: 0)
    built = "built with VTCLIP_EXT=cuda"
    assert made.build() == (
        f"no extension, Triton and reference only: {reason}" if reason else built
    )


@pytest.mark.parametrize(
    ("triton", "numpy", "reason"),
    [
        ("3.6.0", "2.4.1", "the interpreter of Triton 3.6.0 does not run with NumPy 2.4.1"),
        ("3.6.0", "2.3.5", ""),
        ("3.8.0", "2.4.6", ""),
        ("3.8.0", None, "rehearsed kernels need Triton's interpreter, NumPy is not installed"),
    ],
)
def test_a_rehearsal_says_what_its_interpreter_cannot_run(triton, numpy, reason, benchmarks, suite):
    assert benchmarks.gpu_suite.interpreter_note(triton, numpy) == reason
    assert benchmarks.gpu_suite.OLD_INTERPRETER in suite().pytest()  # NumPy 1.25 to 2.3 warn of it


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


def test_kernels_of_fifty_classes_can_be_as_few_as_their_target(benchmarks, monkeypatch):
    """What the benchmark calls, traced, and a split-K reduction for each of its products."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("launches are noted in Triton's interpreter")
    launches = importlib.import_module("launch_counting")
    baselines = importlib.import_module("rada_baselines")
    image, text = (torch.randn(rows, 512).bfloat16() for rows in (32, 50))
    head = baselines.OurRAda(baselines.ReleasedRAda(text, 8, 100.0).bfloat16())
    with launches.counting() as forward:
        out = head(image)
    with launches.counting() as backward:
        torch.autograd.grad(out, [p for p in head.parameters() if p.requires_grad],
                            torch.ones_like(out))  # fmt: skip
    at_most = {t.mode: t.at_most for t in benchmarks.targets.TARGETS if t.what == "kernels"}
    names = {"forward": [*forward], "forward+backward": [*forward, *backward]}
    for mode, launched in names.items():
        products = [name for name in launched if name in ("mm", "addmm", "bmm", "baddbmm")]
        assert len(launched) + len(products) <= at_most[mode], launched


def test_a_backward_can_hold_what_it_returns_and_not_a_query_per_image(benchmarks):
    rows = [t for t in benchmarks.targets.TARGETS if t.what == "backward_mib"]
    assert len(rows) == 5
    for target in rows:
        tokens = int(target.case.partition("L")[2].partition(",")[0])
        row_mib = 8 * 128 * 2 / 2**20
        returned = (2 * 32 * tokens + 1000) * row_mib
        assert returned < target.at_most < returned + 32 * 1000 * row_mib
