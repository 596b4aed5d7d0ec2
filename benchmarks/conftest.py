# SPDX-License-Identifier: Apache-2.0
"""Options of the benchmarks, and the table they print."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from results import ROWS, save


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("vtclip")
    group.addoption("--bench-out", default=str(Path(__file__).parent / "out"), help="result folder")
    group.addoption("--bench-threads", type=int, default=2, help="threads of every provider")
    group.addoption("--bench-budget", type=float, default=6.0, help="seconds for one case and mode")
    group.addoption("--bench-device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.addoption("--bench-count", action="store_true", help="count kernels, time nothing")
    group.addoption("--bench-no-compile", action="store_true", help="leave torch.compile out")
    group.addoption(
        "--bench-tiny", action="store_true", help="the CUDA cases at tiny sizes, any device"
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Either times or counts: a process that has counted is slower."""
    other = "test_speed.py" if config.getoption("--bench-count") else "test_kernels.py"
    return True if collection_path.name == other else None


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "benchmark: timed by pytest-benchmark")


if importlib.util.find_spec("pytest_benchmark") is None:

    class _Shown:
        """Stands in for pytest-benchmark's fixture, which only repeats what was measured."""

        def __init__(self) -> None:
            self.extra_info: dict[str, object] = {}

        def pedantic(self, call: Callable[[], object], *, rounds: int, iterations: int) -> None:
            for _ in range(rounds * iterations):
                call()

    @pytest.fixture
    def benchmark() -> _Shown:
        """Timings go to the CSV and the table all the same."""
        return _Shown()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    import cuda_registry
    import registry

    option = metafunc.config.getoption
    if option("--bench-tiny"):
        cases = [cuda_registry.tiny(case) for case in cuda_registry.CASES]
    else:  # the cases of the targets first, and on a CUDA device only
        cases = [*cuda_registry.CASES] if option("--bench-device") == "cuda" else []
        cases += registry.CASES
    ids = [case.name for case in cases]
    if len(set(ids)) < len(ids):  # made equal by being tiny
        ids = [f"{name}#{i}" for i, name in enumerate(ids)]
    metafunc.parametrize("case", cases, ids=ids)


def pytest_runtest_teardown(item: pytest.Item) -> None:
    if ROWS:  # a run that is stopped keeps what it has
        option = item.config.getoption
        save(Path(option("--bench-out")), option("--bench-device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not ROWS:
        return
    write = terminalreporter.write_line
    write(f"{'median ms':>10} {'x ours':>7} {'peak MiB':>9} {'error':>9}  provider")
    group = None
    for row in ROWS:
        if "kernels" in row:
            write(f"{row['kernels']:>10}  {row['case']} {row['mode']} {row['provider']}: kernels")
            continue
        if group != (row["case"], row["mode"]):
            group = (row["case"], row["mode"])
            write(f"{row['case']} {row['mode']}")
        if row.get("note"):
            write(f"{'-':>10} {'-':>7} {'-':>9} {'-':>9}  {row['provider']}: {row['note']}")
            continue
        times = f"{row['median_ms']:10.3f} {row['times_ours']:7.2f}"
        write(f"{times} {row['peak_mib']:9.1f} {row['error']:9.1e}  {row['provider']}")
