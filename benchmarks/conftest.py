# SPDX-License-Identifier: Apache-2.0
"""Options of the benchmarks, and the table they print."""

from __future__ import annotations

import sys
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
    group.addoption("--bench-no-compile", action="store_true", help="leave torch.compile out")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not ROWS:
        return
    option = session.config.getoption
    save(Path(option("--bench-out")), option("--bench-device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not ROWS:
        return
    write = terminalreporter.write_line
    write(f"{'median ms':>10} {'x ours':>7} {'peak MiB':>9} {'error':>9}  provider")
    group = None
    for row in ROWS:
        if group != (row["case"], row["mode"]):
            group = (row["case"], row["mode"])
            write(f"{row['case']} {row['mode']}")
        times = f"{row['median_ms']:10.3f} {row['times_ours']:7.2f}"
        write(f"{times} {row['peak_mib']:9.1f} {row['error']:9.1e}  {row['provider']}")
