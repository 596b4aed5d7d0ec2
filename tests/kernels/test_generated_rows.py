# SPDX-License-Identifier: Apache-2.0
"""What Triton makes of the kernels that sum over rows: number formats, widths, exchanges, blocks.

Counted in code compiled for a GPU that need not be here; how fast it is, is not known from it.
"""

import pytest
from generated_code import generated, launch, only

SIZES = {"B": 2, "K": 1000, "D": 1024, "C": 1024, "F": 64}
OPS = (
    ("norm_cosine_logits", ""),
    ("cosine_logits", "text per image"),
    ("ffn_cosine_logits", ""),
    ("rational_head", "mse"),
    ("rational_logits", ""),
    ("unit_products", ""),
)


@pytest.fixture(scope="module")
def rows():
    """Every launch at aligned sizes, in bfloat16 on sm_90."""
    launches = [launch(op, variant, **SIZES) for op, variant in OPS]
    launches += [launch("cosine_logits", **SIZES), launch("column_sums", **SIZES)]
    return generated("sm_90", "bfloat16", launches)


def test_no_number_is_float64(rows):
    """A constant below the smallest normal float32 is enough to widen all that comes of it."""
    wide = {row["kernel"]: row["float64"] for row in rows if row["float64"]}
    assert not wide
    assert {row["kernel"]: row["whole"]["float64"] for row in rows if row["whole"]["float64"]} == {}


def test_nothing_is_spilled(rows):
    assert {row["kernel"]: row["spilled"] for row in rows if row["spilled"]} == {}


# Loads of 2 bytes a thread: one per row of a thread, from a vector over rows; per column, from a
# vector over columns that is exchanged. Of a matrix none: 32 in rational_head_fwd where its columns
# were not known to be aligned.
NARROW = {
    "norm_cosine_logits_bwd_kernel": 4,
    "cosine_logits_paired_bwd_kernel": 2,
    "cosine_logits_bwd_gather_kernel": 4,
    "ffn_cosine_logits_fwd_kernel": 7,
    "ffn_cosine_logits_bwd_kernel": 2,
    "rational_head_bwd_kernel": 4,
    "rational_logits_bwd_kernel": 4,
}


def test_matrices_are_loaded_16_bytes_at_a_time(rows):
    narrow = [
        (row["kernel"], row["whole"]["narrow loads"])
        for row in rows
        if row["whole"]["narrow loads"] > NARROW.get(row["kernel"], 0)
    ]
    assert not narrow


@pytest.mark.parametrize(
    ("kernel", "loop", "stores", "barriers", "instructions"),
    [
        # bounds between today's counts, Triton 3.6's too, and those of sums exchanged at each step
        # an image: five sums, and four numbers of every row that change their place
        ("norm_cosine_logits_fwd_kernel", 0, 18, 18, 620),
        # an image: its cosines, and a pair of sums of every row
        ("norm_cosine_logits_bwd_kernel", 0, 18, 10, 1200),
        # a step: four vectors over columns; sums are exchanged after the loop
        ("ffn_cosine_logits_fwd_kernel", 1, 12, 12, 610),
        # an image: two vectors, and the gradient of its unit row
        ("ffn_cosine_logits_bwd_kernel", 0, 18, 10, 700),
        ("column_sums_kernel", 0, 0, 0, 140),
    ],
)
def test_a_step_exchanges_little(rows, kernel, loop, stores, barriers, instructions):
    found = only(rows, kernel)["loops"][loop]
    assert found["shared stores"] <= stores
    assert found["barriers"] <= barriers
    assert found["all"] <= instructions


def test_a_row_is_not_divided_by_its_norm(rows):
    """A division is some eight instructions; entries are multiplied by what one row's gave."""
    (loop,) = only(rows, "norm_cosine_logits_fwd_kernel")["loops"]
    assert loop["divisions"] <= 1
    assert only(rows, "unit_products_fwd_kernel")["whole"]["divisions"] <= 2
    assert all(
        loop["divisions"] == 0 for loop in only(rows, "ffn_cosine_logits_fwd_kernel")["loops"]
    )


@pytest.mark.parametrize(
    ("kernel", "blocks"),
    [
        ("norm_cosine_logits_fwd_kernel", 6),
        ("norm_cosine_logits_bwd_kernel", 2),
        ("ffn_cosine_logits_fwd_kernel", 3),
        ("ffn_cosine_logits_bwd_kernel", 2),
        ("rational_head_fwd_kernel", 2),
        ("unit_products_fwd_kernel", 5),
    ],
)
def test_blocks_share_a_multiprocessor(rows, kernel, blocks):
    """Where one block waits at a barrier, another computes."""
    assert only(rows, kernel)["blocks"] >= blocks


def test_lanes_agree_on_every_sum():
    """Narrow rows leave a thread one entry: its product must be rounded before it is exchanged."""
    launches = [launch(op, variant, **SIZES | {"K": 50, "D": 37, "C": 37}) for op, variant in OPS]
    rows = generated("sm_80", "float32", launches, precision="ieee")
    unequal = {row["kernel"]: len(row["unequal lanes"]) for row in rows if row["unequal lanes"]}
    assert not unequal
