# SPDX-License-Identifier: Apache-2.0
"""What a step launches on a GPU, noted on meta tensors: no GPU, no memory, no value.

    with tracing() as trace:
        head(image, spatial)        # on device "meta"
    trace.steps

Every operator of torch but views and allocations is one step: a matrix product with its sizes, or
a pass over memory with the bytes it reads and writes. vtclip's own operators take Triton's kernels,
as on an sm_90; they are one step each, or with `launched`, which runs the launchers, one for each
kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vtclip.ops import _select

# allocate, or only say how memory is to be seen
FREE = {
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::detach",
    "aten::_unsafe_view",
}
FILLS = {"ones_like", "zeros_like", "full_like", "new_zeros", "zeros", "fill_", "zero_"}
PRODUCTS = {
    *("aten::mm", "aten::addmm", "aten::addmm_", "aten::_addmm_activation"),
    *("aten::bmm", "aten::baddbmm", "aten::baddbmm_", "aten::mv", "aten::addmv", "aten::dot"),
}


@dataclass(frozen=True)
class Step:
    """One kernel: a product [batch, m, k] x [batch, k, n], or a pass over memory, or both."""

    name: str
    product: tuple[int, int, int, int] | None  # batch, m, n, k
    bytes: int  # of a product only what is copied before it
    launch: Any = None

    @property
    def own(self) -> bool:
        """Whether it is a kernel, or an operator, of vtclip."""
        return self.name.startswith("vtclip::") or self.launch is not None


def stored_bytes(tensor: Tensor) -> int:
    """Memory behind a tensor: what is repeated by a stride of 0 counts once."""
    sizes = (n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not n)
    return prod(sizes) * tensor.element_size()


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, tuple | list):
        return [tensor for value in values for tensor in _tensors(value)]
    return []


def _traffic(args: Any, kwargs: Any, out: Any) -> int:
    read = {id(tensor): tensor for tensor in _tensors([*args, *kwargs.values()])}
    written = _tensors(out)
    return sum(map(stored_bytes, read.values())) + sum(map(stored_bytes, written))


def _product(name: str, args: Any, out: Tensor) -> Step:
    start, (left, right) = None, args[-2:]
    if len(args) == 3:
        start, left, right = args
    batch = left.shape[0] if left.dim() == 3 else 1
    columns = right.shape[-1] if right.dim() > 1 else 1
    rows = left.shape[-2] if left.dim() > 1 else 1
    # cuBLAS adds one row of biases as it leaves; anything else is copied into the result first
    copied = start is not None and start.dim() > 1 and not name.endswith("_")
    traffic = stored_bytes(start) + stored_bytes(out) if copied else 0
    return Step(name, (batch, rows, columns, left.shape[-1]), traffic)


class Trace(TorchDispatchMode):
    """`steps` in the order of their launches."""

    def __init__(self, launched: Callable[[str, tuple[Any, ...]], Any] | None = None) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.allocated = 0  # bytes, by operators of vtclip too
        self.launched = launched

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name.startswith("vtclip::") and self.launched is not None:
            with self:
                return self.launched(name, args)
        out = func(*args, **kwargs)
        if func.is_view or name in FREE:
            self.allocated += stored_bytes(out) if "empty" in name else 0
            return out
        short = name.removeprefix("aten::")
        if name in PRODUCTS:
            self.steps.append(_product(short, args[:3], out))
        elif short in FILLS:
            self.steps.append(Step(short, None, stored_bytes(out)))
        else:
            self.steps.append(Step(short, None, _traffic(args, kwargs, out)))
        return out


@contextlib.contextmanager
def triton_only() -> Iterator[None]:
    """Operators take Triton's kernels on every device."""

    def against(backend: Any, problem: Any, *, asked_for: bool) -> tuple[str, ...]:
        return () if backend.name == "triton" else ("not asked for",)

    with mock.patch.object(_select, "_against", against):
        yield


@contextlib.contextmanager
def tracing(launched: Callable[[str, tuple[Any, ...]], Any] | None = None) -> Iterator[Trace]:
    """The trace of everything within it."""
    mode = Trace(launched)
    autocast = mock.patch.object(torch, "is_autocast_enabled", return_value=False)  # refuses meta
    with triton_only(), autocast, mode:
        yield mode
