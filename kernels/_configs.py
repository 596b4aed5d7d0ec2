# SPDX-License-Identifier: Apache-2.0
"""Launch configurations: functions of shapes, dtype and target, never timed at run time."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton

MAX_HEAD_DIM = 256  # cross_attn, cross_attn_weights: one padded [rows, d] tile
MAX_WIDTH = 16384  # cosine_logits, norm_cosine_logits: one row of a program

_KINDS = (
    "fwd",
    "bwd_query",
    "bwd_key",
    "weights",
    "weights_bwd",
    "rational_fwd",
    "rational_bwd_query",
    "rational_bwd_key",
    "rational_one_bwd",
)


class Target(NamedTuple):
    """What a configuration may depend on besides the problem."""

    backend: str  # "cuda", "hip" or "interpreter"
    capability: int  # 80, 90, 100, ...; 0 where it has no meaning
    shared_bytes: int  # shared memory one program may ask for


class Tile(NamedTuple):
    """Class rows and columns of one program and how it is launched."""

    block_k: int
    block_l: int
    num_warps: int
    num_stages: int

    @property
    def launch(self) -> dict[str, int | bool]:
        # the default of enable_fp_fusion differs between Triton versions
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }


@functools.cache
def _cuda_target(index: int) -> Target:
    info = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return Target("hip", 0, 64 * 1024)
    return Target("cuda", 10 * info.major + info.minor, info.shared_memory_per_block_optin)


def target_of(tensor: torch.Tensor) -> Target:
    if tensor.is_cuda:
        return _cuda_target(tensor.get_device())
    return Target("interpreter", 0, 1 << 30)


def input_precision(dtype: torch.dtype, target: Target) -> str:
    """How `tl.dot` treats float32 operands, given `dtype` tensors: as torch.matmul is told to.

    tf32 carries all bits of 16-bit types, so there it serves for float32 intermediates.
    """
    if target.backend != "cuda":
        return "ieee"
    allowed = dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def check(op: str, tensor: torch.Tensor, width: int, limit: int) -> None:
    """Refuse what would silently lose precision or cannot be tiled."""
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise NotImplementedError(
            f"{op}: Triton kernels take float16, bfloat16 and float32, got {tensor.dtype}"
        )
    if width > limit:
        raise NotImplementedError(f"{op}: Triton kernels take widths up to {limit}, got {width}")


def mask_argument(
    key_mask: torch.Tensor | None, stand_in: torch.Tensor
) -> tuple[torch.Tensor, tuple[int, int]]:
    """Pointer and (image, column) strides of a bool [B|1, L] mask; `stand_in` is never read."""
    if key_mask is None:
        return stand_in, (0, 0)
    stride_b = 0 if key_mask.shape[0] == 1 else key_mask.stride(0)
    return key_mask.view(torch.uint8), (stride_b, key_mask.stride(1))


def query_strides(query: torch.Tensor) -> tuple[int, ...]:
    """Strides that repeat a shared query [1, H, K, d] for every image."""
    return (0 if query.shape[0] == 1 else query.stride(0), *query.stride()[1:])


def kinds(
    image_query: torch.Tensor | None,
    text_query: torch.Tensor | None,
    pair_query: torch.Tensor | None,
) -> dict[str, bool]:
    """Which queries rational_attn was given, as its kernels' switches."""
    return {
        "HAS_IMAGE": image_query is not None,
        "HAS_TEXT": text_query is not None,
        "HAS_PAIR": pair_query is not None,
    }


def query_arguments(
    image_query: torch.Tensor | None,
    text_query: torch.Tensor | None,
    pair_query: torch.Tensor | None,
    stand_in: torch.Tensor,
) -> tuple[list[torch.Tensor], list[int]]:
    """Pointers and strides (b, h, d; b, h, k, d twice); of an absent query never read."""
    queries = (image_query, text_query, pair_query)
    image, text, pair = (
        [0, 0, 0, 0] if query is None else list(query_strides(query)) for query in queries
    )
    strides = [*image[:2], image[3], *text, *pair]
    return [stand_in if query is None else query for query in queries], strides


def slices(out: torch.Tensor, count: int) -> torch.Tensor:
    """`out` itself for one slice, else float32 [count, *out.shape] for `sum_partials`."""
    if count == 1:
        return out
    return out.new_empty((count, *out.shape), dtype=torch.float32)


def padded(size: int) -> int:
    """Power of two >= 16 that holds `size`."""
    return max(16, triton.next_power_of_2(size))


def images_per_program(B: int, programs_per_image: int, target: Target) -> int:
    """How many images one program streams past its query tile.

    Enough programs stay to fill a large device about four times; the number does not depend on
    the device, so that neither does the order of summation.
    """
    wanted = 4 if target.backend == "interpreter" else 512
    chunks = min(max(1, triton.cdiv(wanted, max(1, programs_per_image))), max(1, B))
    return max(1, triton.cdiv(B, chunks))


