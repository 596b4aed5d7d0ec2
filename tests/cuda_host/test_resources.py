# SPDX-License-Identifier: Apache-2.0
"""csrc/cuda/resources.csv: complete, without spills, and what nvcc says today."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "csrc" / "cuda"
_spec = importlib.util.spec_from_file_location("resources", FOLDER / "resources.py")
resources = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(resources)

DTYPES = ("float", "Half", "BFloat16")
# kernel -> architectures on which it needs a few registers more than the 255 there are; the bytes
# are in the table, at most 328. Other tiles were not tried.
SPILLS: dict[str, tuple[str, ...]] = {
    "CrossAttnForward<BFloat16, 128>": ("75",),
    "CrossAttnForward<BFloat16, 256>": ("75",),
    "CrossAttnForward<Half, 256>": ("75",),
    "CrossAttnForward<float, 128>": ("75",),
    "CrossAttnForward<float, 256>": ("75", "80"),
    "CrossAttnKeyGradient<BFloat16, 128>": ("75",),
    "CrossAttnKeyGradient<BFloat16, 256>": ("75",),
    "CrossAttnQueryGradient<BFloat16, 128>": ("75",),
    "FfnGradient<BFloat16>": ("100", "120"),
    "FfnGradient<Half>": ("100", "120"),
    "FfnGradient<float>": ("120",),
    "NormGradient<BFloat16>": ("100", "120"),
    "NormGradient<Half>": ("100", "120"),
    "RationalKeys<BFloat16, 128>": ("80",),
    "RationalKeys<Half, 128>": ("75", "80"),
    "RationalOne<BFloat16, 128>": ("75",),
    "RationalOne<Half, 128>": ("75",),
    "RationalRows<Half, 128>": ("75",),
    "UnitGradient<BFloat16>": ("120",),
    "UnitGradient<Half>": ("120",),
}


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
    assert all(max(row.spill_stores, row.spill_loads) <= 328 for row in table[1])


def test_registers_are_those_of_a_whole_block(table):
    assert all(0 < row.registers <= 255 for row in table[1])


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_the_table_is_what_nvcc_reports(table):
    version, rows = table
    file, arch = "cosine_logits", "90"
    fresh = resources.compiled(FOLDER / f"{file}_cuda.cu", arch)
    recorded = [row for row in rows if (row.file, row.arch) == (file, arch)]
    if resources.nvcc_version() == version:
        assert sorted(fresh) == sorted(recorded)
    else:
        assert all(row.spill_stores == row.spill_loads == 0 for row in fresh)


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
