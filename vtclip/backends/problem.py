# SPDX-License-Identifier: Apache-2.0
"""What operators and backends agree on: the facts of one call, and what a backend provides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, TypeVar

import torch

Impl = Literal["reference", "cpu", "cuda", "triton"]
Reason = TypeVar("Reason", bound=Callable[..., object])

ATTENTION = ("cross_attn", "cross_attn_weights", "rational_attn")  # width = head width


class Problem(NamedTuple):
    """The static facts of one call.

    width: the head width d or the feature width.
    needs: an option that only the reference has, as errors and warnings name it.
    """

    op: str
    device: str
    dtype: torch.dtype
    width: int
    needs: str = ""


class Backend(Protocol):
    """One implementation: its public `impl` name, reasons against running, the ops' functions."""

    @property
    def name(self) -> Impl: ...

    def why_not(self, problem: Problem) -> tuple[str, ...]: ...

    def function(self, name: str) -> Callable[..., Any]: ...


def constant_when_traced(function: Reason) -> Reason:
    """torch.compiler.assume_constant_result, without the import of torch._dynamo it costs."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
