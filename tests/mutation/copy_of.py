# SPDX-License-Identifier: Apache-2.0
"""A copy of the tracked files in which sources are changed, built and tested; gone at the end.

Tests run in a fork of this process, which has imported torch and pytest but nothing of the package:
a run begins in half a second, and a crash or an endless loop ends the fork alone.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import traceback
from pathlib import Path
from typing import NamedTuple

STALL = 90.0  # seconds of one test; of none that passes does more than a third go by
MEMORY = 6 << 30  # bytes of data that a run of the tests may take
SCALAR_ONLY = ("#define VTCLIP_X86 1", "#define VTCLIP_X86 0")
LIBRARY = "_C" + str(sysconfig.get_config_var("EXT_SUFFIX"))


class Verdict(NamedTuple):
    """result: killed, survived, timeout, does not import, no test; by: the test."""

    result: str
    by: str
    seconds: float


class Copy:
    """The tracked files of a checkout, in a folder of their own."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.tree, self.scratch = root, folder / "tree", folder / "scratch"
        listed = subprocess.run(
            ["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=root, capture_output=True,
            check=True,
        ).stdout.decode()  # fmt: skip
        for name in filter(None, listed.split("\0")):
            if (root / name).is_file():
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(root / name, self.tree / name)
        built = root / "vtclip" / LIBRARY
        if built.is_file():
            shutil.copy2(built, self.tree / "vtclip" / LIBRARY)
        # by hash: a change within one second that keeps the size would be missed by time and size
        compiled = [sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "checked-hash"]
        folders = [name for name in ("vtclip", "kernels") if (self.tree / name).is_dir()]
        subprocess.run([*compiled, *folders], cwd=self.tree, check=True)

    def environment(self) -> dict[str, str]:
        older = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        paths = [p for p in older if p and Path(p).resolve() != self.root.resolve()]
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(self.tree), *paths]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HOME": str(self.scratch),
            "TMPDIR": str(self.scratch),
            "OMP_NUM_THREADS": "1",
        }

    def imports(self, module: str) -> bool:
        """Whether a fresh interpreter imports `module`, from the copy."""
        code = "import importlib, sys; print(importlib.import_module(sys.argv[1]).__file__)"
        done = subprocess.run(
            [sys.executable, "-c", code, module], cwd=self.tree, env=self.environment(),
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        if done.returncode == 0 and not done.stdout.strip().startswith(str(self.tree)):
            raise SystemExit(f"{module} is imported from elsewhere: {done.stdout.strip()}")
        return done.returncode == 0

    def test(self, arguments: list[str], limit: float) -> Verdict:
        """pytest's verdict about the copy as it stands."""
        shutil.rmtree(self.scratch, ignore_errors=True)
        shutil.rmtree(self.tree / ".hypothesis", ignore_errors=True)
        self.scratch.mkdir()
        begun = time.monotonic()
        child = os.fork()
        if child == 0:
            _become_pytest(self, arguments)
        seen = self.scratch / "seen.json"
        code = _status(child, begun + limit, seen)
        seconds = time.monotonic() - begun
        found = json.loads(seen.read_text()) if seen.is_file() else {"running": "", "failed": ""}
        if code is None:
            return Verdict("timeout", found["running"], seconds)
        if code == 0:
            return Verdict("survived", "", seconds)
        if code == 5:
            return Verdict("no test", "", seconds)
        if code < 0:
            by = f"{found['running']} ({signal.Signals(-code).name})".strip()
            return Verdict("killed", by, seconds)
        return Verdict("killed", found["failed"] or f"pytest's exit status {code}", seconds)

    def output(self) -> str:
        return (self.scratch / "output.txt").read_text(errors="replace")


def _status(child: int, deadline: float, seen: Path) -> int | None:
    """Exit status, minus the signal, or None past the deadline or where one test takes STALL
    seconds; its whole session ends with it."""
    try:
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            late = time.monotonic() > deadline
            with contextlib.suppress(FileNotFoundError):
                late = late or time.time() > seen.stat().st_mtime + STALL
            if late:
                return None
            time.sleep(0.05)
    finally:  # where this process is ended too
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)


class _Watch:
    """A plugin that writes down the test that runs and the first that failed."""

    def __init__(self, path: Path) -> None:
        self.path, self.seen = path, {"running": "", "failed": ""}

    def note(self, key: str, value: str) -> None:
        self.seen[key] = value
        self.path.write_text(json.dumps(self.seen))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.note("running", nodeid)

    def pytest_runtest_logreport(self, report: object) -> None:
        if getattr(report, "failed", False) and not self.seen["failed"]:
            self.note("failed", report.nodeid)  # type: ignore[attr-defined]

    def pytest_collectreport(self, report: object) -> None:
        self.pytest_runtest_logreport(report)


def _become_pytest(copy: Copy, arguments: list[str]) -> None:
    code = 70
    try:
        os.setsid()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        output = os.open(copy.scratch / "output.txt", os.O_WRONLY | os.O_CREAT, 0o600)
        for stream in (1, 2):
            os.dup2(output, stream)
        os.environ.clear()
        os.environ.update(copy.environment())
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.chdir(copy.tree)
        sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != copy.root.resolve()]
        sys.path.insert(0, str(copy.tree))
        sys.dont_write_bytecode = True
        import pytest

        plain = ["-x", "-q", "-p", "no:cacheprovider", "--basetemp", str(copy.scratch / "pytest")]
        plain += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # of what is imported already
        code = int(pytest.main([*plain, *arguments], plugins=[_Watch(copy.scratch / "seen.json")]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def preload(names: list[str]) -> None:
    """What runs import and no change can reach, where it is installed."""
    for name in ["pytest", *names]:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
