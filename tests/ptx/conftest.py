# SPDX-License-Identifier: Apache-2.0
"""Children that execute the compiled kernels, and a count of what exists, ran and was right."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

HERE = Path(__file__).parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))  # executor and harness, for their own imports too

from harness import child  # noqa: E402
from harness.build import missing  # noqa: E402
from harness.coverage import Summary, summary  # noqa: E402

LINES: list[str] = []  # for the end of the run


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--ptx-all",
        action="store_true",
        help="tests/ptx: every case, the coverage floor and every mutant, not the short list",
    )


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if LINES:
        terminalreporter.section("compiled kernels, executed")
        for line in LINES:
            terminalreporter.write_line(line)


@pytest.fixture(scope="session")
def everything(request: pytest.FixtureRequest) -> bool:
    """Whether the long lists run."""
    return bool(request.config.getoption("--ptx-all", default=False))


@pytest.fixture(scope="session")
def say() -> Callable[[str], None]:
    """Keeps a line for the end of the run."""
    return LINES.append


@pytest.fixture(scope="session")
def output(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """A function that runs a child to its end and returns its lines."""

    def run(*arguments: str, module: str = "harness.child") -> list[str]:
        errors = tmp_path_factory.mktemp("child") / "errors"
        with errors.open("w") as file:
            process = child.start(arguments, module, stdout=child.PIPE, stderr=file)
            text, _ = process.communicate()
        assert process.returncode == 0, errors.read_text()[-4000:]
        return text.splitlines()

    return run


@pytest.fixture(scope="session")
def summaries(
    everything: bool, output: Callable[..., list[str]]
) -> Iterator[dict[tuple[str, str], Future[Summary]]]:
    """Set and architecture -> what its child found; two children run at a time."""
    more = ["--all"] if everything else []

    def run(set_name: str, arch: str) -> Summary:
        found = summary(output(set_name, arch, *more))
        LINES.append(found.line())
        return found

    with ThreadPoolExecutor(2) as pool:
        yield {pair: pool.submit(run, *pair) for pair in child.SETS if not missing(pair[0])}


@pytest.fixture(params=child.SETS, ids="-".join)
def found(
    request: pytest.FixtureRequest, summaries: dict[tuple[str, str], Future[Summary]]
) -> Summary:
    """Each set in turn."""
    set_name, arch = request.param
    if reason := missing(set_name):
        if (line := f"{set_name} {arch}: not run: {reason}") not in LINES:
            LINES.append(line)
        pytest.skip(reason)
    return summaries[request.param].result()
