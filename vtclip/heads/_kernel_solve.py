# SPDX-License-Identifier: Apache-2.0
"""Kernel ridge regression: (k(S, S) + diag(ridge)) X = b, in the memory of one table of [N, N].

Up to MANY_ROWS rows, and of float64 heads, in float64. Above them in float32, which takes half of
the time and memory, where what is left of b shows that it is close enough: eps |k(S, S)| / ridge is
what rounding may do, and b - (k(S, S) + diag(ridge)) X bounds by how much f = k(S, S) X is off at
the rows themselves. Seen for 4,800 rows: 1e-6 to 1e-4 of b, logits off by 3e-4 of 4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtclip.heads._support import kernel

MANY_ROWS = 4096
CLOSENESS = 1e-3  # of what is left of b to b, root mean squares
CHECKED = 512  # rows that it is computed for, in float64, evenly spaced


def kernel_solve(
    keys: Tensor, beta: float, ridge: Tensor, b: Tensor, *, narrow: bool = False
) -> Tensor:
    """X [N, K] for keys S [N, C] of length 1, ridge [N] > 0 and b [N, K], all float64.

    narrow: float32 is good enough where it comes close to b, for more than MANY_ROWS rows. Where
        it does not (a kernel that is nearly singular beside its ridge), X is that of float64.
    """
    if len(keys) <= MANY_ROWS:
        table = kernel(keys, keys, beta)
        table.diagonal().add_(ridge)
        return torch.cholesky_solve(b, torch.linalg.cholesky(table, out=table))
    if narrow:
        X = _in_place(keys.float(), beta, ridge.float(), b.float())
        if X is not None and _left(keys, beta, ridge, b, X) <= CLOSENESS:
            return X.double()
    X = _in_place(keys, beta, ridge, b)
    if X is None:
        fact = f"k(S, S) of {len(keys)} rows and a ridge of {float(ridge.min()):g} is singular"
        raise torch.linalg.LinAlgError(  # type: ignore[attr-defined]
            f"kernel_solve: {fact} in float64"
        )
    return X


def _in_place(keys: Tensor, beta: float, ridge: Tensor, b: Tensor) -> Tensor | None:
    """X in the dtype of keys, with no second table; None where rounding leaves no factor.

    `cholesky_solve` would copy the factor. The transpose of the table, which is symmetric, is as
    LAPACK wants it.
    """
    table = kernel(keys, keys, beta)
    table.diagonal().add_(ridge)
    info = torch.empty(0, dtype=torch.int32, device=keys.device)
    L, info = torch.linalg.cholesky_ex(table.mT, out=(table.mT, info))
    if int(info):
        return None
    X = torch.linalg.solve_triangular(L, b, upper=False)
    solved: Tensor = torch.linalg.solve_triangular(L.mT, X, upper=True)
    return solved


def _left(keys: Tensor, beta: float, ridge: Tensor, b: Tensor, X: Tensor) -> float:
    """|b - (k(S, S) + diag(ridge)) X| / |b| over CHECKED rows; inf where X is not finite."""
    rows = torch.linspace(0, len(keys) - 1, CHECKED, device=keys.device).long()
    wide = X.double()
    left = b[rows] - kernel(keys[rows], keys, beta) @ wide - ridge[rows, None] * wide[rows]
    share = float(left.norm() / b[rows].norm().clamp(min=torch.finfo(b.dtype).tiny))
    return share if share == share else float("inf")
