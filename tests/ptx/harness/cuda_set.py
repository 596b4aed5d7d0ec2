# SPDX-License-Identifier: Apache-2.0
"""The CUDA library's own host code on tensors of the CPU, its kernels by the executor."""

from __future__ import annotations

import ctypes
import importlib
import re
from collections.abc import Callable
from typing import Any

import torch

from harness import build
from harness.host import Recorder, entries

# shared memory a block may ask for, by architecture
SHARED = {"sm_75": 64 * 1024, "sm_80": 163 * 1024, "sm_90": 227 * 1024}
CALLBACK = ctypes.CFUNCTYPE(
    None,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_uint),
    ctypes.c_uint64,
    ctypes.POINTER(ctypes.c_void_p),
)


def short(entry: str) -> str:
    """A body's name and template arguments out of a mangled entry."""
    inner = re.sub(r"^_ZN6vtclip4cuda\d+body_kernelI|EvNT_4ArgsE$", "", entry)
    for mangled, plain in (
        ("N5torch10headeronly4HalfE", "half "),
        ("N5torch10headeronly8BFloat16E", "bfloat16 "),
        ("N3c104HalfE", "half "),
        ("N3c108BFloat16E", "bfloat16 "),
    ):
        inner = inner.replace(mangled, plain)
    inner = re.sub(r"NS0_(?:\d+_GLOBAL__N_[\w]*?)?\d+([A-Z][A-Za-z]+)", r"\1 ", inner)
    inner = inner.replace("If", "float ").replace("Li", " ").replace("Lb", " ").replace("I", "")
    return re.sub(r"\s+", " ", inner.replace("E", " ")).strip() or entry


class CudaSet:
    """What `ops` calls in place of the cuda backend."""

    name = "cuda"

    def __init__(self, recorder: Recorder, arch: str) -> None:
        importlib.import_module("vtclip.backends.schemas")
        self.recorder = recorder
        self.library = build.library(arch)
        self._modules: dict[str, str] = {}
        for text in build.modules(self.library.ptx.read_text()):
            self._modules |= entries(text)
        torch.ops.load_library(str(self.library.path))
        host = recorder.standin.library
        host.standin_device(int(arch.removeprefix("sm_")), SHARED[arch])
        self._callback = CALLBACK(self._launched)  # kept alive as long as the library may call it
        host.standin_on_launch(self._callback)
        self._key = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

    def kernels(self) -> list[str]:
        """Every kernel there is."""
        return sorted(self._modules)

    def text(self, key: str) -> str:
        """The PTX of a kernel."""
        return self._modules[key]

    def why_not(self, problem: Any) -> tuple[str, ...]:
        return ()

    def function(self, name: str) -> Callable[..., Any]:
        """The operator as it runs for tensors of a GPU."""
        operator = getattr(torch.ops.vtclip, name).default
        host = self.recorder.standin.library

        def call(*args: Any) -> Any:
            with self.recorder.call():
                host.standin_cuda(1)
                try:
                    return operator.redispatch(self._key, *args)
                finally:
                    host.standin_cuda(0)

        return call

    def _launched(self, entry: bytes, sizes: Any, shared: int, arguments: Any) -> None:
        try:
            name = entry.decode()
            kernel = self.recorder.kernel(name, name, self._modules[name])
            packed = bytearray(kernel.parameter_bytes)
            for i, parameter in enumerate(kernel.parameters):
                value = ctypes.string_at(arguments[i], parameter.size)
                packed[parameter.offset : parameter.offset + parameter.size] = value
            grid, block = tuple(sizes[:3]), tuple(sizes[3:6])
            self.recorder.execute(name, kernel, grid, block, bytes(packed), int(shared))
        except BaseException as error:
            self.recorder.error = self.recorder.error or error
