# SPDX-License-Identifier: Apache-2.0
"""Programs around the block code of csrc/cuda, compiled for the host with ASan and UBSan.

A program reads ints, numbers and tensors and writes tensors (host.h has the other side). What runs
is the code a block runs on a GPU: loops, masks, reductions, all threads and warps in turn. What
does not: the launch, the shuffles, and the instructions of the tensor cores.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from layouts import LAYOUTS
from torch import Tensor

ROOT = Path(__file__).parents[2]
CODES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.int64)


def _ints(*values: int) -> bytes:
    return struct.pack(f"<q{len(values)}q", len(values), *values)


def _raw(tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _packed(tensor: Tensor | None) -> bytes:
    if tensor is None:
        return _ints()
    tensor = tensor.detach()
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    span = last + 1 if tensor.numel() else 0
    offset = tensor.data_ptr() % 16 // tensor.element_size()
    memory = tensor.as_strided((span,), (1,))
    head = _ints(CODES.index(tensor.dtype), span, offset)
    return head + _ints(*tensor.shape) + _ints(*tensor.stride()) + _raw(memory)


def _unpacked(data: bytes) -> list[Tensor]:
    tensors, at = [], 0
    while at < len(data):
        code, rank = struct.unpack_from("<2q", data, at)
        shape = struct.unpack_from(f"<{rank}q", data, at + 16)
        at += 16 + 8 * rank
        empty = torch.empty(shape, dtype=CODES[code])
        size = empty.numel() * empty.element_size()
        if size:
            flat = torch.frombuffer(bytearray(data[at : at + size]), dtype=CODES[code])
            empty = flat.view(shape)
        tensors.append(empty)
        at += size
    return tensors


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
        fed = _ints(backwards, *ints) + struct.pack(f"<q{len(numbers)}d", len(numbers), *numbers)
        fed += struct.pack("<q", len(tensors)) + b"".join(map(_packed, tensors))
        done = subprocess.run([self.path], input=fed, capture_output=True)
        assert done.returncode == 0, done.stderr.decode()
        return _unpacked(done.stdout)

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
            assert _raw(one) == _raw(other), "shares of a phase depend on each other"
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


@pytest.fixture(params=CODES[:4], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Every dtype of the kernels."""
    return request.param


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Callable[[Tensor], Tensor]:
    """Returns a tensor with the same values in other memory; the last repeats the first row."""
    return LAYOUTS[request.param]
