# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs, and why the others do not.

A backend answers `why_not(problem)` with reasons; no reasons means it can run. `impl=None` takes
the first backend without reasons; a named `impl` runs or raises. Only static facts are looked at
(device, dtype, sizes, what loaded), so the choice can be traced by `torch.compile`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch

from vtclip.backends import native, plain, triton

Impl = Literal["reference", "cpu", "cuda", "triton"]


class Problem(NamedTuple):
    """The static facts of one call. `width` is the head width d or the feature width."""

    op: str
    device: str
    dtype: torch.dtype
    width: int


class Backend(Protocol):
    """What `vtclip.backends.*` provide: reasons against running, and the op's functions."""

    def why_not(self, problem: Problem) -> tuple[str, ...]: ...

    def function(self, name: str) -> Any: ...


@dataclass(frozen=True)
class Named:
    """A backend under its public `impl` name."""

    name: Impl
    backend: Backend


# order of preference; device and dtype decide which of them can run
BACKENDS: tuple[Named, ...] = (
    Named("cpu", native.CPU),
    Named("triton", triton.TRITON),
    Named("cuda", native.CUDA),
    Named("reference", plain.REFERENCE),
)


def _against(named: Named, problem: Problem, *, asked_for: bool) -> tuple[str, ...]:
    if not asked_for and named.name == "triton" and problem.device == "cpu":
        # Triton's interpreter takes CPU tensors, a thousand times slower than anything else
        return (f"needs cuda tensors, got {problem.device}",)
    return named.backend.why_not(problem)


def select(problem: Problem, impl: Impl | None) -> Named:
    """The first backend that can run `problem`, or the named one.

    Raises ValueError for an unknown name and NotImplementedError, with every refusal, otherwise.
    """
    candidates = BACKENDS if impl is None else tuple(b for b in BACKENDS if b.name == impl)
    if not candidates:
        names = ", ".join(repr(b.name) for b in BACKENDS)
        raise ValueError(f"{problem.op}: impl must be None or one of {names}, got {impl!r}")
    refused = []
    for named in candidates:
        reasons = _against(named, problem, asked_for=impl is not None)
        if not reasons:
            return named
        refused.append(f"{named.name}: {', '.join(reasons)}")
    dtype = str(problem.dtype).removeprefix("torch.")
    raise NotImplementedError(
        f"{problem.op}: no implementation can run {dtype} of width {problem.width}"
        f" on {problem.device} ({'; '.join(refused)})"
    )


@contextmanager
def only_reference() -> Iterator[None]:
    """Within it `impl=None` takes the plain torch implementation, in every thread."""
    global BACKENDS
    before, BACKENDS = BACKENDS, BACKENDS[-1:]
    try:
        yield
    finally:
        BACKENDS = before


def explain(problem: Problem) -> list[tuple[str, tuple[str, ...]]]:
    """(impl name, reasons against it) for every backend, in order of preference."""
    return [(named.name, _against(named, problem, asked_for=False)) for named in BACKENDS]
