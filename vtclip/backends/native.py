# SPDX-License-Identifier: Apache-2.0
"""The compiled extension: `vtclip._C` (CPU kernels) and the CUDA library next to it."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from vtclip.backends.problem import ATTENTION, Problem, constant_when_traced
from vtclip.kernels._limits import DTYPES, MAX_HEAD_WIDTH


@functools.cache
def load_cpu() -> str:
    """Loads `vtclip._C`; the empty string, or the reason why it could not be loaded."""
    if importlib.util.find_spec("vtclip._C") is None:
        return "the extension vtclip._C is not built (install with a C++ compiler)"
    try:
        importlib.import_module("vtclip.backends.schemas")  # schemas come before implementations
        importlib.import_module("vtclip._C")
    except (ImportError, OSError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"vtclip._C failed to load with torch {torch.__version__}: {first_line}"
    return ""


def cuda_library() -> Path | None:
    """The CUDA library's file, if it was built."""
    return min(Path(__file__).parents[1].glob("_C_cuda*.so"), default=None)


@functools.cache
def load_cuda() -> str:
    """Loads the CUDA library; the empty string, or the reason why it could not be loaded."""
    path = cuda_library()
    if path is None:
        return "the CUDA library is not built (no CUDA toolkit was found, or VTCLIP_EXT forbade it)"
    if torch.version.cuda is None:
        return f"{path.name} needs a CUDA build of torch, this is {torch.__version__}"
    try:
        importlib.import_module("vtclip.backends.schemas")  # schemas come before implementations
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"{path.name} failed to load with torch {torch.__version__}: {error}"
    return ""


def build_info() -> dict[str, str]:
    """What `setup.py` decided and why, as compiled into the extension; empty without it."""
    if load_cpu():
        return {}
    return dict(importlib.import_module("vtclip._C").build_info())


def _runs(arches: str, capability: tuple[int, int]) -> bool:
    """Whether code for `arches`, as in TORCH_CUDA_ARCH_LIST, runs on a GPU of `capability`."""
    for major, minor, ptx in re.findall(r"(\d+)\.(\d+)[af]?(\+PTX)?", arches):
        own = (int(major), int(minor))
        if own <= capability and (ptx or own[0] == capability[0]):
            return True
    return not arches[:1].isdigit()  # names of architectures are not read


def _no_code() -> str:
    """Why the CUDA library has nothing for the current GPU, or the empty string."""
    return _no_code_for(torch.cuda.current_device()) if torch.cuda.is_available() else ""


@functools.cache
def _no_code_for(device: int) -> str:
    """Of one GPU; a machine may have several kinds."""
    arches = build_info().get("arches", "")
    major, minor = torch.cuda.get_device_capability(device)
    if _runs(arches, (major, minor)):
        return ""
    return f"was compiled for {arches}, this GPU is {major}.{minor} (TORCH_CUDA_ARCH_LIST)"


@functools.cache
def _has_kernel(op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"vtclip::{op}_fwd", key)


@constant_when_traced
def _missing(op: str, key: str) -> str:
    """Why `op` cannot run on dispatch key `key`, or the empty string."""
    reason = load_cpu() if key == "CPU" else load_cuda() or _no_code()
    if reason:
        return reason
    if not _has_kernel(op, key):
        return f"{op} has no {key} kernel in this build"
    return ""


class _Native:
    def __init__(self, name: Literal["cpu", "cuda"], dtypes: tuple[torch.dtype, ...]) -> None:
        self.name = name  # and the type of its tensors' device
        self.dispatch_key = name.upper()
        self.dtypes = dtypes

    def why_not(self, problem: Problem) -> tuple[str, ...]:
        if problem.device != self.name:
            return (f"needs {self.name} tensors, got {problem.device}",)
        reasons = []
        missing = _missing(problem.op, self.dispatch_key)
        if missing:
            reasons.append(missing)
        if problem.dtype not in self.dtypes:
            reasons.append(f"has no {str(problem.dtype).removeprefix('torch.')} kernel")
        if problem.op in ATTENTION and problem.width > MAX_HEAD_WIDTH:
            reasons.append(f"head width {problem.width} is above {MAX_HEAD_WIDTH}")
        return tuple(reasons)

    def function(self, name: str) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(torch.ops.vtclip, name)
        return function


CPU = _Native("cpu", (*DTYPES, torch.float64))
# on GPUs float64 is the reference's: a third of the library's code, for checks of gradients
CUDA = _Native("cuda", DTYPES)
