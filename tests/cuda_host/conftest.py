# SPDX-License-Identifier: Apache-2.0
"""Programs around the block code of csrc/cuda, compiled for the host with ASan and UBSan.

A program reads ints, numbers and tensors and writes tensors (host.h has the other side). What runs
is the code a block runs on a GPU: loops, masks, reductions, all threads and warps in turn. What
does not: the launch, the shuffles, and the instructions of the tensor cores.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from layouts import LAYOUTS
from torch import Tensor
from wire import DTYPES, doubles, ints_of, packed, raw, unpacked

ROOT = Path(__file__).parents[2]


class Program(NamedTuple):
    """A compiled program; called, it returns what it wrote."""

    path: Path

    def once(
        self,
        tensors: Sequence[Tensor | None],
        ints: Sequence[int] = (),
        numbers: Sequence[float] = (),
        backwards: bool = False,
    ) -> list[Tensor]:
        fed = ints_of(backwards, *ints) + doubles(*numbers)
        fed += len(tensors).to_bytes(8, "little") + b"".join(map(packed, tensors))
        done = subprocess.run([self.path], input=fed, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        return unpacked(done.stdout)

    def __call__(
        self,
        tensors: Sequence[Tensor | None],
        ints: Sequence[int] = (),
        numbers: Sequence[float] = (),
    ) -> list[Tensor]:
        """Runs all shares of a phase forwards, then backwards: the results must not differ."""
        forwards = self.once(tensors, ints, numbers)
        backwards = self.once(tensors, ints, numbers, backwards=True)
        for one, other in zip(forwards, backwards, strict=True):
            assert raw(one) == raw(other), "shares of a phase depend on each other"
        return forwards


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Program]:
    """build("X") compiles X_host.cpp, once."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("cuda_host")
    csrc = ROOT / "csrc"
    flags = ["-std=c++20", "-O1", "-g1", "-Wall", "-Wextra", "-Werror", "-D_GLIBCXX_ASSERTIONS"]
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    include = [f"-I{csrc}", f"-isystem{Path(torch.__file__).parent}/include"]

    def compiled(name: str) -> Program:
        out = folder / name
        if not out.is_file():
            source = Path(__file__).parent / f"{name}_host.cpp"
            command = [compiler, *flags, *sanitize, *include, str(source), "-o", str(out)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        return Program(out)

    return compiled


@pytest.fixture(scope="module")
def program(request: pytest.FixtureRequest, build: Callable[[str], Program]) -> Program:
    """The program of the file that asks for it."""
    return build(request.module.__name__.rpartition("test_")[2])


@pytest.fixture(params=DTYPES[:4], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Every dtype of the kernels."""
    return request.param


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Callable[[Tensor], Tensor]:
    """Returns a tensor with the same values in other memory; the last repeats the first row."""
    return LAYOUTS[request.param]
