# SPDX-License-Identifier: Apache-2.0
"""Which exact form of a decoder layer costs less.

One image, H heads of width d = C / H, weights P_h [K, L], values V_h [L, d], projection W [C, C]:

    direct    concat_h(P_h V_h) W^T          2 K L C + 2 K C^2
    absorbed  sum_h P_h (V_h W[:, h]^T)      2 L C^2 + 2 K H L C

Both give the same numbers: the result of one image has rank at most H L, so with many classes and
few tokens it is cheaper to push the projection through the tokens. The same identity reaches the
first feed-forward matrix (`ffn_direct`, `ffn_absorbed`): LayerNorm's centring folds into that
matrix, its 1 / std multiplies the product. It saves arithmetic from a few hundred classes on, and
writes and reads B H L F numbers for it.

On CPU operations decide, with a margin that was measured; on a GPU the time of a whole step does,
products and passes over memory (`_step_time.py`), which is not what saves most operations.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from vtclip.heads._step_time import FORMS, Rates, rates_of, step_seconds

# near the crossover the extra traffic of the absorbed form eats what it saves
MARGIN = 2

CLEARLY = 0.98  # of the plainer form's time: less is within what the model leaves out

# rows from which the fused tail is used on CPU: twice those at which it was measured to be even
FUSED_ROWS = 1024


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one image, a multiply-add counted as two."""

    out_direct: float
    out_absorbed: float
    ffn_direct: float
    ffn_absorbed: float


@dataclass(frozen=True)
class Plan:
    """What a layer does for one problem size, and what that costs per step (B images)."""

    absorb: int  # 0 nothing, 1 the output projection, 2 the first feed-forward matrix too
    flops: float
    naive_flops: float


def flops(B: int, K: int, C: int, L: int, H: int, F: int) -> Flops:
    """Both forms of both matrices; terms paid once per step are spread over the B images."""
    once = 2 * C * C * F + 2 * K * C * F
    return Flops(
        out_direct=2 * K * L * C + 2 * K * C * C,
        out_absorbed=2 * L * C * C + 2 * K * H * L * C,
        ffn_direct=2 * K * C * F,
        ffn_absorbed=2 * L * C * F + 2 * K * H * L * F + once / max(B, 1),
    )


def crossover_out(C: int, L: int, H: int) -> int | None:
    """The least K at which the absorbed form needs fewer operations; None where it never does."""
    # direct - absorbed = 2 C (K (L + C - H L) - L C)
    gain = L + C - H * L
    return L * C // gain + 1 if gain > 0 else None


def crossover_ffn(B: int, C: int, L: int, H: int, F: int) -> int | None:
    """The same for the first feed-forward matrix."""
    # direct - absorbed = 2 F (K (C - H L - C / B) - L C - C^2 / B), here times B
    gain = B * (C - H * L) - C
    return (B * L * C + C * C) // gain + 1 if gain > 0 else None


def plan(
    B: int,
    K: int,
    C: int,
    L: int,
    H: int,
    F: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    training: bool = False,
) -> Plan:
    """The form for B images, K classes, width C, L tokens, H heads and hidden width F.

    `flops` counts one forward pass of one layer with what does not depend on the image done once;
    `naive_flops` the same layer on the class texts repeated for each image.
    """
    device = torch.device(device)
    count = flops(B, K, C, L, H, F)
    if device.type == "cpu" or torch.compiler.is_compiling():  # a device's rates are not traced
        crossover = crossover_out(C, L, H)
        absorb = int(crossover is not None and crossover * MARGIN <= K)
    else:
        absorb = fastest((B, K, C, L, H, F), rates_of(device, dtype), training)
    shared = 8 * K * C * C + 4 * K * K * C + 2 * K * C * C  # self-attention and the query
    scores = 2 * K * L * C
    keys_values = 4 * L * C * C
    rest = keys_values + scores + count.ffn_direct
    first = count.ffn_absorbed if absorb == 2 else count.ffn_direct
    each = rest + first + (count.out_absorbed if absorb else count.out_direct)
    naive = shared + rest + count.out_direct + count.ffn_direct
    return Plan(absorb=absorb, flops=shared + B * each, naive_flops=B * naive)


@functools.cache
def fastest(sizes: tuple[int, int, int, int, int, int], rates: Rates, training: bool) -> int:
    """The plainest form, or another whose step takes clearly less."""
    seconds = [step_seconds(form, *sizes, rates, training=training) for form in FORMS]
    least = min(seconds)
    return next(form for form in FORMS if least >= CLEARLY * seconds[form])


def fuse_tail(rows: int, device: str, *, training: bool) -> bool:
    """Whether the second feed-forward matrix joins the last norm and the cosine in one operator.

    It then stores no [B, K, C] result, and its backward recomputes it: a sixth more operations
    per step. So in evaluation only, and on CPU for `rows` = B K enough to pay for packing the
    weight.
    """
    return not training and (device != "cpu" or rows >= FUSED_ROWS)
