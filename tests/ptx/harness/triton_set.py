# SPDX-License-Identifier: Apache-2.0
"""Triton's own runtime for a GPU that is not there, its kernels by the executor.

Launchers, grids, specialisation and compilation are those of a launch on the device: the driver is
replaced, which would name the device, load the code and launch it, and the last stage of the
compiler, ptxas, by the PTX that goes into it.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import struct
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from harness import build
from harness.host import Recorder

SHARED = {80: 163 * 1024, 90: 227 * 1024}
FORMATS = {"fp32": "<f", "fp64": "<d", "i1": "<b", "u1": "<b"}


class Code(NamedTuple):
    """A compiled kernel as the driver holds it."""

    key: str
    kernel: Any
    shared: int


class Driver:
    """What `triton.runtime` asks of a CUDA driver."""

    def __init__(self, recorder: Recorder, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.recorder, self.texts = recorder, {}
        self.target = GPUTarget("cuda", capability, 32)
        properties = {"max_shared_mem": SHARED[capability], "multiprocessor_count": 132}
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: properties,
            load_binary=self._load,
            unload_module=lambda module: None,
        )

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.target.arch, 10)

    def _load(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        text = binary.decode()
        key = f"{name} {hashlib.sha256(binary).hexdigest()[:8]}"
        self.texts[key] = text
        return object(), Code(key, self.recorder.kernel(key, name, text), shared), 0, 0, 1024

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """The function that packs the arguments of one compiled kernel and runs it."""
        types = list(source.signature.values())
        block = (32 * metadata.num_warps, 1, 1)
        if metadata.global_scratch_size or metadata.profile_scratch_size:
            raise NotImplementedError(f"{metadata.name} wants scratch memory of the driver")

        def run(x: int, y: int, z: int, stream: Any, code: Code, *rest: Any) -> None:
            arguments = rest[-len(types) :]  # behind metadata and hooks
            passed = [(t, v) for t, v in zip(types, arguments, strict=True) if t != "constexpr"]
            # compiled anew where a mutant is tried
            kernel = code.kernel
            if self.recorder.edit is not None:
                kernel = self.recorder.kernel(code.key, kernel.name, self.texts[code.key])
            packed = bytearray(kernel.parameter_bytes)  # null: scratch memory that is not used
            for parameter, (kind, value) in zip(kernel.parameters, passed, strict=False):
                data = _packed(kind, value, parameter.size)
                packed[parameter.offset : parameter.offset + parameter.size] = data
            grid = (x, y, z)
            self.recorder.execute(code.key, kernel, grid, block, bytes(packed), code.shared)

        return run


def _packed(kind: str, value: Any, size: int) -> bytes:
    if kind.startswith("*"):
        return struct.pack("<Q", value.data_ptr())
    if kind in FORMATS:
        return struct.pack(FORMATS[kind], value)
    if kind[0] not in "iu":
        raise NotImplementedError(f"arguments of type {kind}")
    return int(value).to_bytes(size, "little", signed=kind[0] == "i")


class TritonSet:
    """What `ops` calls in place of the triton backend."""

    name = "triton"

    def __init__(self, recorder: Recorder, arch: str) -> None:
        os.environ["TRITON_INTERPRET"] = "0"
        os.environ["TRITON_CACHE_DIR"] = str(
            build.folder() / "triton"
        )  # what lies there is no cubin
        from triton.backends.nvidia.compiler import CUDABackend
        from triton.runtime import driver
        from triton.runtime.jit import JITFunction

        capability = int(arch.removeprefix("sm_"))
        self.recorder, self.driver = recorder, Driver(recorder, capability)
        driver.set_active(self.driver)
        CUDABackend.make_cubin = lambda backend, text, *rest: text.encode()
        configs = importlib.import_module("vtclip.kernels._configs")
        target = configs.Target("cuda", capability, SHARED[capability])
        configs.target_of = lambda tensor: target
        self._launcher_of = importlib.import_module("vtclip.backends.triton").launcher_of
        files = (build.ROOT / "kernels").glob("[a-z]*.py")
        modules = [importlib.import_module(f"vtclip.kernels.{file.stem}") for file in files]
        modules.append(importlib.import_module("vtclip.kernels._math"))
        self._kernels = {
            name
            for module in modules
            for name, value in vars(module).items()
            if isinstance(value, JITFunction) and name.endswith("_kernel")
        }

    def kernels(self) -> list[str]:
        """Every kernel there is."""
        return sorted(self._kernels)

    def text(self, key: str) -> str:
        """The PTX of a compiled kernel."""
        return self.driver.texts[key]

    def why_not(self, problem: Any) -> tuple[str, ...]:
        return ()

    def function(self, name: str) -> Callable[..., Any]:
        """The launchers of an operator."""
        launcher = self._launcher_of(name)

        def call(*args: Any) -> Any:
            with self.recorder.call(), torch.no_grad():
                return launcher(*args)

        return call
