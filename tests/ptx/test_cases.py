# SPDX-License-Identifier: Apache-2.0
"""Every compiled kernel, executed: right results, no findings, all kernels, nearly all lines."""

from __future__ import annotations

import re

import pytest
import torch
from harness import cases
from harness.coverage import FLOOR, Summary

# kernels that the short list does not run -> why; the long list runs all
LEFT_OUT: dict[str, str] = {}
# kernel -> (share that can be reached, what cannot and why), where that is below the floor
OUT_OF_REACH: dict[str, tuple[float, str]] = {
    # measured for float32 on sm_90
    r"NormImageGradient\w*If": (0.94, "a sum over no tiles: without classes nothing is launched"),
    r"RationalCombine\w*If": (0.92, "no case is without image query and without gradients"),
}
# what the short list reaches of every kernel; the CUDA library has code for every alignment
SHORT_FLOORS = {"cuda": 0.2, "triton": 0.85}
# letter of a size -> smallest with two passes of the loop over it and a rest; images, and images of
# operators with heads, of which a block takes one until there are many blocks
TWO_PASSES = {"K": 129, "L": 129, "D": 257, "C": 257, "d": 129, "B": 33}
IMAGES_OF_HEADS = 513
VECTOR = 8  # 16-bit elements of one load
# letter of a size -> what tiles and steps of loops over it divide: the last one may be whole
WHOLE = {"L": 64, "d": 64, "D": 256, "C": 256}


def test_results_are_in_budget(found: Summary) -> None:
    assert found.cases
    assert not found.errors, "\n".join(found.errors)


def test_checks_find_nothing(found: Summary) -> None:
    """Bounds, alignment, initialisation, races, barriers, member masks, proxy fences."""
    assert not found.findings, "\n".join(found.findings)


def test_every_kernel_ran(found: Summary, everything: bool) -> None:
    expected = set(found.exist)
    if not everything:
        expected -= {name for name in expected if any(re.search(p, name) for p in LEFT_OUT)}
    assert sorted(expected - found.ran) == []


def test_most_instructions_were_reached(found: Summary, everything: bool) -> None:
    floor = FLOOR if everything else SHORT_FLOORS[found.name.split()[0]]
    low = {}
    for name, share in found.shares().items():
        reach = [low for pattern, (low, _) in OUT_OF_REACH.items() if re.search(pattern, name)]
        if share < min([floor, *reach]):
            low[name] = round(share, 3)
    assert not low


@pytest.mark.parametrize("op", cases.TABLE)
def test_sizes_bind_every_bound(op: str) -> None:
    """Each remainder of a vector load, two passes of each loop and whole tiles are in the list."""
    sizes: dict[str, set[int]] = {}
    for case in cases.CASES:
        if case.op == op:
            for letter, size in re.findall(r"([A-Za-z])(\d+)", case.sizes):
                sizes.setdefault(letter, set()).add(int(size))
    least = TWO_PASSES | ({"B": IMAGES_OF_HEADS} if "H" in sizes else {})
    for letter, seen in sizes.items():
        assert max(seen) >= least.get(letter, 1), f"{letter}: {sorted(seen)}"
        whole = WHOLE | ({"K": 64} if "H" in sizes else {})
        assert any(n and n % whole.get(letter, 1) == 0 for n in seen), f"{letter}: {sorted(seen)}"
    width = next((letter for letter in ("d", "D", "C") if letter in sizes), None)
    if width is not None:
        assert {size % VECTOR for size in sizes[width]} == set(range(VECTOR)), sorted(sizes[width])


def test_rows_of_every_magnitude_are_in_every_thread_s_share():
    """Threads take every fourth row or every sixteenth: of some, all of them are scaled."""
    expected = [0, 2.0**-60, 2.0**60, 1, 0]
    assert cases._extremes(torch.ones(5, 3))[:, 2].tolist() == expected
    assert cases._extremes(torch.ones(1, 5, 3))[0, :, 0].tolist() == expected
    half = cases._extremes(torch.ones(5, 3, dtype=torch.float16))
    assert half[:, 0].tolist() == [0, 1, 1, 1, 0]


def test_nan_must_be_where_the_reference_has_it():
    case = next(case for case in cases.CASES if case.layout == cases.NAN)
    call = cases.prepared(case, torch.float32, None)
    assert call.inputs["context"].isnan().any()
    assert set(call.frozen) == set(call.inputs)

    def one_number(*tensors, impl, **fixed):
        logits, size = call.function(*tensors, impl="reference", **fixed)
        logits[0, 0 if impl == "kernel" else 1] = 0.0
        return logits, size

    (wrong,) = cases.out_of_budget(
        one_number, call.inputs, "kernel", frozen=call.frozen, **call.fixed
    )
    assert "output 0: infinities differ" in wrong


def test_inference_asks_for_no_gradient():
    some = [case for case in cases.CASES if case.variant == cases.EVERYTHING]
    assert some
    for case in some:
        call = cases.prepared(case, torch.float32, None)
        assert set(call.frozen) == set(call.inputs), case.name
