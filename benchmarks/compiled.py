# SPDX-License-Identifier: Apache-2.0
"""Triton's launches, compiled for an sm_90 that is not here and counted.

Launchers run on meta tensors with `JITFunction.run` replaced; what they would launch is specialised
and compiled as at run time by the compile test's own code, and disassembled.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import loops
import torch
from kernel_time import Kernel
from step_trace import Step, stored_bytes

ROOT = Path(__file__).parents[1]
TARGET = "sm_90"


@dataclass(frozen=True)
class Launch:
    """A kernel with its arguments, its grid and the options of its tile."""

    function: Any
    args: tuple[Any, ...]
    options: dict[str, Any]
    blocks: int

    @property
    def bytes(self) -> int:
        """Of every tensor once; a stand-in for an absent one is another argument too."""
        tensors = {id(x): x for x in (*self.args, *self.options.values()) if _is_tensor(x)}
        return sum(map(stored_bytes, tensors.values()))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


@cache
def _compile_test() -> ModuleType:
    """tests/kernels/_compile.py, a program that reads the package from its arguments."""
    path = ROOT / "tests" / "kernels" / "_compile.py"
    spec = importlib.util.spec_from_file_location("_compile", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    helpers = [str(ROOT / "tests" / "helpers"), *sys.path]
    with (
        mock.patch.object(sys, "argv", [str(path), "vtclip.kernels"]),
        mock.patch.object(sys, "path", helpers),
    ):
        spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def launching(steps: Callable[[], list[Step]]) -> Iterator[Callable[[str, tuple[Any, ...]], Any]]:
    """A function from an operator's name and arguments to its outputs that notes its launches."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET must be 0 or unset to compile, got 1")
    from triton.runtime.jit import JITFunction

    target = _compile_test().TARGETS[TARGET][1]
    configs = importlib.import_module("vtclip.kernels._configs")

    def run(self: Any, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> None:
        blocks = 1
        for size in grid:
            blocks *= size
        launch = Launch(self, args, options, blocks)
        steps().append(Step(self.__name__, None, launch.bytes, launch))

    def launched(name: str, args: tuple[Any, ...]) -> Any:
        launcher = name.removeprefix("vtclip::").removesuffix("_triton")
        module = launcher.removesuffix("_fwd").removesuffix("_bwd")
        return getattr(importlib.import_module(f"vtclip.kernels.{module}"), launcher)(*args)

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(configs, "target_of", return_value=target),
    ):
        yield launched


_DISASSEMBLED: dict[str, str] = {}


def _disassembled(compiled: Any) -> str:
    import triton

    if compiled.hash not in _DISASSEMBLED:
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder, "kernel.cubin")
            cubin.write_bytes(compiled.asm["cubin"])
            done = subprocess.run(
                [tools / "nvdisasm", "-c", cubin], capture_output=True, text=True, check=True
            )
        _DISASSEMBLED[compiled.hash] = done.stdout
    return _DISASSEMBLED[compiled.hash]


def _registers(cubin: bytes) -> int:
    """Of a thread, from the binary's attributes: EIATTR_REGCOUNT is (symbol, number)."""
    at = cubin.index(b"\x04\x2f\x08\x00")
    return int.from_bytes(cubin[at + 8 : at + 12], "little")


def kernel(launch: Launch) -> tuple[Kernel, list[str]]:
    """What a launch compiles to, and what of its loops had to be guessed."""
    import triton

    test = _compile_test()
    source = test.source(launch.function, launch.args, launch.options)
    names = ("num_warps", "num_stages", "enable_fp_fusion")
    options = {name: launch.options[name] for name in names if name in launch.options}
    compiled = triton.compile(source, target=test.TARGETS[TARGET][0], options=options)
    body = loops.of_sass(_disassembled(compiled))
    parameters = [parameter.name for parameter in launch.function.params]
    values = dict(zip(parameters, launch.args, strict=False)) | launch.options
    numbers = {name: int(v) for name, v in values.items() if isinstance(v, int)}
    guesses = loops.with_trips(body, loops.of_ttir(compiled.asm["ttir"], numbers))
    registers = _registers(compiled.asm["cubin"])
    metadata = compiled.metadata
    return Kernel(
        launch.function.__name__,
        body,
        metadata.num_warps,
        registers,
        metadata.shared,
        launch.blocks,
        launch.bytes,
    ), guesses
