# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin: one JSON line per test as it happens, so that a stopped run keeps its results.

    pytest -p streamed --stream LOG.jsonl [--stream-part 0/4]

What the log already names is left out, so that a run that crashed goes on behind the test that
crashed it. After a failed test the device is asked whether it still works; if not, the run stops
with exit code 9, because every later test in the process would fail with the same error.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

DEVICE_LOST = 9
KEPT = 600  # characters of a reason


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("streamed")
    group.addoption("--stream", help="file that gets a JSON line per test")
    group.addoption("--stream-part", default="0/1", help="i/n: every n-th test from the i-th on")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--stream")
    if path:
        config.pluginmanager.register(Stream(Path(path), config.getoption("--stream-part")))


def read(path: Path) -> dict[str, dict[str, object]]:
    """Test -> its outcome so far; "crashed" where it began and did not end."""
    found: dict[str, dict[str, object]] = {}
    if not path.is_file():
        return found
    for line in path.read_text().splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # the line that was being written when the run was killed
            continue
        name = entry.pop("test")
        found[name] = found.get(name, {"seconds": 0.0, "reason": ""}) | entry
    return found


def _reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    if report.skipped and isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    text = crash.message if crash is not None else report.longreprtext
    return " ".join(text.split())[:KEPT]


def _device_works() -> bool:
    import torch

    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


class Stream:
    def __init__(self, path: Path, part: str) -> None:
        self.path = path
        self.part, self.parts = (int(number) for number in part.split("/"))
        self.started: dict[str, float] = {}

    def write(self, test: str, **entry: object) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"test": test, **entry}) + "\n")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        known = read(self.path)
        mine = items[self.part :: self.parts]
        left = [item for item in mine if item.nodeid not in known]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(left)])
        items[:] = left

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            reason = " ".join(report.longreprtext.split())[-KEPT:]
            self.write(report.nodeid, outcome="not collected", reason=reason)
        elif report.skipped:
            self.write(report.nodeid, outcome="skipped", reason=_reason(report))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.started[item.nodeid] = time.monotonic()
        self.write(item.nodeid, outcome="crashed")
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        seconds = round(time.monotonic() - self.started[report.nodeid], 3)
        outcome = report.outcome if report.when == "call" or report.skipped else "error"
        self.write(report.nodeid, outcome=outcome, seconds=seconds, reason=_reason(report))
        if report.failed and not _device_works():
            pytest.exit("the device stopped working", returncode=DEVICE_LOST)


def mark_stopped(path: Path) -> None:
    """Says of the test that was running that it was stopped from outside."""
    last = [name for name, entry in read(path).items() if entry["outcome"] == "crashed"][-1:]
    with path.open("a") as file:
        for name in last:
            file.write(json.dumps({"test": name, "outcome": "stopped", "reason": "time"}) + "\n")
