# SPDX-License-Identifier: Apache-2.0
"""Launch configurations of kernels around a large matrix product, and who computes it."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton

from . import _configs

ROWS = 16384  # rows of a stored product at a time


class GemmTile(NamedTuple):
    """Class rows, output columns and summed columns of one step."""

    block_k: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int

    launch = _configs.launch_options


def stores_product(target: _configs.Target) -> bool:
    """Whether ffn_cosine_logits reads hidden weight^T, made by torch.mm for ROWS rows at a time.

    Else its kernels make tiles of the product themselves and store nothing. By arithmetic, at
    32000 rows, C = 1024 and F = 4096 in bfloat16 on an H100-class device: writing and reading the
    product is 30 us beside 340 us of tensor cores, so a kernel of ours has to reach about 90 % of
    the library's rate to win. Plain Triton tiles without warp specialisation or persistence stay
    below that at these sizes by published numbers; ours were not measured. The interpreter has
    no library to prefer.
    """
    return target.backend != "interpreter"


# (block_k, block_n, block_d, num_warps, num_stages), chosen by compiling for sm_80, sm_90, sm_100
# and gfx942: no register spilled. "fwd" and "bwd" make their product, "sums" and "grad" read it.
# "ieee" is float32 without tensor cores, "small" is for 64 KiB of shared memory. Run time: not
# measured.
_TILES = {
    "half": {
        "fwd": (64, 64, 64, 8, 3),
        "bwd": (64, 64, 64, 8, 3),
        "sums": (16, 128, 16, 4, 1),
        "grad": (32, 64, 16, 4, 1),
    },
    "tf32": {
        "fwd": (64, 64, 32, 8, 2),
        "bwd": (64, 64, 32, 8, 2),
        "sums": (16, 128, 16, 4, 1),
        "grad": (32, 64, 16, 4, 1),
    },
    "ieee": {
        "fwd": (64, 64, 16, 8, 1),
        "bwd": (32, 32, 16, 8, 1),
        "sums": (16, 128, 16, 4, 1),
        "grad": (32, 64, 16, 4, 1),
    },
    "small": {
        "fwd": (64, 64, 32, 4, 1),
        "bwd": (64, 64, 32, 8, 1),
        "sums": (16, 128, 16, 4, 1),
        "grad": (32, 64, 16, 4, 1),
    },
    "interpreter": dict.fromkeys(("fwd", "bwd", "sums", "grad"), (32, 32, 32, 4, 1)),
}


def tile(
    kind: str, dtype: torch.dtype, K: int, C: int, F: int, target: _configs.Target
) -> GemmTile:
    """Tile of a kernel, no larger than the problem."""
    if target.backend == "interpreter":
        family = "interpreter"
    elif target.shared_bytes < 99 * 1024:
        family = "small"
    else:
        half = dtype != torch.float32
        family = "half" if half else _configs.input_precision(dtype, target)
    block_k, block_n, block_d, num_warps, num_stages = _TILES[family][kind]
    return GemmTile(
        min(block_k, _configs.padded(K)),
        min(block_n, _configs.padded(C)),
        min(block_d, _configs.padded(F)),
        num_warps,
        num_stages,
    )


def splits(
    programs: int, C: int, F: int, chosen: GemmTile, target: _configs.Target
) -> tuple[int, int]:
    """(columns of one split, number of splits) for a forward that makes its product.

    A second launch costs as much as some dozens of steps, so short problems are not split; others
    are, while their programs do not fill a device. The number does not depend on the device, so
    that neither does the order of summation.
    """
    interpreted = target.backend == "interpreter"
    tiles = triton.cdiv(C, chosen.block_n)
    short = tiles * triton.cdiv(F, chosen.block_d) <= (3 if interpreted else 64)
    wanted = 4 if interpreted else 128
    count = 1 if short else min(tiles, triton.cdiv(wanted, programs))
    columns = triton.cdiv(tiles, count) * chosen.block_n
    return columns, triton.cdiv(C, columns)