# (block_k, block_l, num_warps, num_stages) for d up to 64, 128, 256, chosen by compiling for sm_80,
# sm_90, sm_100 and gfx942: the largest tiles tried that spill no register, but for the few float32
# cases that tests/kernels/test_compile.py names. Run time: not measured.
# "ieee" is float32 without tensor cores, "small" is for 64 KiB of shared memory; others fit into
# the 99 KiB of sm_86, sm_89 and sm_120.
_TILES = {
    "half": {
        "fwd": ((128, 64, 8, 2), (64, 64, 8, 2), (64, 32, 8, 1)),
        "bwd_query": ((64, 64, 4, 2), (64, 64, 8, 2), (32, 32, 8, 1)),
        "bwd_key": ((32, 64, 8, 2), (32, 64, 8, 2), (32, 32, 8, 2)),
        "weights": ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 8, 2)),
        "weights_bwd": ((32, 64, 8, 1), (32, 64, 8, 1), (32, 32, 8, 1)),
        "rational_fwd": ((64, 32, 8, 2), (64, 32, 8, 1), (32, 32, 8, 1)),
        "rational_bwd_query": ((64, 32, 8, 2), (32, 64, 8, 1), (32, 32, 8, 1)),
        "rational_bwd_key": ((64, 32, 8, 2), (64, 32, 8, 2), (32, 16, 8, 1)),
        "rational_one_bwd": ((32, 32, 4, 1), (32, 32, 8, 1), (16, 16, 8, 1)),
    },
    "tf32": {
        "fwd": ((64, 32, 4, 2), (64, 32, 8, 2), (32, 32, 8, 1)),
        "bwd_query": ((32, 32, 4, 1), (32, 32, 8, 1), (32, 16, 8, 1)),
        "bwd_key": ((32, 32, 4, 1), (32, 32, 8, 1), (16, 16, 8, 1)),
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
        "rational_bwd_key": ((32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
        "rational_one_bwd": ((16, 16, 4, 1), (0, 0, 8, 1), (0, 0, 8, 1)),  # 0: never
    },
    "small half": dict.fromkeys(_KINDS, ((32, 32, 4, 1), (32, 32, 4, 1), (16, 32, 4, 1))),
    "small float32": dict.fromkeys(_KINDS, ((32, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1))),
    "interpreter": dict.fromkeys(_KINDS, ((32, 64, 4, 1),) * 3),
}


def attention(kind: str, dtype: torch.dtype, d: int, K: int, L: int, target: Target) -> Tile:
    """Tile of an attention kernel, no larger than the problem."""
    block_d = padded(d)
    width = 0 if block_d <= 64 else 1 if block_d <= 128 else 2
    if target.backend == "interpreter":
        family = "interpreter"
    elif target.shared_bytes < 99 * 1024:
        family = "small float32" if dtype == torch.float32 else "small half"
    else:
        family = input_precision(dtype, target) if dtype == torch.float32 else "half"
    block_k, block_l, num_warps, num_stages = _TILES[family][kind][width]
    if family == "half" and kind == "bwd_query" and target.capability >= 90:
        num_warps, num_stages = 8, 1  # two stages spill there
    if family == "half" and kind.startswith("rational") and width == 0 and target.capability >= 90:
        block_k, block_l, num_warps = 64, 64, 8  # which spill below
    return Tile(min(block_k, padded(K)), min(block_l, padded(L)), num_warps, num_stages)


def row_tile(width: int, elements: int) -> tuple[int, int, int]:
    """(rows, BLOCK_D, num_warps) of a kernel that holds whole rows in registers."""
    block_d = padded(width)
    rows = max(1, elements // block_d)
    return rows, block_d, min(16, max(4, rows * block_d // 512))


HEAD_ROWS = 16384  # rows of d_m that the backward of rational_head keeps at a time


class HeadTile(NamedTuple):
    """Class rows, output columns and summed columns of one step of rational_head."""

    block_k: int
    block_n: int
    block_d: int
    num_warps: int
    num_stages: int

    @property
    def launch(self) -> dict[str, int | bool]:
        return Tile(0, 0, self.num_warps, self.num_stages).launch


# (block_k, block_n, block_d, num_warps, num_stages) for K above 64 and up to 64; see _TILES
_HEAD_TILES = {
    "half": {"fwd": ((64, 64, 64, 8, 3),) * 2, "bwd": ((64, 64, 64, 8, 3),) * 2},
    "tf32": {"fwd": ((64, 64, 32, 8, 2),) * 2, "bwd": ((64, 64, 32, 8, 2),) * 2},
    "ieee": {"fwd": ((64, 64, 16, 8, 1),) * 2, "bwd": ((32, 32, 16, 8, 1),) * 2},
    "small": {"fwd": ((64, 64, 32, 4, 1),) * 2, "bwd": ((64, 64, 32, 8, 1),) * 2},
    "interpreter": {"fwd": ((32, 32, 32, 4, 1),) * 2, "bwd": ((32, 32, 32, 4, 1),) * 2},
}


def head(kind: str, dtype: torch.dtype, K: int, D: int, target: Target) -> HeadTile:
    """Tile of a rational_head kernel, no larger than the problem."""
    if target.backend == "interpreter":
        family = "interpreter"
    elif target.shared_bytes < 99 * 1024:
        family = "small"
    else:
        family = input_precision(dtype, target) if dtype == torch.float32 else "half"
    block_k, block_n, block_d, num_warps, num_stages = _HEAD_TILES[family][kind][K <= 64]
    block_k, block_n, block_d = min(block_k, padded(K)), min(block_n, padded(D)), block_d
    return HeadTile(block_k, block_n, min(block_d, padded(D)), num_warps, num_stages)


def head_splits(programs: int, D: int, tile: HeadTile, target: Target) -> tuple[int, int]:
    """(columns of one split, number of splits) of rational_head's forward.

    A second launch costs as much as some dozens of steps, so short problems are not split; others
    are, while their programs do not fill a device.
    """
    interpreted = target.backend == "interpreter"
    tiles = triton.cdiv(D, tile.block_n)
    short = tiles * triton.cdiv(D, tile.block_d) <= (3 if interpreted else 64)
    wanted = 4 if interpreted else 128
    splits = 1 if short else min(tiles, triton.cdiv(wanted, programs))
    columns = triton.cdiv(tiles, splits) * tile.block_n
    return columns, triton.cdiv(D, columns)
