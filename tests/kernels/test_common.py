# SPDX-License-Identifier: Apache-2.0
"""Launches of the same numbers give the same bits; what no kernel has is refused before one."""

import importlib
import itertools
import re
from pathlib import Path

import pytest
import torch

from vtclip.testing.problems import OPS

ROOT = Path(__file__).parents[2]
# several tiles of rows and of images, none of them full
REPEATED = [
    ("cross_attn", {"B": 7, "H": 2, "K": 33, "L": 49, "d": 16}),
    ("ffn_cosine_logits", {"B": 5, "K": 40, "C": 64, "F": 48}),
    ("norm_cosine_logits", {"B": 9, "K": 40, "C": 64}),
    ("rational_attn", {"B": 5, "H": 2, "K": 20, "d": 8}),
    ("rational_attn", {"B": 5, "H": 2, "K": 70, "d": 8}),
]
# kernel -> largest width, its name, and the forward of one row
FORWARDS = {
    "cosine_logits": (16384, "width", lambda op, x: op.cosine_logits_fwd(x[0, 0], x[0, 0], 1.0)),
    "cross_attn": (256, "head width", lambda op, x: op.cross_attn_fwd(x, x, x, None, 1.0)),
    "rational_attn": (
        256,
        "head width",
        lambda op, x: op.rational_attn_fwd(None, None, x, x, x, 1.0, False),
    ),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_float64_and_wide_rows_are_refused(name, device):
    largest, what, forward = FORWARDS[name]
    op = importlib.import_module(f"vtclip.kernels.{name}")
    with pytest.raises(NotImplementedError, match=f"{name}: .*has no float64 kernel"):
        forward(op, torch.zeros(1, 1, 1, 1, dtype=torch.float64, device=device))
    with pytest.raises(NotImplementedError, match=f"{what} {largest + 1} is above {largest}"):
        forward(op, torch.zeros(1, 1, 1, largest + 1, device=device))


def test_every_grid_has_one_axis():
    """The others end at 65,535 blocks, which images and classes would pass."""
    for path in (ROOT / "kernels").glob("*.py"):
        axes = re.findall(r"program_id\((.*?)\)", path.read_text())
        assert set(axes) <= {"0"}, path
    for path in (ROOT / "csrc" / "cuda").rglob("*.cu*"):
        assert not re.search(r"(blockIdx|gridDim)\.[yz]", path.read_text()), path


@pytest.mark.parametrize(("name", "sizes"), REPEATED)
def test_runs_are_bitwise_equal(name, sizes, device):
    kernels = vars(importlib.import_module(f"vtclip.kernels.{name}"))
    inputs = OPS[name].draw(sizes, device=device)
    first, *others = (OPS[name].run(kernels.__getitem__, inputs) for _ in range(3))
    for again in others:
        for one, other in zip(itertools.chain(*first), itertools.chain(*again), strict=True):
            assert torch.equal(one, other)
