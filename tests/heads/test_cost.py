# SPDX-License-Identifier: Apache-2.0
"""The cost model against counts made by hand."""

from __future__ import annotations

import pytest

from vtclip.heads import _cost
from vtclip.heads._cost import (
    FUSED_ROWS,
    MARGIN,
    crossover_ffn,
    crossover_out,
    flops,
    fuse_tail,
    plan,
)

# C, L, H, then the least K for the output projection and for the first ffn matrix at B = 32
CROSSOVERS = [
    (1024, 49, 8, 74, 139),
    (1024, 49, 4, 58, 105),
    (1024, 49, 1, 50, 88),
    (512, 49, 8, 149, 321),
    (512, 49, 4, 69, 111),
    (512, 49, 1, 50, 75),
    (512, 196, 8, None, None),
    (512, 196, 2, 318, 1044),
    (512, 196, 1, 197, 362),
    (768, 256, 8, None, None),
    (768, 256, 2, 385, 927),
    (768, 256, 1, 257, 441),
]


@pytest.mark.parametrize(("C", "L", "H", "out", "ffn"), CROSSOVERS)
def test_crossover_table(C, L, H, out, ffn):
    assert crossover_out(C, L, H) == out
    assert crossover_ffn(32, C, L, H, 4 * C) == ffn


@pytest.mark.parametrize(("C", "L", "H", "out", "ffn"), CROSSOVERS)
def test_crossover_is_where_the_counts_cross(C, L, H, out, ffn):
    for crossover, form in ((out, "out"), (ffn, "ffn")):
        for K in (crossover - 1, crossover) if crossover else (10, 100_000):
            count = flops(32, K, C, L, H, 4 * C)
            absorbed, direct = getattr(count, f"{form}_absorbed"), getattr(count, f"{form}_direct")
            assert (absorbed < direct) == (crossover == K)


def test_plan_keeps_its_margin():
    crossover = crossover_out(1024, 49, 8)
    below = plan(32, MARGIN * crossover - 1, 1024, 49, 8, 4096)
    above = plan(32, MARGIN * crossover, 1024, 49, 8, 4096)
    assert below.absorb == 0
    assert above.absorb == 1
    assert plan(32, 100_000, 512, 196, 8, 2048).absorb == 0


@pytest.mark.parametrize(
    ("sizes", "naive", "shared"),
    [
        ((32, 100, 1024, 49, 8, 4096), 102.5e9, 68.7e9),
        ((32, 1000, 1024, 49, 8, 4096), 1084e9, 590e9),
        ((128, 1000, 512, 196, 8, 2048), 1279e9, 686e9),
        ((32, 47, 1024, 49, 8, 4096), 51.3e9, 35.8e9),
    ],
)
def test_plan_counts(sizes, naive, shared):
    counted = plan(*sizes)
    assert counted.naive_flops == pytest.approx(naive, rel=1e-3)
    assert counted.flops == pytest.approx(shared, rel=1e-3)


def test_operations_of_the_twice_absorbed_form(monkeypatch):
    monkeypatch.setattr(_cost, "fastest", lambda *_: 2)
    assert plan(32, 1000, 1024, 49, 8, 4096, device="meta").flops == pytest.approx(455e9, rel=1e-3)


@pytest.mark.parametrize("sizes", [(0, 1, 8, 0, 1, 8), (1, 1, 1, 1, 1, 1), (0, 7, 32, 5, 4, 128)])
def test_plan_of_smallest_sizes(sizes):
    for device in ("cpu", "meta"):
        assert plan(*sizes, device=device).absorb == 0 or sizes[3] == 0


def test_the_tail_is_fused_where_it_was_measured_to_win():
    assert fuse_tail(FUSED_ROWS, "cpu", training=False)
    assert not fuse_tail(FUSED_ROWS - 1, "cpu", training=False)
    assert fuse_tail(1, "cuda", training=False)
    assert not fuse_tail(10**6, "cpu", training=True)
    assert not fuse_tail(10**6, "cuda", training=True)
