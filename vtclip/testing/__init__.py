# SPDX-License-Identifier: Apache-2.0
"""Inputs and error budgets for testing operators, ours or yours.

Tolerances are not tuned. Against a float64 oracle, a result may err at most `factor` times as much
as the plain torch reference in the same dtype does, plus one rounding step of the largest value.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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
    reference may be exact by luck. A result of a few numbers needs one: the peer's error in them
    says little about its precision.
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


TF32_BITS = 13  # of a float32's fraction that a tensor core does not read


def as_tf32(tensor: Tensor) -> Tensor:
    """float32 values with the fraction cut to the 10 bits of TF32, as tensor cores read them."""
    return (tensor.contiguous().view(torch.int32) & -(1 << TF32_BITS)).view(torch.float32)


class _Tf32Products(TorchDispatchMode):  # type: ignore[no-untyped-call, unused-ignore]
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.overloadpacket in _PRODUCTS:
            first = _PRODUCTS[func.overloadpacket]  # what is added to a product is not an operand
            args = (
                *args[:first],
                *(
                    as_tf32(a) if isinstance(a, Tensor) and a.dtype == torch.float32 else a
                    for a in args[first:]
                ),
            )
        return func(*args, **(kwargs or {}))


# torch's matrix products -> position of the first operand
_PRODUCTS = {
    torch.ops.aten.mm: 0,
    torch.ops.aten.bmm: 0,
    torch.ops.aten.mv: 0,
    torch.ops.aten.dot: 0,
    torch.ops.aten.addmm: 1,
    torch.ops.aten.baddbmm: 1,
    torch.ops.aten.addmv: 1,
}


def tf32_products() -> TorchDispatchMode:
    """Within it torch's float32 matrix products, backward too, read their operands as TF32.

    What a peer needs that is to be as exact as a kernel on tensor cores: the library behind
    torch.matmul takes them for some shapes only, and no CPU has them.
    """
    return _Tf32Products()  # type: ignore[no-untyped-call, unused-ignore]
