# SPDX-License-Identifier: Apache-2.0
"""csrc/cuda/resources.csv: complete, without spills, and what nvcc says today."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

from vtclip.backends import native

FOLDER = Path(__file__).parents[2] / "csrc" / "cuda"
_spec = importlib.util.spec_from_file_location("resources", FOLDER / "resources.py")
resources = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(resources)

DTYPES = ("float", "Half", "BFloat16")
# kernel -> architectures on which it needs a few registers more than the 255 there are; the bytes
# are in the table
SPILLS: dict[str, tuple[str, ...]] = {"CrossAttnKeyGradient<Half, 256>": ("75",)}
MOST_SPILLED = 24  # bytes of a thread


@pytest.fixture(scope="module")
def table():
    return resources.read()


def test_every_kernel_of_every_architecture_is_in_the_table(table):
    rows = table[1]
    launched = {
        (source.name.removesuffix("_cuda.cu"), f"{body}<{dtype}>", arch)
        for source in resources.sources()
        for body in re.findall(r"launch<(\w+)<T>>", source.read_text())
        for dtype in DTYPES
        for arch in resources.ARCHES
    }
    assert launched
    assert launched <= {row[:3] for row in rows}
    names = {source.name.removesuffix("_cuda.cu") for source in resources.sources()}
    assert {row.file for row in rows} == names
    kernels = {row[:2] for row in rows}
    assert {row[:3] for row in rows} == {(*k, arch) for k in kernels for arch in resources.ARCHES}
    assert len({row[:3] for row in rows}) == len(rows)


def test_float64_is_left_to_the_reference(table):
    assert not [row.kernel for row in table[1] if "double" in row.kernel]


def test_no_other_kernel_spills(table):
    spilled = {(r.kernel, r.arch) for r in table[1] if r.spill_stores or r.spill_loads}
    assert spilled == {(kernel, arch) for kernel in SPILLS for arch in SPILLS[kernel]}
    assert all(max(row.spill_stores, row.spill_loads) <= MOST_SPILLED for row in table[1])


def test_registers_are_those_of_a_whole_block(table):
    assert all(0 < row.registers <= 255 for row in table[1])


def differences(rows, usage, arches) -> list[str]:
    """Kernels of those architectures of which the table says something else than a library."""
    table: dict[tuple[str, str], set] = {}
    for row in rows:
        found = table.setdefault((row.kernel, row.arch), set())
        found.add(resources.Usage(row.registers, row.stack))
    wanted = {key: found for key, found in table.items() if key[1] in arches}
    built = {key: found for key, found in usage.items() if key[1] in arches}
    return [
        f"{kernel} on sm_{arch}: table {wanted.get((kernel, arch))}, {built.get((kernel, arch))}"
        for kernel, arch in sorted(wanted.keys() | built.keys())
        if wanted.get((kernel, arch)) != built.get((kernel, arch))
    ]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_the_table_is_what_the_built_library_holds(table):
    """Every kernel, on each architecture compiled from PTX of its own."""
    version, rows = table
    library, reason = native.cuda_library(), ""
    if library is None:
        reason = "the CUDA library is not built"
    elif resources.nvcc_version() != version:
        reason = f"nvcc is {resources.nvcc_version()}, the table's {version}"
    elif resources.cuobjdump() is None:
        reason = "no cuobjdump"
    if reason:
        pytest.skip(reason)
    listed = native.build_info().get("arches", "").replace("8.0+PTX;9.0", "8.0")
    arches = {arch for arch in resources.ARCHES if f"{arch[:-1]}.{arch[-1]}" in listed}
    wrong = differences(rows, resources.of_library(library), arches)
    assert not wrong, f"run csrc/cuda/resources.py: {len(wrong)} kernels differ: {wrong[:5]}"


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt")
def test_a_library_that_differs_is_seen():
    report = """Fatbin elf code:
arch = sm_90
Resource usage:
 Common:
  GLOBAL:28
 Function _Z1fv:
  REG:72 STACK:8 SHARED:16 LOCAL:0 CONSTANT[0]:528 TEXTURE:0
Fatbin ptx code:
arch = sm_80"""
    usage = resources.parse_usage(report)
    assert usage == {("f", "90"): {(72, 8)}}
    row = resources.Row("x", "f", "90", 72, 16, 8, 0, 0)
    assert differences([row], usage, {"90"}) == []
    assert len(differences([row._replace(registers=73)], usage, {"90"})) == 1
    assert len(differences([], usage, {"90"})) == 1
    assert differences([row], {}, {"80"}) == []


@pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt")
def test_a_report_is_read():
    report = """ptxas info    : Compiling entry function '_Z1fv' for 'sm_90'
ptxas info    : Function properties for _Z1fv
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 64 bytes smem
ptxas info    : Compiling entry function '_Z1gv' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 7 registers"""
    assert resources.parse("x", "90", report) == [
        ("x", "f", "90", 40, 64, 8, 4, 12),
        ("x", "g", "90", 7, 0, 0, 0, 0),
    ]
