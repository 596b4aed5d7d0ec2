# SPDX-License-Identifier: Apache-2.0
"""Numbers for the tests of kernels, and how near their results must be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def drawing(device: torch.device | str, dtype: torch.dtype, seed: int = 0) -> Callable[..., Tensor]:
    """draw(*shape) returns standard normal numbers, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator).to(device, dtype)


def unit(x: Tensor) -> Tensor:
    """Rows of length 1; zero rows stay 0 with gradient 0."""
    square = (x * x).sum(-1, keepdim=True)
    zero = square == 0
    return torch.where(zero, 0.0, x / torch.where(zero, 1.0, square).sqrt())


def rnorm(x: Tensor) -> Tensor:
    """1 / |row|, 0 for a zero row."""
    norm = x.norm(dim=-1)
    return torch.where(norm == 0, 0.0, 1 / norm)


def assert_close(
    actual: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    *,
    steps: int = 32,
    least: float = 0.1,
    sizes: Mapping[str, float] | None = None,
) -> None:
    """An error may be `steps` roundings of the largest entry, or of its size in `sizes`.

    The largest entry counts as at least `least`; only a log-sum-exp may be infinite, and it has as
    many roundings as `out`.
    """
    for name, want in wanted.items():
        got = actual[name].cpu()
        assert got.shape == want.shape, name
        finite = want.isfinite()
        assert name == "lse" or got.isfinite().all(), name
        assert torch.equal(got.isfinite(), finite), f"{name}: finite in other places"
        assert torch.equal(got[~finite].double(), want[~finite]), name
        if not finite.any():
            continue
        top = max((sizes or {}).get(name, want[finite].abs().max().item()), least)
        worst = (got.double() - want)[finite].abs().max().item()
        step = torch.finfo(actual["out"].dtype if name == "lse" else got.dtype).eps
        assert worst <= steps * step * top, f"{name}: {worst:.2e} of {top:.2e}"


def assert_same(actual: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Bit by bit, by name."""
    for name, want in wanted.items():
        assert torch.equal(actual[name], want), name


def strided(t: Tensor) -> Tensor:
    """The same numbers as every second row and column of a NaN-filled, transposed storage."""
    *batch, rows, columns = t.shape
    memory = t.new_full((*batch, 2 * columns + 1, 2 * rows + 1), math.nan)
    view = memory[..., 1::2, 1::2].transpose(-1, -2)
    view.copy_(t)
    return view
