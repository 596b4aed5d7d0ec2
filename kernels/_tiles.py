# SPDX-License-Identifier: Apache-2.0
"""Tiles of every kernel: a table per architecture and number format, and a formula for few classes.

A tile is a function of kind, dtype, precision, sizes and target alone: nothing is timed at run
time. Where a user has asked for a table that `vtclip tune` timed, its entry of exactly these sizes
is taken instead. The one state is which function the launchers ask, `choosing` and `use_tuned`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
import triton

from vtclip.kernels import _configs
from vtclip.kernels._configs import Target, launch_options, multiprocessors, padded


class Tile(NamedTuple):
    """Attention: class rows and columns of one program and how it is launched."""

    block_k: int
    block_l: int
    num_warps: int
    num_stages: int

    launch = launch_options


class HeadTile(NamedTuple):
    """rational_head: class rows, output columns and summed columns of one step."""

    block_k: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int

    launch = launch_options


class CosineTile(NamedTuple):
    """Products of cosine_logits: rows of either side and columns of one step."""

    block_n: int
    block_j: int
    block_d: int
    num_warps: int
    num_stages: int

    launch = launch_options


class ColumnTile(NamedTuple):
    """ffn_cosine_logits, which reads its product: class rows and columns of one step."""

    block_k: int
    block_n: int
    num_warps: int
    num_stages: int

    launch = launch_options


class RowTile(NamedTuple):
    """Kernels without a product: elements of a tile of rows."""

    elements: int


AnyTile = Tile | HeadTile | CosineTile | ColumnTile | RowTile
ATTENTION_SIZES = ("B", "H", "K", "L", "d")


class Kind(NamedTuple):
    """What a tile of some kernel consists of, and the sizes it is chosen by."""

    tile: type[AnyTile]
    sizes: tuple[str, ...]


KINDS: dict[str, Kind] = {
    "fwd": Kind(Tile, ATTENTION_SIZES),
    "bwd_query": Kind(Tile, ATTENTION_SIZES),
    "bwd_key": Kind(Tile, ATTENTION_SIZES),
    "weights": Kind(Tile, ATTENTION_SIZES),
    "weights_bwd": Kind(Tile, ATTENTION_SIZES),
    # K rows, one more with an image query; L = number of classes
    "rational_fwd": Kind(Tile, ATTENTION_SIZES),
    "rational_bwd_query": Kind(Tile, ATTENTION_SIZES),
    "rational_bwd_key": Kind(Tile, ATTENTION_SIZES),
    "rational_one_bwd": Kind(Tile, ATTENTION_SIZES),
    "head_fwd": Kind(HeadTile, ("B", "K", "D")),
    "head_bwd": Kind(HeadTile, ("B", "K", "D")),
    "cosine_fwd": Kind(CosineTile, ("B", "K", "D")),
    "cosine_gather": Kind(CosineTile, ("N", "J", "D")),
    "ffn_cosine_fwd": Kind(ColumnTile, ("B", "K", "D")),
    "ffn_cosine_bwd": Kind(ColumnTile, ("B", "K", "D")),
    "norm_cosine_fwd": Kind(RowTile, ("B", "K", "D")),
    "norm_cosine_bwd": Kind(RowTile, ("B", "K", "D")),
    "rational_logits": Kind(RowTile, ("B", "K", "D")),
    "unit_products_fwd": Kind(RowTile, ("B", "K", "D")),
    "unit_products_bwd": Kind(RowTile, ("B", "K", "D")),
}
_ATTENTION = [name for name, kind in KINDS.items() if kind.tile is Tile]

# (block_k, block_l, num_warps, num_stages) for d up to 64, 128, 256, chosen by compiling for sm_80,
# sm_90, sm_100 and gfx942: the largest tiles tried that spill no register, but for the few float32
# cases that tests/kernels/test_compile.py names. Run time: not measured.
# "ieee" is float32 without tensor cores, "small" is for 64 KiB of shared memory; others fit into
# the 99 KiB of sm_86, sm_89 and sm_120.
_TILES = {
    "half": {
        "fwd": ((128, 64, 8, 2), (128, 32, 8, 2), (32, 32, 8, 1)),
        "fwd in one step": ((128, 64, 8, 2), (128, 64, 8, 1), (32, 32, 8, 1)),
        "bwd_query": ((64, 32, 4, 2), (64, 64, 8, 2), (32, 32, 8, 1)),
        "bwd_key": ((32, 64, 4, 1), (32, 64, 4, 1), (32, 32, 8, 2)),
        "weights": ((64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 1)),
        "weights_bwd": ((32, 64, 8, 1), (32, 64, 8, 1), (32, 32, 8, 1)),
        "rational_fwd": ((64, 32, 4, 2), (32, 32, 4, 2), (32, 32, 8, 1)),
        "rational_bwd_query": ((32, 32, 4, 2), (32, 64, 4, 1), (32, 32, 8, 1)),
        "rational_bwd_key": ((32, 64, 4, 2), (64, 32, 8, 2), (32, 16, 8, 1)),
        "rational_one_bwd": ((32, 32, 2, 1), (32, 32, 8, 1), (16, 16, 8, 1)),
    },
    "tf32": {
        "fwd": ((64, 32, 4, 2), (64, 32, 8, 2), (32, 32, 8, 1)),
        "bwd_query": ((32, 32, 4, 1), (32, 32, 8, 1), (32, 16, 8, 1)),
        "bwd_key": ((32, 32, 4, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
        "weights": ((32, 32, 4, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
        "weights_bwd": ((32, 32, 4, 1), (32, 32, 8, 1), (16, 32, 8, 1)),
        "rational_fwd": ((32, 32, 4, 1), (32, 32, 8, 1), (32, 16, 8, 1)),
        "rational_bwd_query": ((32, 32, 4, 1), (32, 32, 8, 1), (16, 16, 8, 1)),
        "rational_bwd_key": ((32, 32, 4, 1), (32, 16, 8, 1), (16, 16, 8, 1)),
        "rational_one_bwd": ((32, 32, 4, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    },
    "ieee": {
        "fwd": ((32, 32, 4, 1), (32, 16, 8, 1), (16, 32, 8, 1)),
        "bwd_query": ((32, 32, 4, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
        "bwd_key": ((32, 32, 4, 1), (32, 32, 8, 1), (16, 32, 8, 1)),
        "weights": ((32, 32, 4, 1), (16, 32, 8, 1), (16, 32, 8, 1)),
        "weights_bwd": ((32, 32, 4, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
        "rational_fwd": ((32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)),
        "rational_bwd_query": ((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
        "rational_bwd_key": ((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 16, 1)),
        "rational_one_bwd": ((16, 16, 4, 1), (0, 0, 8, 1), (0, 0, 8, 1)),  # 0: never
    },
    "small half": dict.fromkeys(_ATTENTION, ((32, 32, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1))),
    "small float32": dict.fromkeys(_ATTENTION, ((32, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1))),
    "interpreter": dict.fromkeys(_ATTENTION, ((32, 64, 4, 1),) * 3),
}
_HALF = _TILES["half"]
# Tensor cores of sm_90 take 64 rows of four warps, and all warps of chained products lie along the
# rows: eight warps compute 64 rows twice. Up to width 128 four warps leave two blocks to a
# multiprocessor, so that the exponentials of one overlap the products of the other.
_HALF_OF_90 = {
    "fwd": ((64, 64, 4, 2), (64, 64, 4, 2), _HALF["fwd"][2]),
    "fwd in one step": ((64, 64, 4, 2), (64, 64, 4, 2), _HALF["fwd"][2]),
    "bwd_query": ((64, 64, 4, 1), (64, 32, 4, 1), _HALF["bwd_query"][2]),
    "bwd_key": ((64, 64, 4, 2), (32, 64, 4, 2), _HALF["bwd_key"][2]),
    "weights": ((64, 64, 4, 2), (64, 64, 4, 2), _HALF["weights"][2]),
    "weights_bwd": ((64, 64, 4, 1), (32, 64, 4, 1), _HALF["weights_bwd"][2]),
    "rational_fwd": ((64, 64, 4, 2), (64, 32, 4, 2), _HALF["rational_fwd"][2]),
    "rational_bwd_query": ((64, 64, 4, 1), *_HALF["rational_bwd_query"][1:]),
    "rational_bwd_key": ((64, 64, 4, 2), (32, 64, 4, 2), _HALF["rational_bwd_key"][2]),
    "rational_one_bwd": ((64, 64, 4, 1), *_HALF["rational_one_bwd"][1:]),
}
# Tensor memory of sm_100 has 128 lanes, of which 64 rows take half; sums lie there and leave eight
# warps registers for 128 rows.
_HALF_OF_100 = {
    "fwd in one step": _HALF["fwd"],
    "bwd_query": ((128, 32, 8, 2), (128, 32, 8, 1), (32, 32, 8, 1)),
    "bwd_key": ((64, 128, 8, 1), (32, 128, 8, 1), _HALF["bwd_key"][2]),
    "weights_bwd": ((32, 64, 4, 1), *_HALF["weights_bwd"][1:]),
    "rational_fwd": ((64, 64, 8, 2), (64, 32, 8, 1), _HALF["rational_fwd"][2]),
    "rational_bwd_query": ((64, 64, 8, 2), *_HALF["rational_bwd_query"][1:]),
    "rational_bwd_key": ((64, 64, 8, 2), *_HALF["rational_bwd_key"][1:]),
    "rational_one_bwd": ((64, 64, 8, 1), *_HALF["rational_one_bwd"][1:]),
}
# by the first digits of the capability: sm_120 multiplies as sm_80 does
_HALF_OF = {9: _HALF_OF_90, 10: _HALF_OF_100}
# How many of their programs share a multiprocessor of sm_90, by the registers of the compiled code:
# the last wave of a launch costs as much as a full one. Keys that are masked take registers too.
_RESIDENT_OF_90 = {
    "fwd": (3, 2, 1),
    "masked fwd": (2, 2, 1),
    "norm_cosine_bwd": (2, 2, 2),
} | dict.fromkeys(("bwd_query", "weights", "weights_bwd", "rational_bwd_query"), (2, 2, 1))
# in the order of HeadTile
_HEAD_TILES = {
    "half": {"head_fwd": (64, 64, 64, 8, 3), "head_bwd": (64, 64, 64, 8, 3)},
    "tf32": {"head_fwd": (64, 64, 32, 8, 2), "head_bwd": (64, 64, 32, 8, 2)},
    "ieee": {"head_fwd": (64, 64, 16, 8, 1), "head_bwd": (16, 32, 16, 8, 1)},
    "small half": {"head_fwd": (64, 64, 32, 4, 1), "head_bwd": (64, 64, 32, 8, 1)},
    "small float32": {"head_fwd": (64, 64, 32, 4, 1), "head_bwd": (64, 64, 32, 8, 1)},
    "interpreter": {"head_fwd": (32, 32, 32, 4, 1), "head_bwd": (32, 32, 32, 4, 1)},
}
# the same for every target
_OTHER_TILES = {
    "cosine_fwd": (32, 32, 64, 4, 2),
    "cosine_gather": (32, 32, 64, 8, 2),
    "ffn_cosine_fwd": (16, 128, 4, 1),
    "ffn_cosine_bwd": (32, 64, 4, 1),
    "norm_cosine_fwd": (2048,),
    "norm_cosine_bwd": (4096,),
    "rational_logits": (4096,),
    "unit_products_fwd": (4096,),
    "unit_products_bwd": (2048,),
}

ONE_STEP = 64  # keys up to so many may take one step, which carries no sums along
SMALL_K = 128  # up to so many classes, programs may be too few for the device: tiles by waves
_BY_WAVES = ("fwd", "bwd_query", "weights")  # a program per tile of classes; shorter ones fit
KEYS_AS_ROWS = 16  # loading the keys and values of an image costs about so many rows of queries


def family(dtype: torch.dtype, precision: str, target: Target) -> str:
    """The part of the table: interpreter, small shared memory, or how products are computed."""
    if target.backend == "interpreter":
        return "interpreter"
    if target.shared_bytes < 99 * 1024:
        return "small float32" if dtype == torch.float32 else "small half"
    return precision if dtype == torch.float32 else "half"


def built_in(
    kind: str, dtype: torch.dtype, precision: str, sizes: tuple[int, ...], target: Target
) -> AnyTile:
    """The tile without a user's table; it may be larger than the problem."""
    part = family(dtype, precision, target)
    if kind in _OTHER_TILES:
        return KINDS[kind].tile(*_OTHER_TILES[kind])
    if KINDS[kind].tile is HeadTile:
        return HeadTile(*_HEAD_TILES[part][kind])
    B, H, K, L, d = sizes
    table = _TILES[part]
    if part == "half":
        table = table | _HALF_OF.get(target.capability // 10, {})
    width = 0 if padded(d) <= 64 else 1 if padded(d) <= 128 else 2
    one_step = f"{kind} in one step"
    if L > ONE_STEP or one_step not in table:
        one_step = kind
    tile = Tile(*table[one_step][width])
    if kind in _BY_WAVES and K <= SMALL_K and part != "interpreter":
        # by compiling, as the tiles: keys and values of width 256 spill four warps' registers
        fewest = tile.num_warps if kind == "fwd" and width == 2 else 4
        return by_waves(tile, B * H, K, precision, target, fewest)
    return tile


def by_waves(
    tile: Tile, maps: int, K: int, precision: str, target: Target, fewest: int = 4
) -> Tile:
    """`tile` or a shorter one, whichever is done first with `maps` score maps of K rows each.

    Time is taken to be waves * (rows of a tile + KEYS_AS_ROWS). From sm_90 on, tensor cores reach
    their rate with 64 rows; with fewer a row costs twice as much. Of equals the longest is taken.
    A warp has 16 rows; where they are few, `fewest` warps share the loads and repeat each other.
    """
    full_rate = 64 if target.capability >= 90 and precision != "ieee" else 16
    chosen, least = tile, None
    while True:
        rows = tile.block_k
        waves = triton.cdiv(maps * triton.cdiv(K, rows), multiprocessors(target))
        cost = waves * (rows * (1 if rows >= full_rate else 2) + KEYS_AS_ROWS)
        if least is None or cost < least:
            chosen, least = tile, cost
        if rows <= 16:
            return chosen
        warps = min(tile.num_warps, max(fewest, rows // 32))
        tile = tile._replace(block_k=rows // 2, num_warps=warps)


# sizes of the problem that bound the blocks of a tile
_BOUNDS: dict[type[AnyTile], dict[str, str]] = {
    Tile: {"block_k": "K", "block_l": "L"},
    HeadTile: {"block_k": "K", "block_n": "D", "block_d": "D"},
    ColumnTile: {"block_k": "K", "block_n": "D"},
}


def fitted(kind: str, tile: AnyTile, sizes: tuple[int, ...]) -> AnyTile:
    """`tile`, no larger than the problem."""
    size = dict(zip(KINDS[kind].sizes, sizes, strict=True))
    bounds = _BOUNDS.get(type(tile), {})
    return tile._replace(
        **{block: min(getattr(tile, block), padded(size[name])) for block, name in bounds.items()}
    )


def entry_name(kind: str, dtype: torch.dtype, precision: str, sizes: tuple[int, ...]) -> str:
    """Key of a user's table, such as "fwd bfloat16 tf32 B32 H8 K1000 L49 d64"."""
    named = zip(KINDS[kind].sizes, sizes, strict=True)
    words = (kind, str(dtype).removeprefix("torch."), precision)
    return " ".join((*words, *(f"{name}{size}" for name, size in named)))


# from (kind, dtype, precision, sizes, target), the sizes in the order of `KINDS[kind].sizes`
Chooser = Callable[[str, torch.dtype, str, tuple[int, ...], Target], AnyTile]
# by (device name, capability), then by `entry_name`
Tables = Mapping[tuple[str, int], Mapping[str, tuple[int, ...]]]


def from_tables(tables: Tables) -> Chooser:
    """Takes tiles from `tables`, whose entries are trusted, and where they have none built-in ones.

    It remembers what it returned: formatting a table's key would take a launch some microseconds.
    """

    @functools.lru_cache(maxsize=4096)
    def chooser(
        kind: str, dtype: torch.dtype, precision: str, sizes: tuple[int, ...], target: Target
    ) -> AnyTile:
        table = tables.get((target.name, target.capability), {})
        numbers = table.get(entry_name(kind, dtype, precision, sizes)) if table else None
        if numbers is None:
            tile = built_in(kind, dtype, precision, sizes, target)
        else:
            tile = KINDS[kind].tile(*numbers)
        return fitted(kind, tile, sizes)

    return chooser


_chooser: Chooser = from_tables({})  # of all threads: a backward runs in torch's own


def choose(
    kind: str, dtype: torch.dtype, precision: str, sizes: tuple[int, ...], target: Target
) -> AnyTile:
    """The tile of a launch; `sizes` in the order of `KINDS[kind].sizes`."""
    return _chooser(kind, dtype, precision, sizes, target)


def plan(kind: str, tensor: torch.Tensor, sizes: tuple[int, ...]) -> tuple[AnyTile, str, Target]:
    """(tile, `tl.dot`'s input precision, target) of a launch that multiplies `tensor`."""
    target = _configs.target_of(tensor)
    precision = _configs.input_precision(tensor.dtype, target)
    return choose(kind, tensor.dtype, precision, sizes, target), precision, target


def use_tuned(tables: Tables) -> None:
    """Launchers take tiles from `tables` from now on; {} goes back to the built-in ones."""
    global _chooser
    _chooser = from_tables(tables)


@contextmanager
def choosing(chooser: Chooser) -> Iterator[None]:
    """Within it launchers take their tiles from `chooser`."""
    global _chooser
    before, _chooser = _chooser, chooser
    try:
        yield
    finally:
        _chooser = before


def resident(kind: str, dtype: torch.dtype, d: int, target: Target) -> int | None:
    """How many programs of a built-in tile a multiprocessor holds; None: not known."""
    if target.backend != "cuda" or target.capability // 10 != 9 or dtype == torch.float32:
        return None
    held = _RESIDENT_OF_90.get(kind)
    return held and held[0 if d <= 64 else 1 if d <= 128 else 2]


WORKSPACE_ROWS = 16384  # of a matrix [B, K, .] between a kernel and torch.mm


def images_at_a_time(B: int, K: int) -> int:
    """How many of B > 0 images with K > 0 rows each go through such a workspace together."""
    return min(B, max(1, WORKSPACE_ROWS // K))


FINISH = 16  # a second launch costs about so many steps of rational_head


@functools.lru_cache(maxsize=4096)
def head_splits(programs: int, D: int, tile: HeadTile, target: Target) -> tuple[int, int]:
    """(columns of one split, number of splits) of rational_head's forward.

    The number that is done first: waves * steps of a program, and a second launch where there is
    more than one; of equals the least.
    """
    interpreted = target.backend == "interpreter"
    at_once, finish = (4, 1) if interpreted else (multiprocessors(target), FINISH)
    tiles, steps = triton.cdiv(D, tile.block_n), triton.cdiv(D, tile.block_d)
    chosen, least = tiles, math.inf
    for held in range(tiles, 0, -1):
        splits = triton.cdiv(tiles, held)
        cost = triton.cdiv(programs * splits, at_once) * held * steps + finish * (splits > 1)
        if cost < least:
            chosen, least = held, cost
    return chosen * tile.block_n, triton.cdiv(tiles, chosen)
