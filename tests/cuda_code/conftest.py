# SPDX-License-Identifier: Apache-2.0
"""Kernels of csrc/cuda as ptxas reports and cuobjdump prints them."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

CSRC = Path(__file__).parents[2] / "csrc"
REGISTERS_OF_AN_SM, THREADS = 65536, 128
INSTRUCTION_BYTES = 16


def cuobjdump() -> str | None:
    """Of the toolkit or, where that has none, of Triton."""
    homes = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")]
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        homes.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin")
    found = shutil.which("cuobjdump"), *(shutil.which("cuobjdump", path=home) for home in homes)
    return next(filter(None, found), None)


class Code(NamedTuple):
    """One kernel: what ptxas says, and its instructions in order, as (address, opcode, rest)."""

    registers: int
    spills: int
    instructions: list[tuple[int, str, str]]

    @property
    def bytes(self) -> int:
        return INSTRUCTION_BYTES * len(self.instructions)

    @property
    def blocks_per_sm(self) -> int:
        """As registers allow it, which are given out to warps by 256."""
        of_warp = -(-self.registers * 32 // 256) * 256
        return REGISTERS_OF_AN_SM // (of_warp * THREADS // 32)

    def count(self, *opcodes: str) -> int:
        """Of instructions whose opcode begins with one of these, part by part."""
        parts = [tuple(opcode.split(".")) for opcode in opcodes]
        return sum(
            any(tuple(opcode.split(".")[: len(part)]) == part for part in parts)
            for _, opcode, _ in self.instructions
        )

    def loops(self) -> list[Code]:
        """From the target of each backward branch to it."""
        targets = [
            (int(found[1], 16), address)
            for address, opcode, rest in self.instructions
            if opcode == "BRA" and (found := re.search(r"0x([0-9a-f]+)", rest))
        ]
        return [
            self._replace(instructions=[i for i in self.instructions if first <= i[0] <= last])
            for first, last in targets
            if first < last
        ]


def instructions(sass: str) -> list[tuple[int, str, str]]:
    pattern = r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)(.*?);"
    return [(int(a, 16), op, rest) for a, op, rest in re.findall(pattern, sass, re.MULTILINE)]


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, text
    return int(found[1])


def compiled(folder: Path, bodies: Mapping[str, str], arch: int) -> dict[str, Code]:
    """{body: Code} of {body: file}, all in one source: headers are read once."""
    tool = cuobjdump()
    if shutil.which("nvcc") is None or tool is None:
        pytest.skip("no nvcc" if tool else "no cuobjdump")
    source, cubin = folder / f"{arch}.cu", folder / f"{arch}.cubin"
    kernel = (
        "template __global__ void body_kernel<{0}>(const __grid_constant__ typename {0}::Args);"
    )
    lines = ["#include <cuda/block/kernel.cuh>", "#include <cuda/block/warp_tile.h>"]
    lines += [f"#include <cuda/{file}_block.h>" for file in sorted(set(bodies.values()))]
    lines += ["namespace vtclip::cuda {", *map(kernel.format, bodies), "}"]
    source.write_text("\n".join(lines))
    includes = [f"-I{CSRC}", f"-isystem={Path(torch.__file__).parent}/include"]
    command = ["nvcc", "-cubin", f"-arch=sm_{arch}", "-O3", "-std=c++20", "-Xptxas", "-v"]
    command += ["-Werror", "all-warnings", *includes, "-o", str(cubin), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = re.split(r"Compiling entry function '(\w+)'", done.stdout + done.stderr)[1:]
    printed = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr
    sass = re.split(r"Function : (\w+)", printed.stdout)[1:]
    code = dict(zip(sass[::2], map(instructions, sass[1::2]), strict=True))
    found = {}
    for mangled, text in zip(report[::2], report[1::2], strict=True):
        names = {body: body.split("<")[0] for body in bodies}
        (body,) = (body for body, name in names.items() if f"{len(name)}{name}I" in mangled)
        spills = number(r"(\d+) bytes spill stores", text) + number(
            r"(\d+) bytes spill loads", text
        )
        found[body] = Code(number(r"Used (\d+) registers", text), spills, code[mangled])
    assert found.keys() == set(bodies)
    return found


@pytest.fixture(scope="session")
def compile_bodies(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Code]]:
    """compile_bodies({body: file}, arch): file X is csrc/cuda/X_block.h."""
    folder = tmp_path_factory.mktemp("cuda_code")
    return lambda bodies, arch: compiled(folder, bodies, arch)
