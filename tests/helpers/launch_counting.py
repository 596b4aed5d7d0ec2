# SPDX-License-Identifier: Apache-2.0
"""Counts GPU kernels of a call on a machine without a GPU.

Triton launches are noted and not carried out, nor are matrix products, whose results are zeros;
launchers see an sm_90. Of torch's own operators each counts as one kernel, but views and
allocations.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from vtclip.backends.triton import TRITON
from vtclip.kernels import _configs
from vtclip.ops import _select

SM_90 = _configs.Target("cuda", 90, 227 * 1024)
# allocate, or only say how memory is to be seen
FREE = {
    "aten::empty.memory_format",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::detach",
    "aten::_unsafe_view",
    "aten::resolve_neg",
    "aten::promote_types",
}
# noted, not carried out: at full size they take minutes on a CPU without bfloat16
PRODUCTS = {"aten::mm", "aten::bmm", "aten::addmm", "aten::baddbmm", "aten::_addmm_activation"}
# wait for the device, or copy from it: neither may happen in a captured graph
SYNCHRONISING = {
    "aten::_local_scalar_dense",
    "aten::equal",
    "aten::is_nonzero",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_dim",
    "aten::_unique2",
}
ON_THE_HOST = ("cpu", "numpy", "tolist", "__array__")


class Synchronises(AssertionError):
    """An operator, or a method of a tensor, that waits for the device."""


@contextlib.contextmanager
def triton_only() -> Iterator[None]:
    """`impl=None` takes Triton's kernels, on CPU tensors too."""

    def against(backend: Any, problem: Any, *, asked_for: bool) -> tuple[str, ...]:
        return TRITON.why_not(problem) if backend.name == "triton" else ("not asked for",)

    with mock.patch.object(_select, "_against", against):
        yield


class Counting(TorchDispatchMode):
    """`names`: kernels in the order of their launches. Raises where the device is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        by_mask = name in ("aten::index", "aten::index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in SYNCHRONISING or by_mask:  # a mask's size is known to the device alone
            raise Synchronises(name)
        if name.startswith("vtclip::"):
            launcher = name.removeprefix("vtclip::").removesuffix("_triton")
            module = launcher.removesuffix("_fwd").removesuffix("_bwd")
            with self:
                return getattr(importlib.import_module(f"vtclip.kernels.{module}"), launcher)(*args)
        full = f"{name}.{func._overloadname}" if func._overloadname != "default" else name
        if not (func.is_view or full in FREE):
            self.names.append(name.removeprefix("aten::"))
        if full in PRODUCTS:
            shapes = (x.to("meta") if isinstance(x, torch.Tensor) else x for x in args)
            like = func(*shapes, **(kwargs or {}))
            return torch.zeros(like.shape, dtype=like.dtype)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counting() -> Iterator[list[str]]:
    """The names of all kernels that would be launched within it."""
    mode = Counting()

    def note(executor: Any, *args: Any, **kwargs: Any) -> None:
        mode.names.append(executor.fn.__name__)

    def refuse(name: str) -> Any:
        def call(*_: Any, **__: Any) -> None:
            raise Synchronises(name)

        return call

    with (
        mock.patch.multiple(torch.Tensor, **{name: refuse(name) for name in ON_THE_HOST}),
        mock.patch.object(torch.cuda, "synchronize", refuse("synchronize")),
        triton_only(),
        mock.patch.object(GridExecutor, "__call__", note),
        mock.patch.object(_configs, "target_of", return_value=SM_90),
        mode,
    ):
        yield mode.names
