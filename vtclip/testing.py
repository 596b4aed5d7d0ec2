# SPDX-License-Identifier: Apache-2.0
"""Inputs and error budgets for testing operators, ours or yours.

Tolerances are not tuned. Against a float64 oracle, a result may err at most `factor` times as much
as the plain torch reference in the same dtype does, plus one rounding step of the largest value.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor

# error allowed relative to the reference's own, as flash-attention's suite: outputs, gradients
FORWARD_FACTOR = 2.0
GRADIENT_FACTOR = 3.0


# float64 has no wider oracle to measure the reference by: rounding steps of the largest value
FLOAT64_STEPS = 32


def budget(oracle64: Tensor, peer: Tensor, factor: float = FORWARD_FACTOR) -> float:
    """The largest allowed error: factor * (peer's own) + one rounding step of peer's dtype."""
    finite = oracle64.isfinite()
    oracle, other = oracle64[finite], peer.double()[finite]
    if oracle.numel() == 0:
        return 0.0
    step = torch.finfo(peer.dtype).eps * float(oracle.abs().amax())
    if peer.dtype == torch.float64:
        return FLOAT64_STEPS * step
    return factor * float((other - oracle).abs().amax()) + step


def assert_within_budget(
    actual: Tensor,
    oracle64: Tensor,
    peer: Tensor,
    *,
    factor: float = FORWARD_FACTOR,
    name: str = "",
    floor: float = 0.0,
) -> None:
    """Raises AssertionError unless `actual` is within `budget`; infinities must agree exactly.

    `floor` is added to the budget: one rounding step of terms that cancel in the result, where the
    reference may be exact by luck.
    """
    if actual.shape != oracle64.shape or actual.dtype != peer.dtype:
        raise AssertionError(
            f"{name}: wanted {list(oracle64.shape)} {peer.dtype},"
            f" got {list(actual.shape)} {actual.dtype}"
        )
    if actual.numel() == 0:
        return
    finite = oracle64.isfinite()
    if not torch.equal(actual.double()[~finite], oracle64[~finite]):
        raise AssertionError(f"{name}: infinities differ")
    if not actual[finite].isfinite().all():
        raise AssertionError(f"{name}: {int((~actual[finite].isfinite()).sum())} non-finite values")
    allowed = budget(oracle64, peer, factor) + floor
    worst = float((actual.double() - oracle64)[finite].abs().amax()) if finite.any() else 0.0
    if worst > allowed:
        raise AssertionError(f"{name}: error {worst:.3e}, allowed {allowed:.3e}")


def spread(tensor: Tensor, *, gap: float = float("nan")) -> Tensor:
    """The same values in a non-contiguous layout whose gaps hold `gap` (NaN shows overreads)."""
    if tensor.dim() == 0 or tensor.numel() == 0:
        return tensor
    holder = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1]), gap).to(tensor)
    view = holder[..., ::2]
    view.copy_(tensor)
    return view


def misaligned(tensor: Tensor) -> Tensor:
    """The same values, contiguous, at an address one element past an aligned one."""
    buffer = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    view = buffer[1:].view(tensor.shape)
    view.copy_(tensor)
    return view


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Fills what `torch.empty` and its kin return with NaN, so that unwritten outputs show."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, Tensor.new_empty

    def fill(tensor: Tensor) -> Tensor:
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    with (
        mock.patch.object(torch, "empty", lambda *a, **k: fill(empty(*a, **k))),
        mock.patch.object(torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k))),
        mock.patch.object(Tensor, "new_empty", lambda *a, **k: fill(new_empty(*a, **k))),
    ):
        yield
