# SPDX-License-Identifier: Apache-2.0
"""The 95 % interval of a mean over seeds: how far the mean over other draws of the shots may lie.

mean +- t(0.975, n - 1) * s / sqrt(n) for n > 1 seeds with sample standard deviation s.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def t_quantile(share: float, df: int) -> float:
    """The t with P(T <= t) = share >= 0.5 for Student's T with df degrees of freedom."""
    if df < 1 or not 0.5 <= share < 1:
        raise ValueError(f"t_quantile: needs df >= 1 and 0.5 <= share < 1, got {df} and {share}")
    low, high = 0.0, math.pi / 2  # bisection over atan(t / sqrt(df))
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_share(middle, df) < share else (low, middle)
    return math.sqrt(df) * math.tan(low)


def _t_share(angle: float, df: int) -> float:
    """P(T <= t) at angle = atan(t / sqrt(df)) >= 0: Abramowitz and Stegun 26.7.3 and 26.7.4."""
    sine, cosine = math.sin(angle), math.cos(angle)
    term = cosine if df % 2 else 1.0
    total = 0.0
    for number in range(1 + df % 2, df, 2):
        total += term
        term *= cosine * cosine * number / (number + 1)
    both = (angle + sine * total) * 2 / math.pi if df % 2 else sine * total
    return 0.5 + both / 2


def seed_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean of two or more seeds' values."""
    mean = statistics.fmean(values)
    half = t_quantile(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean - half, mean + half
