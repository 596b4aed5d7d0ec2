# SPDX-License-Identifier: Apache-2.0
"""What Triton makes of the attention kernels: work done twice, exchanges, widths, shared memory.

Counted in the code compiled for a GPU that need not be here; how fast it is, is not known from it.
"""

import pytest
import torch
from generated_code import counted, generated, innermost_loops, launch, named, unequal_lanes

from vtclip.kernels import _configs, _tiles

# the attention of CLIP's heads: widths 64 and 128, one tile of tokens and several
CROSS = {"B": 32, "H": 8, "K": 1000, "L": 196}
LAUNCHES = [
    launch("cross_attn", **CROSS, d=64),
    launch("cross_attn", **CROSS, d=128),
    launch("rational_attn", B=32, H=8, K=1000, d=64),
    launch("rational_attn", B=32, H=8, K=50, d=64),
]
# kernel -> score maps of a step, which side of them are a program's own rows, and most stores of a
# thread to shared memory in a step: none where loads go there by themselves, ahead of their use
STEPS = {
    "cross_attn_fwd_kernel": (1, "BLOCK_K", 0),
    "cross_attn_bwd_query_kernel": (1, "BLOCK_K", 16),
    "cross_attn_bwd_key_kernel": (1, "BLOCK_L", 16),
    "rational_attn_fwd_kernel": (2, "BLOCK_K", 0),
    "rational_attn_bwd_query_kernel": (2, "BLOCK_K", 8),
    "rational_attn_bwd_key_kernel": (2, "BLOCK_J", 0),
}
ONE_TILE = "rational_attn_one_bwd_kernel"  # without a loop
TARGETS = [
    pytest.param("sm_90", id="sm_90"),
    pytest.param("sm_80", id="sm_80", marks=pytest.mark.slow),
    pytest.param("sm_100", id="sm_100", marks=pytest.mark.slow),
]

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


@pytest.fixture(scope="module", params=TARGETS)
def rows(request):
    return request.param, generated(request.param, "float16", LAUNCHES)


def told(row):
    """A row's kernel with its tile, for messages."""
    sizes = {name: size for name, size in row["constants"].items() if name.startswith("BLOCK")}
    return f"{row['kernel']} {sizes} {row['options']}"


def steps(rows):
    """(row, maps, its loop, scores of a step) of every kernel that loops over tiles."""
    for row in named(rows, *STEPS):
        if row["loops"]:
            maps, constants = STEPS[row["kernel"]][0], row["constants"]
            columns = constants.get("BLOCK_L", constants.get("BLOCK_J"))
            loop = max(row["loops"], key=lambda loop: loop["exp2"])
            yield row, loop, maps * constants["BLOCK_K"] * columns


def test_no_sum_leaves_lanes_unequal(rows):
    _, all_rows = rows
    assert not {row["kernel"]: row["unequal lanes"] for row in all_rows if row["unequal lanes"]}


def test_16_bit_kernels_hold_no_float64(rows):
    _, all_rows = rows
    wide = [row["kernel"] for row in all_rows if row["float64"] or row["whole"]["float64"]]
    assert not wide


def test_nothing_spills(rows):
    _, all_rows = rows
    assert not [f"{told(row)}: {row['spilled']}" for row in all_rows if row["spilled"]]


def test_every_score_is_computed_once(rows):
    """One exponential a score, and a row's own, which four lanes hold; twice would be 2.0."""
    _, all_rows = rows
    seen = 0
    for row, loop, scores in steps(all_rows):
        held = 4 * STEPS[row["kernel"]][0] * row["constants"]["BLOCK_K"]
        assert loop["exp2"] * row["threads"] <= max(1.1 * scores, scores + held), told(row)
        seen += 1
    assert seen >= 9


def test_chained_products_have_rows_for_every_warp(rows):
    target, all_rows = rows
    if target != "sm_90":
        pytest.skip("where a warp may also take columns the exponentials tell")
    chained = [row for row in named(all_rows, *STEPS) if row["chained"]]
    assert len(chained) >= 9
    for row in chained:
        own = row["constants"][STEPS[row["kernel"]][1]]
        assert 16 * row["options"]["num_warps"] <= own, told(row)
    (one,) = named(all_rows, ONE_TILE)
    assert 16 * one["options"]["num_warps"] <= one["constants"]["BLOCK_K"]


def test_two_blocks_share_a_multiprocessor(rows):
    target, all_rows = rows
    if target != "sm_90":
        pytest.skip("eight warps fill one")
    for row in named(all_rows, *STEPS, ONE_TILE):
        assert row["blocks"] >= 2, told(row)


# kernel -> the kind of tile by whose blocks its launcher splits the images
SPLIT = {
    "cross_attn_fwd_kernel": "fwd",
    "cross_attn_bwd_query_kernel": "bwd_query",
    "cross_attn_weights_fwd_kernel": "weights",
    "cross_attn_weights_bwd_query_kernel": "weights_bwd",
    "rational_attn_bwd_query_kernel": "rational_bwd_query",
    "norm_cosine_logits_bwd_kernel": "norm_cosine_bwd",
}


def test_splits_count_on_blocks_that_are_there(rows):
    """A wave of as many blocks as a launcher counts on is one wave on the device."""
    target, all_rows = rows
    if target != "sm_90":
        pytest.skip("elsewhere launchers count on one")
    more = [launch("cross_attn", "masked", **CROSS, d=d) for d in (64, 128)]
    more += [launch("cross_attn_weights", **CROSS, d=d) for d in (64, 128)]
    more += [launch("norm_cosine_logits", B=32, K=1000, C=C) for C in (64, 512, 1024)]
    device = _configs.Target("cuda", 90, 227 * 1024)
    for row in named(all_rows + generated(target, "float16", more), *SPLIT):
        constants = row["constants"]
        masked = "masked " if constants.get("HAS_MASK") and SPLIT[row["kernel"]] == "fwd" else ""
        kind = masked + SPLIT[row["kernel"]]
        width = constants.get("BLOCK_D", constants.get("BLOCK_C"))
        counted_on = _tiles.resident(kind, torch.float16, width, device)
        assert counted_on in (2, 3)
        assert row["blocks"] >= counted_on, told(row)


def test_loops_load_whole_words_and_store_little(rows):
    target, all_rows = rows
    for row, loop, _ in steps(all_rows):
        assert loop["narrow loads"] == 0, told(row)
        if target == "sm_90":
            assert loop["shared stores"] <= STEPS[row["kernel"]][2], told(row)


def test_a_row_is_divided_by_its_sum_once(rows):
    """A division is eight instructions and more; of a row's elements each would be one."""
    _, all_rows = rows
    for row in named(all_rows, "cross_attn_fwd_kernel"):
        assert row["whole"]["divisions"] <= 4, told(row)
