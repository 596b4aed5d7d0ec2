# SPDX-License-Identifier: Apache-2.0
"""What Triton makes of the attention kernels: work done twice, exchanges, widths, shared memory.

Counted in the code compiled for a GPU that need not be here; how fast it is, is not known from it.
"""

from generated_code import counted, innermost_loops, unequal_lanes

LOOP = """
$L__BB0_1: // the outer
    shfl.sync.bfly.b32 %r2, %r1, 16, 31, -1;
    add.f32 %r3, %r1, %r2;
$L__BB0_2: // =>This Inner Loop Header: Depth=2
    @%p1 ld.global.b16 { %rs1 }, [ %rd1 + 0 ];
    ex2.approx.ftz.f32 %r401, %r399;
    @%p6 bra $L__BB0_2;
    bra.uni $L__BB0_1;
"""


def test_only_the_innermost_loop_is_counted():
    (body,) = innermost_loops(LOOP)
    found = {name: count for name, count in counted(body).items() if count}
    assert found == {"exp2": 1, "global loads": 1, "narrow loads": 1, "all": 2}


def test_a_product_fused_with_an_exchange_is_seen():
    assert not unequal_lanes(LOOP)
    (line,) = unequal_lanes(LOOP.replace("add.f32 %r3, %r1", "fma.rn.f32 %r3, %r4, %r5"))
    assert line == "fma.rn.f32 %r3, %r4, %r5, %r2;"
