# SPDX-License-Identifier: Apache-2.0
"""Tiles, products, reductions and partial sums of csrc/cuda on the host."""

from __future__ import annotations

import pytest
import torch
from layouts import LAYOUTS

from vtclip import testing
from vtclip.reference._dtypes import acc_dtype

PRODUCT, EMULATED, REDUCTIONS, PARTIALS, OVERRUN, NO_BARRIER, ONCE, COPIED = range(8)
ARRANGED = {"dense": torch.Tensor.contiguous, **LAYOUTS}


@pytest.fixture(scope="module")
def base(build):
    return build("base")


def drawn(rows, columns, dtype):
    return torch.randn(rows, columns).to(dtype)


def check_product(base, a, b, a_transposed, b_transposed, visible):
    m, n = a.shape[a_transposed], b.shape[not b_transposed]
    seen = a.double().clone()
    seen[visible:] = 0
    left = seen.t() if a_transposed else seen
    right = b.double().t() if b_transposed else b.double()
    exact = left @ right
    rows = 1 + torch.arange(m, dtype=torch.float64)[:, None] % 2
    acc = acc_dtype(a.dtype)
    out, sums, tops = base((a, b), (PRODUCT, a_transposed, b_transposed, visible))
    peer = (left.to(acc) @ right.to(acc) * rows.to(acc)).to(a.dtype)
    testing.assert_within_budget(out, exact * rows, peer)
    scale = (left.abs() @ right.abs()).sum(1).max().item() if m else 0.0
    floor = torch.finfo(acc).eps * scale
    # beyond n the tile holds zeros: they are summed, and are the largest where all else is less
    testing.assert_within_budget(sums, exact.sum(1), exact.sum(1).to(acc), floor=floor)
    top = torch.cat([exact, torch.zeros(m, 64 - n).double()], 1).amax(1)
    testing.assert_within_budget(tops, top, top.to(acc), floor=floor)


@pytest.mark.parametrize("b_transposed", [False, True], ids=["b", "bT"])
@pytest.mark.parametrize("a_transposed", [False, True], ids=["a", "aT"])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(32, 64, 48), (31, 63, 47), (17, 40, 24), (1, 1, 1), (3, 0, 5), (5, 7, 0)]
)
def test_products_of_loaded_tiles(base, dtype, a_transposed, b_transposed, m, n, k):
    a = drawn(*((k, m) if a_transposed else (m, k)), dtype)
    b = drawn(*((n, k) if b_transposed else (k, n)), dtype)
    check_product(base, a, b, a_transposed, b_transposed, a.shape[0])


@pytest.mark.parametrize("arrange", ARRANGED.values(), ids=ARRANGED)
def test_loads_take_any_strides(base, dtype, arrange):
    check_product(base, arrange(drawn(24, 40, dtype)), arrange(drawn(40, 56, dtype)), 0, 0, 24)


@pytest.mark.parametrize("k", [40, 33])
def test_rows_that_do_not_exist_are_not_read(base, dtype, k):
    a = drawn(20, k, dtype)
    a[11:] = float("nan")
    check_product(base, a, drawn(k, 9, dtype), 0, 0, 11)


@pytest.mark.parametrize("b_transposed", [False, True], ids=["b", "bT"])
@pytest.mark.parametrize("a_transposed", [False, True], ids=["a", "aT"])
def test_lanes_name_the_rows_and_elements_of_a_product(base, a_transposed, b_transposed):
    a, b = drawn(16, 16, torch.float32).round(), drawn(16, 16, torch.float32).round()
    out, again = base((a, b), (EMULATED, a_transposed, b_transposed))
    a, b = a.t() if a_transposed else a, b.t() if b_transposed else b
    assert torch.equal(out, a @ b)
    assert torch.equal(again, a @ b @ b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [0, 1, 31, 128, 1000])
def test_reductions(base, dtype, n):
    x = torch.randn(n).to(dtype) - 3  # a maximum below 0
    (out,) = base((x,), (REDUCTIONS,))
    exact = x.double().sum()
    error = torch.finfo(dtype).eps * 8 * x.abs().sum().double()
    assert ((out[:, 0].double() - exact).abs() <= error).all()
    assert (out[:, 1] == (x.max() if n else -torch.inf)).all()


def test_a_maximum_passes_over_nan(base):
    (out,) = base((torch.tensor([float("nan"), -2.0, float("nan")]),), (REDUCTIONS,))
    assert out[:, 1].tolist() == [-2.0] * 4
    assert out[:, 0].isnan().all()


@pytest.mark.parametrize(("P", "N"), [(3, 300), (1, 1), (0, 5), (4, 0)])
def test_partials_are_added(base, dtype, P, N):
    partial = torch.randn(P, N).to(acc_dtype(dtype))
    (out,) = base((partial, torch.zeros(1, dtype=dtype)), (PARTIALS,))
    exact = partial.double().sum(0)
    testing.assert_within_budget(out, exact, exact.to(dtype), floor=1e-6 * P)


def test_an_overrun_of_shared_memory_is_seen(base):
    with pytest.raises(AssertionError, match="heap-buffer-overflow"):
        base((), (OVERRUN,))


def test_a_missing_barrier_is_seen(base):
    with pytest.raises(AssertionError, match="shares of a phase depend on each other"):
        base((), (NO_BARRIER,))


@pytest.mark.parametrize(
    ("waits", "overwrites", "right"), [(1, 0, True), (0, 0, False), (1, 1, False)]
)
def test_a_copy_that_is_not_waited_for_or_comes_too_early_is_seen(base, waits, overwrites, right):
    x = torch.arange(1.0, 9.0)
    if right:
        assert base((x,), (COPIED, waits, overwrites))[0].tolist() == [1, 2, 3, 4, 0, 0, 0, 0]
        return
    with pytest.raises(AssertionError, match="shares of a phase depend on each other"):
        base((x,), (COPIED, waits, overwrites))


def test_what_is_done_once_per_device(base):
    def calls(*devices: int) -> float:
        return base((torch.zeros(1),), (ONCE, *devices))[0].item()

    assert calls(0, 0, 0) == 1
    assert calls(0, 1, 63, 1, 63, 0) == 3
    assert calls(64, 64) == 2  # beyond the bits there are: every time
    assert calls(-1, 0, 0) == 2  # a call that failed does not count
