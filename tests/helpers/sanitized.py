# SPDX-License-Identifier: Apache-2.0
"""Builds csrc/cpu with a sanitizer and calls its operators (tests/cpu_sanitized)."""

from __future__ import annotations

import contextlib
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from wire import packed, unpacked

ROOT = Path(__file__).parents[2]
HERE = ROOT / "tests" / "cpu_sanitized"
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-fsanitize=thread"],
}
SETTINGS = {
    "ASAN_OPTIONS": "detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "TSAN_OPTIONS": "halt_on_error=1 exitcode=66",
}
PROBE = "#include <thread>\nint main() { std::thread([] {}).join(); }\n"


class Failed(Exception):
    """The program ended; what it or its sanitizer wrote."""


class Kernels:
    """A running program; `kernels("X_fwd", threads)` is a function of the operator's arguments.

    After a call that ended it the next one starts it again.
    """

    def __init__(self, path: Path, capability: str) -> None:
        self.path = path
        self.environment = {**os.environ, **SETTINGS, "VTCLIP_CPU_CAPABILITY": capability}
        self.begin()

    def begin(self) -> None:
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `end`)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.errors}
        self.process = subprocess.Popen([self.path], env=self.environment, **pipes)

    def __call__(self, name: str, threads: int) -> Callable[..., list[Tensor]]:
        def call(*values: Any) -> list[Tensor]:
            if self.process.poll() is not None:
                self.begin()
            fed = struct.pack("<2q", threads, len(name)) + name.encode()
            fed += struct.pack("<q", len(values)) + b"".join(map(_value, values))
            try:
                self.process.stdin.write(fed)
                self.process.stdin.flush()
            except BrokenPipeError:
                raise Failed(self.end()) from None
            size = self.process.stdout.read(8)
            data = self.process.stdout.read(struct.unpack("<q", size)[0]) if size else b""
            if not size:
                raise Failed(self.end())
            return unpacked(data)

        return call

    def end(self) -> str:
        """Lets it end; what it wrote to standard error, empty where all was well."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        status = self.process.wait(timeout=60)
        with self.errors as file:
            file.seek(0)
            text = file.read().decode(errors="replace")
        return text or (f"exit status {status}" if status else "")


def _value(value: Any) -> bytes:
    if value is None or isinstance(value, Tensor):
        return b"t" + packed(value)
    return b"d" + struct.pack("<d", value) if isinstance(value, float) else b"i" + _int(value)


def _int(value: int) -> bytes:
    return struct.pack("<q", value)


class Builder:
    """Compiles csrc/cpu once for each sanitizer, and copies of it in which one file differs."""

    def __init__(self, folder: Path, everything: bool) -> None:
        self.folder = folder
        self.compiler = shutil.which(os.environ.get("CXX", "g++"))
        self.portable = [] if everything else ["-DVTCLIP_PORTABLE"]
        self.objects: dict[str, list[Path]] = {}
        self.programs: dict[str, Path] = {}

    def why_not(self, sanitizer: str) -> str:
        """Why nothing can run under this sanitizer here; empty where it can."""
        if self.compiler is None or sys.platform != "linux":
            return "no g++ on Linux"
        source, out = self.folder / "probe.cpp", self.folder / f"probe-{sanitizer}"
        source.write_text(PROBE)
        command = [self.compiler, *SANITIZERS[sanitizer], str(source), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        done = (
            subprocess.run([out], capture_output=True, text=True) if not done.returncode else done
        )
        return f"{sanitizer} sanitizer: {done.stderr.strip()[-200:]}" if done.returncode else ""

    def _run(self, *arguments: object) -> None:
        command = [str(self.compiler), *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]

    def _compiled(self, sanitizer: str, csrc: Path, source: Path, out: Path) -> Path:
        include = [f"-I{HERE}/stub", f"-I{csrc}"]
        include += [f"-isystem{Path(torch.__file__).parent}/include"]
        flags = ["-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-D_GLIBCXX_ASSERTIONS"]
        self._run(*flags, *SANITIZERS[sanitizer], *self.portable, *include, "-c", source, "-o", out)
        return out

    def _linked(self, sanitizer: str, objects: list[Path], out: Path) -> Path:
        self._run(*SANITIZERS[sanitizer], *objects, "-pthread", "-o", out)
        return out

    def program(self, sanitizer: str) -> Path:
        """All operators."""
        if sanitizer not in self.programs:
            csrc = ROOT / "csrc"
            sources = [HERE / "call_kernels.cpp"]
            sources += sorted((csrc / "cpu").rglob("*.cpp"))
            self.objects[sanitizer] = [
                self._compiled(
                    sanitizer, csrc, source, self.folder / f"{sanitizer}-{source.stem}.o"
                )
                for source in sources
            ]
            out = self.folder / sanitizer
            self.programs[sanitizer] = self._linked(sanitizer, self.objects[sanitizer], out)
        return self.programs[sanitizer]

    def changed(self, sanitizer: str, op: str, file: str, old: str, new: str) -> Path:
        """The same where, in what operator `op` is made of, `file` has `new` for `old`."""
        self.program(sanitizer)
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        csrc = Path(shutil.copytree(ROOT / "csrc", folder / "csrc"))
        text = (csrc / file).read_text()
        assert text.count(old) == 1, f"{file} has changed: {old}"
        (csrc / file).write_text(text.replace(old, new))
        source = csrc / "cpu" / f"{op}_cpu.cpp"
        own = self._compiled(sanitizer, csrc, source, folder / "own.o")
        others = [o for o in self.objects[sanitizer] if not o.stem.endswith(f"-{source.stem}")]
        assert len(others) == len(self.objects[sanitizer]) - 1
        return self._linked(sanitizer, [own, *others], folder / "program")
