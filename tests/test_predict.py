# SPDX-License-Identifier: Apache-2.0
"""`benchmarks/predict.py`: its counts of loops and its formula, and the table it has left."""

from __future__ import annotations

import csv
import importlib
import types
from collections import Counter
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
PREDICTED = BENCHMARKS / "results" / "gpu" / "predicted.csv"


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """The modules next to the script, which import each other by their plain names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    names = ("kernel_time", "loops", "targets")
    return types.SimpleNamespace(**{name: importlib.import_module(name) for name in names})


TTIR = """
  tt.func public @k(%x: !tt.ptr<bf16> loc("x"), %B: i32 loc("B"), %L: i32 loc("L")) {
    %c0 = arith.constant 0 : i32 loc(#loc1)
    %c1 = arith.constant 1 : i32 loc(#loc1)
    %c64 = arith.constant 64 : i32 loc(#loc1)
    %big = arith.cmpi sgt, %L, %c64 : i32 loc(#loc1)
    %n:2 = scf.if %big -> (i32, i32) {
      scf.yield %L, %c1 : i32, i32 loc(#loc1)
    } else {
      %many = scf.for %j = %c0 to %B step %c1 iter_args(%a = %c0) -> (i32) : i32 {
        scf.yield %a : i32 loc(#loc2)
      } loc(#loc2)
      scf.yield %c64, %c1 : i32, i32 loc(#loc1)
    } loc(#loc1)
    %pid = tt.get_program_id x : i32 loc(#loc1)
    %rest = arith.subi %B, %pid : i32 loc(#loc1)
    %least = arith.minsi %rest, %c64 : i32 loc(#loc1)
    scf.for %i = %c0 to %least step %c1 : i32 {
      %acc = scf.for %l = %c0 to %n#0 step %c64 iter_args(%s = %c0) -> (i32) : i32 {
        %r = "tt.reduce"(%t) <{axis = 1 : i32}> ({
        ^bb0(%p: f32 loc(#loc3), %q: f32 loc(#loc3)):
          tt.reduce.return %p : f32 loc(#loc3)
        }) : (tensor<4x4xf32>) -> tensor<4xf32> loc(#loc3)
        scf.yield %s : i32 loc(#loc3)
      } loc(#loc3)
    } loc(#loc3)
    scf.while : () -> () {
    } loc(#loc3)
"""


def shape(loops):
    return [(loop.trips, shape(loop.inside)) for loop in loops]


@pytest.mark.parametrize(
    ("L", "expected"),
    [
        (200, [(5, [(4, [])]), (None, [])]),
        (49, [(5, []), (5, [(1, [])]), (None, [])]),  # the branch not taken above is taken
    ],
)
def test_loops_of_the_source(benchmarks, L, expected):
    assert shape(benchmarks.loops.of_ttir(TTIR, {"B": 5, "L": L})) == expected


SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_2:
        /*0010*/                   LDGSTS.E.BYPASS.128 [R1], desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R72, gdesc[UR12], RZ, !UPT ;
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, R96, gdesc[UR16].tnspB, R24 ;
        /*0040*/                   MUFU.EX2 R3, R4 ;
        /*0050*/              @!P2 BRA `(.L_x_1) ;
        /*0060*/                   NOP ;
        /*0070*/                   BRA `(.L_x_2) ;
.L_x_3:
        /*0080*/                   BRA `(.L_x_3);
"""


def test_loops_of_the_machine_code(benchmarks):
    body = benchmarks.loops.of_sass(SASS)
    assert shape([body]) == [(1, [(None, [(None, [])])])]
    (outer,) = body.inside
    (inner,) = outer.inside
    assert body.counts == Counter({"LDC": 1, "BRA": 1})
    assert outer.counts == Counter({"LDGSTS.E.BYPASS.128": 1, "NOP": 1, "BRA": 1})
    assert inner.counts == Counter(
        {
            "HGMMA.64x64x16.F32.BF16 shared": 1,
            "HGMMA.64x128x16.F32.BF16 registers": 1,
            "MUFU.EX2": 1,
            "BRA": 1,
        }
    )
    kernel_time = benchmarks.kernel_time
    assert kernel_time.tensor_cycles("HGMMA.64x64x16.F32.BF16 shared") == 32
    assert kernel_time.tensor_cycles("HGMMA.64x32x16.F32.BF16 shared") == 24
    assert kernel_time.tensor_cycles("HGMMA.64x128x16.F32.BF16 registers") == 64
    once = kernel_time.one_pass(inner, warps=8)
    assert once.parts == (2 * 96, 2 * 4, 2 * 8, 200)
    # loads before a pipelined loop are waited for
    assert kernel_time.one_pass(outer, warps=4).waits == 900


def compiled(loops, *parts, matrix=0):
    counts = Counter({"HGMMA.64x64x16 shared": matrix, "IADD": 10}) if matrix else Counter("abc")
    return loops.Loop(None, list(parts), +counts)


def test_trips_of_compiled_loops(benchmarks):
    loops = benchmarks.loops

    def trips(body, source):
        guesses = loops.with_trips(body, source)
        return shape(body.inside), guesses

    source = [loops.Loop(3, [loops.Loop(4)])]
    nested = compiled(loops, compiled(loops, compiled(loops, matrix=8)))
    assert trips(nested, source) == ([(3, [(4, [])])], [])
    flat = compiled(loops, compiled(loops, matrix=8))
    assert trips(flat, source) == ([(12, [])], [])
    # the last tile was peeled off behind its loop
    peeled = compiled(loops, compiled(loops, compiled(loops, matrix=8), matrix=8))
    assert trips(peeled, source) == ([(3, [(3, [])])], [])
    # unrolled four times, with a loop for the remainder
    four, rest = compiled(loops), compiled(loops)
    four.counts = Counter({"LDG.E": 40})
    rest.counts = Counter({"LDG.E": 10})
    found, guesses = trips(compiled(loops, four, rest), [loops.Loop(11)])
    assert found == [(2, []), (3, [])]
    assert len(guesses) == 1
    found, guesses = trips(compiled(loops, compiled(loops)), [loops.Loop(None)])
    assert found == [(1, [])]
    assert guesses == ["a loop of unknown length runs once"]


def test_the_time_of_a_launch_by_hand(benchmarks):
    loops, kernel_time = benchmarks.loops, benchmarks.kernel_time
    step = loops.Loop(10, [], Counter({"HGMMA.64x64x16 shared": 4, "FADD": 360, "LDGSTS.E": 1}))
    body = loops.Loop(1, [step], Counter())

    def seconds(blocks, registers=255, bytes=0):
        kernel = kernel_time.Kernel("k", body, 4, registers, 1024, blocks, bytes)
        return kernel_time.seconds(kernel) * 1.75e9

    one_pass = 128 + 365 / 0.9 + 200
    alone = 200 + 10 * one_pass
    assert seconds(1) == pytest.approx(alone)
    assert seconds(132) == pytest.approx(alone)
    # 256 registers x 128 threads: two blocks share a multiprocessor
    assert seconds(264) == pytest.approx(2 * max(alone / 2 * 1.15, 3650 / 0.85))
    assert seconds(265) == pytest.approx(seconds(264) + alone)
    assert seconds(1, bytes=4_000_000_000) == pytest.approx(1.75e6)


def test_a_row_is_predicted_for_every_target(benchmarks):
    with PREDICTED.open(newline="") as file:
        rows = list(csv.DictReader(file))
    keys = [(row["case"], row["mode"], row["what"], row["graph"], row["at_most"]) for row in rows]
    assert keys == [
        (x.case, x.mode, x.what, "yes" if x.graph else "no", f"{x.at_most:g}")
        for x in benchmarks.targets.TARGETS
    ]
    for row in rows:
        assert row["source"] == "predicted"
        assert all(row[name] for name in ("device", "torch", "triton", "commit"))
        if row["predicted"] == "not predicted":
            assert row["note"]
            continue
        assert row["within"] == (
            "yes" if float(row["predicted"]) <= float(row["at_most"]) else "no"
        )
        assert 0 < float(row["floor"]) < float(row["ms"])
        assert row["library"].endswith("%")
