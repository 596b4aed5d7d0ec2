# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of `vtclip.kernels` as operators `vtclip::X_triton`; loaded on first use."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any, Literal

import torch

from vtclip.backends import native
from vtclip.backends.problem import ATTENTION, Problem, constant_when_traced
from vtclip.backends.schemas import FAKES
from vtclip.kernels import _limits


def interpreted() -> bool:
    """Whether Triton kernels run in the interpreter, on CPU tensors, for testing."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def load() -> str:
    """Imports Triton; the empty string, or the reason why it cannot be used."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    try:
        importlib.import_module("triton")
    except (ImportError, OSError, RuntimeError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        return f"triton failed to import: {first_line}"
    return ""


@constant_when_traced
def _missing() -> str:
    return load()


OLDEST_CAPABILITY = 80  # before it Triton multiplies without tensor cores, and spills registers


@constant_when_traced
def _outdated() -> str:
    """Why the CUDA library is the better choice on the current device, or the empty string."""
    if torch.version.hip is not None or not torch.cuda.is_available() or native.load_cuda():
        return ""
    _, capability = gpu_identity()
    if capability >= OLDEST_CAPABILITY:
        return ""
    oldest, found = (f"{number // 10}.{number % 10}" for number in (OLDEST_CAPABILITY, capability))
    return f"needs compute capability {oldest} where the CUDA library loads, got {found}"


class _Triton:
    name: Literal["triton"] = "triton"

    def why_not(self, problem: Problem) -> tuple[str, ...]:
        reasons = []
        if problem.device != "cuda" and not (problem.device == "cpu" and interpreted()):
            return (f"needs cuda tensors, got {problem.device}",)
        missing = _missing()
        if missing:
            reasons.append(missing)
        outdated = "" if interpreted() else _outdated()
        if outdated:
            reasons.append(outdated)
        limit = _limits.MAX_HEAD_WIDTH if problem.op in ATTENTION else _limits.MAX_WIDTH
        return (*reasons, *_limits.why_not(problem.dtype, problem.width, limit))

    def function(self, name: str) -> Callable[..., Any]:
        function: Callable[..., Any] = getattr(torch.ops.vtclip, f"{name}_triton")
        return function


def launcher_of(name: str) -> Callable[..., Any]:
    """The function of `vtclip.kernels` that launches X_fwd or X_bwd."""
    module = f"vtclip.kernels.{name.removesuffix('_fwd').removesuffix('_bwd')}"
    launcher: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return launcher


@functools.cache
def _load_launcher(name: str) -> Callable[..., Any]:
    """The launcher of that name; before the first one a table that VTCLIP_TUNED names is read."""
    _read_tuned()
    return launcher_of(name)


def gpu_identity() -> tuple[str, int]:
    """Name and compute capability (10 * major + minor) of the current CUDA device."""
    major, minor = torch.cuda.get_device_capability()
    return torch.cuda.get_device_name(), 10 * major + minor


@functools.cache
def _read_tuned() -> None:
    if not os.environ.get("VTCLIP_TUNED"):
        return
    on_gpu = torch.cuda.is_available() and not interpreted()
    importlib.import_module("vtclip.tune.table").activate(gpu_identity() if on_gpu else None)


def _launcher(name: str) -> Callable[..., Any]:
    def launch(*args: Any) -> Any:
        return _load_launcher(name)(*args)

    return launch


for _name in FAKES:
    torch.library.impl(f"vtclip::{_name}_triton", ("cuda", "cpu"), _launcher(_name))

TRITON = _Triton()
