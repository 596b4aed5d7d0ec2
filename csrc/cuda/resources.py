# SPDX-License-Identifier: Apache-2.0
"""Registers, shared memory and spills of every CUDA kernel, as ptxas reports them.

    python csrc/cuda/resources.py        # compiles all *_cuda.cu, writes resources.csv next to this
    python csrc/cuda/resources.py cross_attn rational_head     # these alone; the other rows stay

Needs nvcc and torch's headers. Shared memory is the static part: a block's own is dynamic and
counted by `shared_bytes`.
"""

from __future__ import annotations

import csv
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
TABLE = HERE / "resources.csv"
# 86 and 89 run what is compiled for 80
ARCHES = ("75", "80", "90", "100", "120")
TARGET_VERSION = "0x020b000000000000"  # as in setup.py


class Row(NamedTuple):
    """One kernel of one file on one architecture; bytes but for the registers."""

    file: str
    kernel: str
    arch: str
    registers: int
    shared: int
    stack: int
    spill_stores: int
    spill_loads: int


def nvcc_version() -> str:
    done = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True)
    found = re.search(r"V(\d+\.\d+\.\d+)", done.stdout)
    return found[1] if found else "unknown"


@functools.cache
def readable(mangled: str) -> str:
    """RationalForward<float> for body_kernel<vtclip::cuda::RationalForward<float>>(...)."""
    done = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True)
    name = re.sub(r"\(anonymous namespace\)::", "", done.stdout.strip())
    body = re.search(r"body_kernel<(.*?)\s*>\(", name)
    name = body[1] if body else name.split("(")[0].removeprefix("void ")
    return re.sub(r"(?:vtclip::cuda::|torch::headeronly::|c10::)", "", name)


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found[1]) if found else 0


def parse(file: str, arch: str, report: str) -> list[Row]:
    """The kernels in the output of nvcc -Xptxas -v."""
    parts = re.split(r"Compiling entry function '(\w+)'[^\n]*", report)[1:]
    rows = []
    for mangled, text in zip(parts[::2], parts[1::2], strict=True):
        numbers = (
            number(r"Used (\d+) registers", text),
            number(r"(\d+) bytes smem", text),
            number(r"(\d+) bytes stack frame", text),
            number(r"(\d+) bytes spill stores", text),
            number(r"(\d+) bytes spill loads", text),
        )
        rows.append(Row(file, readable(mangled), arch, *numbers))
    return rows


class Usage(NamedTuple):
    """What a library says of one kernel. It keeps no count of spills, and counts 1 KiB of the
    driver's as shared from sm_90 on."""

    registers: int
    stack: int


def of_library(library: Path) -> dict[tuple[str, str], set[Usage]]:
    """(kernel, arch) -> what the code in a compiled library takes."""
    command = [str(cuobjdump()), "-res-usage", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return parse_usage(done.stdout)


def cuobjdump() -> Path | None:
    """The tool that reads libraries; Triton brings one."""
    found, triton = shutil.which("cuobjdump"), importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(path) if path.is_file() else None
    return Path(found) if found else None


def parse_usage(report: str) -> dict[tuple[str, str], set[Usage]]:
    """The kernels in the output of cuobjdump -res-usage; several files may hold the same one."""
    found: dict[tuple[str, str], set[Usage]] = {}
    for part in re.split(r"^arch = sm_", report, flags=re.MULTILINE)[1:]:
        arch = part.split()[0]
        for mangled, text in re.findall(r"Function (\w+):\s+(.+)", part):
            usage = Usage(number(r"REG:(\d+)", text), number(r"STACK:(\d+)", text))
            found.setdefault((readable(mangled), arch), set()).add(usage)
    return found


def compiled(source: Path, arch: str) -> list[Row]:
    """Device code of one file for one architecture; a warning is an error."""
    import torch

    headers = Path(torch.__file__).parent / "include"
    includes = [f"-I{HERE.parent}", f"-isystem={headers}"]
    includes.append(f"-isystem={headers / 'torch/csrc/api/include'}")
    defines = [f"-DTORCH_TARGET_VERSION={TARGET_VERSION}", "-DUSE_CUDA=1"]
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-cubin", f"-arch=sm_{arch}", "-O3", "-std=c++20", "-Xptxas", "-v"]
        command += ["-Werror", "all-warnings", *defines, *includes]
        command += ["-o", f"{folder}/out.cubin", str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{source.name} does not compile for sm_{arch}: {done.stderr}")
    return parse(source.name.removesuffix("_cuda.cu"), arch, done.stdout + done.stderr)


def sources() -> list[Path]:
    return sorted(HERE.glob("*_cuda.cu"))


def read() -> tuple[str, list[Row]]:
    """(version of nvcc, rows) of the table."""
    head, *lines = TABLE.read_text().splitlines()
    table = [Row(*r[:3], *map(int, r[3:])) for r in list(csv.reader(lines))[1:]]
    return head.removeprefix("# nvcc "), table


def main(names: list[str]) -> None:
    files = {source.name.removesuffix("_cuda.cu"): source for source in sources()}
    unknown = sorted(set(names) - set(files))
    if unknown:
        raise SystemExit(f"resources.py: no {unknown[0]}_cuda.cu; there are {', '.join(files)}")
    names = names or list(files)
    version, kept = read() if len(names) < len(files) else (nvcc_version(), [])
    if version != nvcc_version():
        raise SystemExit(
            f"resources.py: the other rows are of nvcc {version}, not {nvcc_version()}"
        )
    jobs = [(files[name], arch) for name in names for arch in ARCHES]
    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        found = [row for rows in pool.map(lambda job: compiled(*job), jobs) for row in rows]
    found += [row for row in kept if row.file not in names]
    order = sorted(found, key=lambda row: (row.file, row.kernel, int(row.arch)))
    with TABLE.open("w", newline="") as file:
        file.write(f"# nvcc {nvcc_version()}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        writer.writerows(order)
    spills = [row for row in order if row.spill_stores or row.spill_loads]
    sys.stderr.write(f"{len(order)} rows, {len(spills)} with spills {spills or ''}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
