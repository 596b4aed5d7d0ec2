# SPDX-License-Identifier: Apache-2.0
"""The CPU extension of a copy: -O1, the portable instruction set alone, one file at a time."""

from __future__ import annotations

import os
import re
import subprocess
import sysconfig
from pathlib import Path

from copy_of import LIBRARY, SCALAR_ONLY

COMPILE_LIMIT = 300


class Extension:
    """Objects of every source; `changed` compiles those that include a file again."""

    def __init__(self, tree: Path) -> None:
        self.tree, self.objects = tree, tree / "build" / "mutation"
        self.objects.mkdir(parents=True)
        header = tree / "csrc" / "cpu" / "common" / "capability.h"
        text = header.read_text()
        if text.count(SCALAR_ONLY[0]) != 1:
            raise SystemExit(f"{header.name} has no line {SCALAR_ONLY[0]!r}")
        header.write_text(text.replace(*SCALAR_ONLY))
        entries = '#define VTCLIP_BUILD_INFO {"mode", "cpu"}, {"cpu", "mutation"}\n'
        (tree / "build" / "build_info.h").write_text(entries)
        self.compile, self.link_flags = _commands()
        self.sources = [tree / "csrc" / "module.cpp", *sorted((tree / "csrc/cpu").rglob("*.cpp"))]
        self.needs = {}
        for source in self.sources:
            if not self.build(source, self.object_of(source)):
                raise SystemExit(f"{source.name} does not compile unchanged")
            rule = self.object_of(source).with_suffix(".d").read_text()
            self.needs[source] = {
                (tree / name).resolve() for name in re.findall(r"[^\s\\:]+", rule)
            }
        self.link({})

    def object_of(self, source: Path, suffix: str = ".o") -> Path:
        return self.objects / f"{source.parent.name}_{source.stem}{suffix}"

    def build(self, source: Path, target: Path) -> bool:
        name = str(source.relative_to(self.tree))
        command = [*self.compile, "-MMD", "-c", name, "-o", str(target)]
        try:
            done = subprocess.run(
                command, cwd=self.tree, capture_output=True, timeout=COMPILE_LIMIT
            )
        except subprocess.TimeoutExpired:
            return False
        return done.returncode == 0

    def link(self, replaced: dict[Path, Path]) -> bool:
        objects = [str(replaced.get(source, self.object_of(source))) for source in self.sources]
        library = self.tree / "vtclip" / LIBRARY
        fresh = library.with_suffix(".new")  # in one step: a process may have the old one mapped
        command = [*self.compile[:1], "-shared", *objects, *self.link_flags, "-o", str(fresh)]
        if subprocess.run(command, cwd=self.tree, capture_output=True).returncode:
            return False
        os.replace(fresh, library)
        return True

    def changed(self, file: Path) -> str:
        """Links the library of the changed file; "compile" or "object" where there is none to test:
        it does not compile, or is the same code."""
        replaced = {}
        for source in self.sources:
            if file.resolve() in self.needs[source]:
                target = self.object_of(source, ".changed.o")
                if not self.build(source, target):
                    return "compile"
                replaced[source] = target
        if not replaced:
            raise SystemExit(f"no source includes {file.name}")
        if all(p.read_bytes() == self.object_of(s).read_bytes() for s, p in replaced.items()):
            return "object"
        return "" if self.link(replaced) else "compile"


def _commands() -> tuple[list[str], list[str]]:
    """Compiler with flags, and what the linker is given."""
    from torch.utils import cpp_extension

    includes = [*cpp_extension.include_paths(device_type="cpu"), sysconfig.get_path("include")]
    folders = cpp_extension.library_paths(device_type="cpu")
    compile = [
        *os.environ.get("CXX", "c++").split(), "-std=c++20", "-O1", "-g0", "-w", "-fPIC",
        "-DTORCH_TARGET_VERSION=0x020b000000000000", "-DTORCH_EXTENSION_NAME=_C",
        "-DTORCH_API_INCLUDE_EXTENSION_H", "-Ibuild", "-Icsrc", *(f"-isystem{p}" for p in includes),
    ]  # fmt: skip
    return compile, [*(f"-L{folder}" for folder in folders), "-ltorch", "-ltorch_cpu", "-lc10"]
