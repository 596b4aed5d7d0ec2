# SPDX-License-Identifier: Apache-2.0
"""What the fit of a method is expected to cost, in seconds of one processor.

The numbers come from sizes and constants alone, not from a clock, so that what `--budget` allows is
the same on every machine. The constants fit what `benchmarks/fit_cost.py` printed on one core, on
another machine all of them are off by about the same factor. Those of VT-CLIP are set by hand, and
above 2,048 images ProKeR, which then searches over fewer classes, takes less than is expected.

    trained            steps * STEP[method] + steps * batch * K * C * PAIR[method]
    proker             0.1 + 1.4e-6 N^2                              kernel matrices of a grid
    takl               0.1 + 1.2e-3 (N + K) + 1.1e-8 (N + K) K C     steps for each penalty
    tip-adapter-f      trained, and 3e-10 N^2 C per epoch            every image with every key

N images of K classes, features of width C; of VT-CLIP every pair has L tokens.
"""

from __future__ import annotations

import math

from vtclip.data.records import Records
from vtclip.data.splits import Split
from vtclip.heads import HEADS

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
        return 0.1 + 1.4e-6 * N**2
    if method == "takl":
        return 0.1 + 1.2e-3 * (N + K) + 1.1e-8 * (N + K) * K * C
    config = HEADS[method].recipe(shots)
    steps = math.ceil(N / config.batch_size)
    epochs = config.num_epochs(steps, K)
    pair = C * PAIR.get(method, 0.0)
    if method == "vtclip":
        pair *= records.spatial_tokens or 0
    seconds = epochs * (steps * STEP[method] + N * K * pair)
    return seconds + (3e-10 * epochs * N**2 * C if method == "tip-adapter-f" else 0.0)
