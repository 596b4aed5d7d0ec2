# SPDX-License-Identifier: Apache-2.0
"""Tiles worth timing next to another; `vtclip tune` walks from the built-in tile along them."""

from __future__ import annotations

import torch

from vtclip.kernels._configs import Target, padded
from vtclip.kernels._tiles import KINDS, AnyTile, ColumnTile, CosineTile, HeadTile, RowTile, fitted

REGISTERS = 200  # float32 of one thread that sums and scores may take; the rest is for addresses

# Operands of one step, [rows, d] of classes and [columns, d] of keys, those of them that are loaded
# in every step, and what is held in registers: sums [rows, d], sums [columns, d], maps
_HELD: dict[str, tuple[tuple[int, int], str, tuple[int, int, int]]] = {
    "fwd": ((1, 2), "columns", (1, 0, 1)),
    "bwd_query": ((3, 2), "columns", (1, 0, 2)),
    "bwd_key": ((2, 2), "rows", (0, 2, 2)),
    "weights": ((1, 1), "columns", (0, 0, 1)),
    "weights_bwd": ((1, 1), "columns", (1, 1, 2)),
    "rational_fwd": ((2, 2), "columns", (2, 0, 2)),
    "rational_bwd_query": ((3, 2), "columns", (2, 0, 2)),
    "rational_bwd_key": ((3, 2), "rows", (0, 2, 2)),
    "rational_one_bwd": ((4, 2), "columns", (1, 2, 2)),
}


def fits(
    kind: str, tile: AnyTile, dtype: torch.dtype, sizes: tuple[int, ...], target: Target
) -> bool:
    """Whether a tile leaves room in shared memory and registers, by an estimate from above."""
    if isinstance(tile, RowTile):
        return 512 <= tile.elements <= 16384
    if not (2 <= tile.num_warps <= 8 and 1 <= tile.num_stages <= 4):
        return False
    threads, width = 32 * tile.num_warps, dtype.itemsize
    if isinstance(tile, HeadTile):
        blocks, held = (tile.block_k, tile.block_n, tile.block_d), tile.block_k * tile.block_n * 2
        step = (tile.block_k + tile.block_n) * tile.block_d
        shared = step * width * tile.num_stages
    elif isinstance(tile, CosineTile):
        blocks = (tile.block_n, tile.block_j, tile.block_d)
        sides = (tile.block_n + tile.block_j) * tile.block_d
        held = tile.block_n * max(tile.block_j, tile.block_d) + sides
        shared = (sides + tile.block_n * tile.block_j) * 4 * tile.num_stages
    elif isinstance(tile, ColumnTile):
        blocks, step = (tile.block_k, tile.block_n), tile.block_k * tile.block_n
        # the forward holds three matrices and some sums of them, the backward nine
        held = step * (9 if kind == "ffn_cosine_bwd" else 5)
        shared = 3 * step * width * tile.num_stages
    else:
        blocks = (tile.block_k, tile.block_l)
        d = padded(sizes[4])
        (rows, columns), streamed, (sums_k, sums_l, maps) = _HELD[kind]
        a, b, c = tile.block_k * d, tile.block_l * d, tile.block_k * tile.block_l
        loaded = {"rows": rows * a, "columns": columns * b}[streamed]
        shared = (rows * a + columns * b + (tile.num_stages - 1) * loaded) * width
        shared += maps * c * 4 * (tile.num_stages if kind == "weights_bwd" else 1)
        held = sums_k * a + sums_l * b + maps * c
    small = any(block < 16 or block > 256 for block in blocks)
    return not small and shared <= target.shared_bytes and held <= REGISTERS * threads


def neighbours(
    kind: str, tile: AnyTile, dtype: torch.dtype, sizes: tuple[int, ...], target: Target
) -> list[AnyTile]:
    """Tiles that differ from `tile` in one number, twice or half of it, or one stage; that fit."""
    near: list[AnyTile] = []
    for name, value in zip(tile._fields, tile, strict=True):
        others = (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2)
        for other in others:
            changed = fitted(kind, tile._replace(**{name: other}), sizes)
            if changed not in (tile, *near) and fits(kind, changed, dtype, sizes, target):
                near.append(changed)
    if kind == "rational_one_bwd":  # all classes lie in one tile, on both sides
        return [changed for changed in near if changed[:2] == tile[:2]]
    return near


def valid(kind: str, numbers: object) -> bool:
    """Whether `numbers`, from a file, can be a tile of `kind` at all."""
    if kind not in KINDS or not isinstance(numbers, list | tuple):
        return False
    fields = KINDS[kind].tile._fields
    if len(numbers) != len(fields) or not all(type(number) is int for number in numbers):
        return False
    for name, number in zip(fields, numbers, strict=True):
        low, high = {
            "num_stages": (1, 8),
            "num_warps": (1, 32),
            "elements": (16, 65536),
        }.get(name, (16, 256))
        power = number & (number - 1) == 0 or name == "num_stages"
        if not (low <= number <= high and power):
            return False
    return True
