# SPDX-License-Identifier: Apache-2.0
"""Every kernel, compiled without a GPU in the configuration it would be launched with.

What is read from the result: shared memory under the limit of the device, no spilled registers,
pointer offsets computed in 64 bits from the first multiplication on, and float32 products computed
as torch was told to, never by Triton's default.
"""

import json
import os
import re
from importlib.metadata import version
from pathlib import Path

import pytest
from generated_code import compiled, generated, launch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KERNELS = ROOT / "kernels"
TRITON = tuple(map(int, version("triton").split(".")[:2]))
LIMITS = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}

# Bytes spilled where no tile tried avoids it: float32, most of it at head width 256 (of
# rational_attn_bwd_key without tensor cores ptxas makes 64 registers there); and one row reduction
# on sm_100.
SPILLS = {
    ("float32", "rational_attn_fwd_kernel"): 608,
    ("float32", "rational_attn_bwd_key_kernel"): 2888,
    ("float32", "rational_attn_bwd_query_kernel"): 720,
    ("float32", "rational_attn_bwd_sums_kernel"): 8,
    ("bfloat16", "rational_logits_fwd_kernel"): 8,
}

# Bytes spilled beyond them in the same tiles, by Triton 3.9 and by those before, which allot
# registers otherwise. Smaller tiles would avoid them; which is faster is not measured.
NEWEST_SPILLS = {
    ("float16", "cross_attn_fwd_kernel"): 4,
    ("float16", "cross_attn_bwd_query_kernel"): 88,  # at width 256
    ("float16", "rational_attn_fwd_kernel"): 8,
    ("float16", "rational_attn_bwd_query_kernel"): 56,
}
OLDER_SPILLS = {
    ("float32", "cross_attn_fwd_kernel"): 68,
    ("float32", "cross_attn_bwd_query_kernel"): 2256,
    ("float32", "cross_attn_bwd_key_kernel"): 24,
    ("float32", "cross_attn_weights_bwd_query_kernel"): 28,
    ("float16", "rational_attn_bwd_query_kernel"): 72,
    ("bfloat16", "rational_attn_bwd_query_kernel"): 24,
    ("bfloat16", "rational_attn_bwd_key_kernel"): 4,
}

# And the oldest supported beyond those.
OLDEST_SPILLS = {
    ("float16", "cross_attn_weights_bwd_query_kernel"): 32,
    ("float16", "cross_attn_bwd_query_kernel"): 44,
}

# target, dtype, precision of float32 dots, head widths; width 128 brings the kernels without heads
MATRIX = [
    ("sm_80", "bfloat16", "tf32", (64, 128, 256)),
    ("sm_80", "float32", "ieee", (64, 128, 256)),
    ("sm_90", "float16", "tf32", (64, 128, 256)),
    ("sm_90", "float32", "tf32", (128, 256)),
    ("sm_100", "bfloat16", "tf32", (64, 128, 256)),
    ("gfx942", "bfloat16", "ieee", (128, 256)),
    ("gfx942", "float32", "ieee", (128,)),
]


def narrow_by_mistake(row):
    """Whether offsets have 32 bits though the launch did not say that they fit."""
    return bool(row["narrow"]) and row["constants"].get("WIDE") is not False


def kernel_names():
    return {
        name
        for file in KERNELS.glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), flags=re.M)
    }


@pytest.mark.parametrize(
    ("target", "dtype", "precision", "widths"), MATRIX, ids=["-".join(case[:3]) for case in MATRIX]
)
def test_every_kernel_fits(target, dtype, precision, widths):
    rows = compiled("vtclip.kernels", target, dtype, precision, widths)
    allowed = SPILLS | (OLDER_SPILLS if TRITON < (3, 9) else NEWEST_SPILLS)
    allowed = allowed | (OLDEST_SPILLS if TRITON < (3, 7) else {})
    problems = [
        f"{row['kernel']} at width {row['width']} {row['options']}: {what}"
        for row in rows
        for what, bad in (
            (f"{row['shared']} bytes of shared memory", row["shared"] > LIMITS[target]),
            (
                f"{row['spilled']} spilled",
                row["spilled"] > allowed.get((dtype, row["kernel"]), 0),
            ),
            (f"32-bit offsets {row['narrow']}", narrow_by_mistake(row)),
            # dots of 16-bit operands have no precision; of float32 it is torch's, said in each
            (f"dots of float32 as {row['dots']}", row["dots"] not in ([], [precision])),
        )
        if bad
    ]
    assert not problems, "\n".join(problems)
    if 128 in widths:
        assert {row["kernel"] for row in rows} == kernel_names()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
def test_tiles_that_tune_would_time_fit(target):
    rows = compiled("vtclip.kernels", target, "bfloat16", "tf32", (0,))
    large = [row for row in rows if row["shared"] > LIMITS[target]]
    assert not large
    assert len({json.dumps(row["options"]) for row in rows}) > 3
    kernels = {row["kernel"] for row in rows}
    assert {"cross_attn_fwd_kernel", "rational_head_fwd_kernel"} <= kernels


ATTENTION = [
    launch(op, variant, B=32, H=8, K=1000, L=197, d=64)
    for op, variant in (
        ("cross_attn", "masked"),
        ("cross_attn_weights", "masked"),
        ("rational_attn", ""),
    )
]


def changed(file, old, new):
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def test_a_lost_cast_and_a_lost_precision_are_seen(mutant):
    """The checks of offsets and of products fail for kernels without casts and precision."""
    path = f"{mutant.parent}{os.pathsep}{ROOT}"
    changed(mutant / "_configs.py", "if reach >= 1 << 31:", "if True:")
    rows = generated("sm_80", "float32", ATTENTION, "ieee", "mutant", path)
    assert {row["constants"]["WIDE"] for row in rows if "WIDE" in row["constants"]} == {True}
    assert not [row["kernel"] for row in rows if row["narrow"]]

    changed(mutant / "_math.py", "offs = offs.to(tl.int64)", "pass")
    changed(mutant / "_math.py", "input_precision=PRECISION, ", "")
    rows = generated("sm_80", "float32", ATTENTION, "ieee", "mutant", path)
    assert {tuple(row["dots"]) for row in rows} == {(), ("tf32",)}
    narrow = {row["kernel"] for row in rows if narrow_by_mistake(row)}
    assert narrow == {row["kernel"] for row in rows if "WIDE" in row["constants"]}
    assert len(narrow) == 9
