# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs, and why the others do not.

A backend's `why_not(problem)` returns reasons; no reasons means that it can run. `impl=None` takes
the first backend without reasons; a named `impl` runs or raises. Only static facts are looked at
(device, dtype, sizes, what loaded, what `vtclip selftest` found wrong here), so the choice can be
traced by `torch.compile`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

from vtclip.backends import native, record, triton
from vtclip.backends.problem import Backend, Impl, Problem, constant_when_traced

__all__ = ["BACKENDS", "Backend", "Impl", "Problem", "explain", "only_reference", "select"]


class _Reference:
    """Plain torch, which the operators call themselves: every device and dtype."""

    name: Literal["reference"] = "reference"

    def why_not(self, problem: Problem) -> tuple[str, ...]:
        return ()

    def function(self, name: str) -> Callable[..., Any]:
        raise AttributeError(f"the reference of {name} is called directly")


REFERENCE = _Reference()
# order of preference; device and dtype decide which of them can run
BACKENDS: tuple[Backend, ...] = (native.CPU, triton.TRITON, native.CUDA, REFERENCE)

_ONLY_REFERENCE = ContextVar("vtclip_only_reference", default=False)


@constant_when_traced
def _is_only_reference() -> bool:
    return _ONLY_REFERENCE.get()


def _against(backend: Backend, problem: Problem, *, asked_for: bool) -> tuple[str, ...]:
    if problem.needs and backend.name != "reference":
        return (f"takes no {problem.needs}",)
    if not asked_for and backend.name == "triton" and problem.device == "cpu":
        # Triton's interpreter takes CPU tensors, a thousand times slower than anything else
        return (f"needs cuda tensors, got {problem.device}",)
    reasons = backend.why_not(problem)
    if reasons:
        return reasons
    failed = record.why_failed(problem.op, backend.name, problem.device, problem.dtype)
    return (failed,) if failed else ()


def select(problem: Problem, impl: Impl | None) -> Backend:
    """The first backend that can run `problem`, or the named one.

    Raises ValueError for an unknown name and NotImplementedError, with every refusal, otherwise.
    """
    if impl is None:
        if _is_only_reference():
            return REFERENCE
        candidates = BACKENDS
    else:
        candidates = tuple(backend for backend in BACKENDS if backend.name == impl)
        if not candidates:
            names = ", ".join(repr(backend.name) for backend in BACKENDS)
            raise ValueError(f"{problem.op}: impl must be None or one of {names}, got {impl!r}")
    refused = []
    for backend in candidates:
        reasons = _against(backend, problem, asked_for=impl is not None)
        if not reasons:
            return backend
        refused.append(f"{backend.name}: {', '.join(reasons)}")
    dtype = str(problem.dtype).removeprefix("torch.")
    raise NotImplementedError(
        f"{problem.op}: no implementation can run {dtype} of width {problem.width}"
        f" on {problem.device} ({'; '.join(refused)})"
    )


@contextmanager
def only_reference() -> Iterator[None]:
    """Within it `impl=None` takes the plain torch implementation, in this thread alone.

    A function that `torch.compile` has traced before keeps the choice it was traced with.
    """
    token = _ONLY_REFERENCE.set(True)
    try:
        yield
    finally:
        _ONLY_REFERENCE.reset(token)


def explain(problem: Problem) -> list[tuple[str, tuple[str, ...]]]:
    """(impl name, reasons against it) for every backend, in order of preference."""
    return [(backend.name, _against(backend, problem, asked_for=False)) for backend in BACKENDS]
