# SPDX-License-Identifier: Apache-2.0
"""Damaged copies of the real kernels are noticed, each kind at the rate stated here."""

from __future__ import annotations

import json
from collections import defaultdict

import pytest
from harness import mutants
from harness.build import missing

# kind -> per cent of the long sample that is noticed; docs/ptx.md says what survives. Measured with
# three of the kernels: 3 of 15 barriers, 7 of 28 bounds, 29 of 33 accesses, 1 of 1 product
RATES = {
    "barrier deleted": 20,
    "bound off by one": 25,
    "access moved": 85,
    "mma registers swapped": 90,
}
TOGETHER = 60  # of a sample that is too small for a rate of each kind
SHORT = ("--every", "40")  # with a few cases of each kernel
LONG = ("--every", "10", "--all")  # with all of its operator


def test_damage_is_noticed(everything, output, say) -> None:
    if reason := missing("cuda"):
        pytest.skip(reason)
    sample = LONG if everything else SHORT
    rows = [json.loads(line) for line in output(*sample, module="harness.mutants")]
    tried = defaultdict(list)
    for row in rows:
        tried[row["kind"]].append(row)
    assert set(tried) == set(RATES)
    survivors = []
    for kind, some in tried.items():
        noticed = sum(bool(row["noticed"]) for row in some)
        say(f"mutants, {kind}: {noticed} of {len(some)} noticed")
        if everything and 100 * noticed < RATES[kind] * len(some):
            survivors += [row for row in some if not row["noticed"]]
    assert not survivors
    assert 100 * sum(bool(row["noticed"]) for row in rows) >= TOGETHER * len(rows), rows


@pytest.mark.parametrize(
    ("kind", "line", "changed"),
    [
        ("barrier deleted", "bar.sync 0;", ""),
        ("barrier deleted", "bar.warp.sync -1;", ""),
        ("bound off by one", "setp.ge.s64 %p1, %rd1, %rd2;", "setp.gt.s64 %p1, %rd1, %rd2;"),
        ("bound off by one", "setp.lt.s32 %p1, %r1, 8;", "setp.le.s32 %p1, %r1, 8;"),
        ("access moved", "ld.global.nc.f32 %f1, [%rd4];", "ld.global.nc.f32 %f1, [%rd4+4];"),
        ("access moved", "st.shared.v4.u32 [%r4+16], {%r1};", "st.shared.v4.u32 [%r4+20], {%r1};"),
        (
            "mma registers swapped",
            "mma.sync.aligned.m16n8k8 {%f1,%f2}, {%r1,%r2}, {%r3}, {%f1,%f2};",
            "mma.sync.aligned.m16n8k8 {%f1,%f2}, {%r2,%r1}, {%r3}, {%f1,%f2};",
        ),
    ],
)
def test_damage_is_what_it_says(kind: str, line: str, changed: str) -> None:
    found = {name: text for name, _, text in mutants.sites(line, {1})}
    assert found == {kind: changed}


@pytest.mark.parametrize(
    "line", ["\tld.param.u64 \t%rd1, [x_param_0];", "\tadd.s32 \t%r1, %r2, 1;"]
)
def test_other_lines_stay(line: str) -> None:
    assert list(mutants.sites(line, {1})) == []
