# SPDX-License-Identifier: Apache-2.0
"""What the fit of a method is expected to cost, in seconds of one processor.

The numbers come from sizes and constants alone, not from a clock, so that what `--budget` allows is
the same on every machine. The constants fit what `benchmarks/fit_cost.py` printed on one core, on
another machine all of them are off by about the same factor. Those of VT-CLIP are set by hand;
those of many images follow from the operations of a solve and the speed of products of matrices
there, and are not measured.

    trained            steps * STEP[method] + steps * batch * K * C * PAIR[method]
    proker             0.1 + 1.4e-6 N^2                              kernel matrices of a grid
    takl               0.1 + 1.2e-3 (N + K) + 1.1e-8 (N + K) K C     steps for each penalty
    tip-adapter-f      trained, and 3e-10 N^2 C per epoch            every image with every key

N images of K classes, features of width C; of VT-CLIP every pair has L tokens. Above 2,048 images
the search is over every j-th class, so many that N / j <= 2,048, and costs as of those alone:

    proker             of N / j, and 3.5e-11 N^2 C + 8.3e-12 N^3 + 4.5e-11 N^2 K     one solve
    takl               of N / j and K / j, and 5.2e-9 (N + K) K C, where N + K > 4,096
"""

from __future__ import annotations

import math

from vtclip.data.records import Records
from vtclip.data.splits import Split
from vtclip.heads import HEADS
from vtclip.heads._support import SEARCH_ROWS
from vtclip.heads.takl import KERNEL_ROWS

STEP = {"clip-adapter": 3e-3, "tip-adapter-f": 1e-3, "rada": 5e-3, "vtclip": 2e-2}
PAIR = {"rada": 2e-7, "vtclip": 6e-9}


def expected_seconds(method: str, records: Records, split: Split, shots: int) -> float:
    """Seconds of one processor for a fit of the method's recipe to split.train; 0 of zero-shot.

    shots: that the recipe is taken for. KeyError for a method that is no candidate of `auto`.
    """
    N, (K, C) = len(split.train), records.text.shape
    if method == "zeroshot":
        return 0.0
    if method == "proker":
        return proker_seconds(N, K, C)
    if method == "takl":
        return takl_seconds(N, K, C)
    config = HEADS[method].recipe(shots)
    steps = math.ceil(N / config.batch_size)
    epochs = config.num_epochs(steps, K)
    pair = C * PAIR.get(method, 0.0)
    if method == "vtclip":
        pair *= records.spatial_tokens or 0
    seconds = epochs * (steps * STEP[method] + N * K * pair)
    return seconds + (3e-10 * epochs * N**2 * C if method == "tip-adapter-f" else 0.0)


def proker_seconds(N: int, K: int, C: int) -> float:
    j = math.ceil(N / SEARCH_ROWS)
    if j <= 1:
        return 0.1 + 1.4e-6 * N**2
    return proker_seconds(N // j, K // j, C) + N**2 * (3.5e-11 * C + 8.3e-12 * N + 4.5e-11 * K)


def takl_seconds(N: int, K: int, C: int) -> float:
    if N + K <= KERNEL_ROWS:
        return 0.1 + 1.2e-3 * (N + K) + 1.1e-8 * (N + K) * K * C
    j = max(1, math.ceil(N / SEARCH_ROWS))
    searched = (N // j + K // j) * (1.2e-3 + 1.1e-8 * (K // j) * C)
    return 0.1 + searched + 5.2e-9 * (N + K) * K * C
