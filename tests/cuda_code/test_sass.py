# SPDX-License-Identifier: Apache-2.0
"""What a compiler can show of speed: address spaces, loads under way, stores, barriers, size.

Bounds of size are what nvcc 13.0 makes for sm_90, and a tenth.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest


class Expected(NamedTuple):
    """Of one body: where it is, copies into shared memory, 16-byte stores, barriers of a step."""

    file: str
    copies: int
    stores: int
    barriers: int
    kilobytes: int
    blocks: int


# A thread makes 8 copies for 64 rows of 128 columns, 4 for 32 rows or 64 columns of these, and 1 to
# 4 stores for the columns of a warp that pass through shared memory at a time, 16, 32 or 64.
TILES = {
    # copies: queries; keys of the first step and the next; values
    "CrossAttnForward<BFloat16, 128>": Expected("cross_attn", 8 + 4 + 4 + 4, 8, 2, 46, 3),
    # queries; rows of d_out and values, first and next; keys. stores: d_query or its partial sum
    "CrossAttnQueryGradient<BFloat16, 128>": Expected(
        "cross_attn_bwd", 8 + 2 * (8 + 4) + 4, 8 + 16, 2, 81, 2
    ),
    # keys, values; queries, first and next; rows of d_out
    "CrossAttnKeyGradient<BFloat16, 128>": Expected(
        "cross_attn_bwd", 8 + 8 + 2 * 4 + 4, 2 * 8, 3, 60, 2
    ),
    # queries; keys, first and next; values
    "RationalRows<Half, 64>": Expected("rational_attn_fwd", 4 + 4 + 4 + 4, 4, 2, 66, 3),
    # keys, values; queries and rows of d_out, first and next
    "RationalKeys<BFloat16, 64>": Expected(
        "rational_attn_bwd", 4 + 4 + 2 * (2 + 2), 2 * 4, 1, 77, 2
    ),
    # queries, rows of d_out; keys and values, first and next
    "RationalQueries<BFloat16, 64>": Expected(
        "rational_attn_bwd", 4 + 4 + 2 * (2 + 2), 4, 1, 50, 3
    ),
}
# {body: kilobytes}: one copy of the code for rows in vectors, one for rows by elements
ROWS = {"NormGradient<BFloat16>": 42, "NormForward<BFloat16>": 71}


@pytest.fixture(scope="module")
def sm_90(compile_bodies):
    bodies = {body: expected.file for body, expected in TILES.items()}
    return compile_bodies({**bodies, **dict.fromkeys(ROWS, "norm_cosine_logits")}, 90)


@pytest.mark.parametrize("body", [*TILES, *ROWS])
class TestEveryKernel:
    def test_shared_memory_is_read_and_written_as_such(self, sm_90, body):
        code = sm_90[body]
        assert code.count("LD", "ST") == 0, "generic: the compiler lost the address space"
        assert code.count("LDS") > 0
        assert code.count("STS") > 0

    def test_nothing_spills(self, sm_90, body):
        code = sm_90[body]
        assert code.spills == code.count("LDL", "STL") == 0

    def test_size(self, sm_90, body):
        assert sm_90[body].bytes <= 1000 * (ROWS.get(body) or TILES[body].kilobytes)


@pytest.mark.parametrize("body", TILES)
class TestTiles:
    def test_they_are_copied_while_others_are_multiplied(self, sm_90, body):
        code = sm_90[body]
        assert code.count("LDGSTS.E.BYPASS.128") == code.count("LDGSTS") == TILES[body].copies
        assert code.count("LDGDEPBAR", "DEPBAR") >= 2

    def test_barriers_of_a_step(self, sm_90, body):
        steps = [part for part in sm_90[body].loops() if part.count("HMMA") and part.count("BAR")]
        step = min(steps, key=lambda part: part.bytes)
        assert step.count("BAR.SYNC") == TILES[body].barriers

    def test_results_leave_16_bytes_at_a_time(self, sm_90, body):
        code = sm_90[body]
        assert code.count("STG.E.128") == TILES[body].stores
        # by elements where 16 bytes do not fit: in a loop, once for each strip
        assert code.count("STG.E.U16") <= 8

    def test_registers_leave_room_for_blocks(self, sm_90, body):
        assert sm_90[body].blocks_per_sm >= TILES[body].blocks


def test_statistics_read_a_row_at_once(sm_90):
    code = sm_90["CrossAttnQueryGradient<BFloat16, 128>"]
    parts = [part for part in code.loops() if part.count("HMMA") == 0]
    assert max(part.count("LDG.E.128") for part in parts) == 8  # half a row of 128 columns


def test_a_row_of_the_norm_is_read_in_one_step(sm_90):
    # input, text; image, weight, bias: once in the code, without a branch between them
    assert sm_90["NormGradient<BFloat16>"].count("LDG.E.128") == 5


def test_before_sm_80_tiles_pass_through_registers(compile_bodies):
    body = "CrossAttnForward<Half, 64>"
    code = compile_bodies({body: "cross_attn"}, 75)[body]
    assert code.count("LDGSTS") == code.spills == code.count("LD", "ST") == 0
    assert code.count("LDG.E.128") == code.count("STS.128") == 16
