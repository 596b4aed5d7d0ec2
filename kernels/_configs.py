# SPDX-License-Identifier: Apache-2.0
"""What launchers ask before a launch: device, precision, limits, strides, how to split a batch.

Everything is a function of shapes, dtype and target. Tiles are chosen in _tiles.py.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton

from vtclip.kernels._limits import why_not


class Target(NamedTuple):
    """What a configuration may depend on besides the problem."""

    backend: str  # "cuda", "hip" or "interpreter"
    capability: int  # 80, 90, 100, ...; 0 where it has no meaning
    shared_bytes: int  # shared memory one program may ask for
    name: str = ""  # of the device; only tables a user has tuned look at it


@functools.cache
def _cuda_target(index: int) -> Target:
    info = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        return Target("hip", 0, 64 * 1024, info.name)
    capability = 10 * info.major + info.minor
    return Target("cuda", capability, info.shared_memory_per_block_optin, info.name)


def _launch_options(tile: Any) -> dict[str, int | bool]:
    # the default of enable_fp_fusion differs between Triton versions
    return {"num_warps": tile.num_warps, "num_stages": tile.num_stages, "enable_fp_fusion": True}


# `launch` of every kind of tile: a NamedTuple takes no second base class that could define it
launch_options = property(_launch_options)


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
    reasons = why_not(tensor.dtype, width, limit)
    if reasons:
        raise NotImplementedError(f"{op}: Triton cannot run this ({', '.join(reasons)})")


def mask_argument(
    key_mask: torch.Tensor | None, stand_in: torch.Tensor
) -> tuple[torch.Tensor, tuple[int, int]]:
    """Pointer and (image, column) strides of a bool [B|1, L] mask; `stand_in` is never read."""
    if key_mask is None:
        return stand_in, (0, 0)
    stride_b = 0 if key_mask.shape[0] == 1 else key_mask.stride(0)
    return key_mask.view(torch.uint8), (stride_b, key_mask.stride(1))


def wide(*matrices: torch.Tensor | None) -> bool:
    """Whether an offset within the last two dimensions of a tensor may need 64 bits.

    Indices go a tile, of 256 at most, beyond the sizes; offsets of images and heads always have 64.
    So have all of float32, whose tiles spill more registers with 32 (by compiling for sm_80).
    """
    for tensor in matrices:
        if tensor is not None:
            if tensor.dtype == torch.float32:
                return True
            (rows, columns), (row, column) = tensor.shape[-2:], tensor.stride()[-2:]
            reach = (rows + 256) * max(abs(row), 1) + (columns + 256) * max(abs(column), 1)
            if reach >= 1 << 31:
                return True
    return False


def query_strides(query: torch.Tensor) -> tuple[int, ...]:
    """Strides that repeat a shared query [1, H, K, d] for every image."""
    return (0 if query.shape[0] == 1 else query.stride(0), *query.stride()[1:])


def kinds(
    image_query: torch.Tensor | None,
    text_query: torch.Tensor | None,
    pair_query: torch.Tensor | None,
) -> dict[str, bool]:
    """Which queries rational_attn has, as its kernels' switches."""
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


def query_slices(d_query: torch.Tensor, chunks: int) -> torch.Tensor:
    """`d_query` [B|1, H, K, d] itself, or for a shared query a float32 slice for each chunk."""
    if d_query.shape[0] == chunks:
        return d_query
    _, H, K, d = d_query.shape
    return d_query.new_empty((chunks, K, H, d), dtype=torch.float32).transpose(1, 2)


def padded(size: int) -> int:
    """Power of two >= 16 that holds `size`."""
    return max(16, triton.next_power_of_2(size))


# Multiprocessors of the data-centre or largest part of an architecture. Not asked of the device, so
# that the order of summation is the same on every part of one architecture.
_MULTIPROCESSORS = {70: 80, 75: 68, 80: 108, 86: 84, 89: 142, 90: 132, 100: 148, 103: 148, 120: 188}


def multiprocessors(target: Target) -> int:
    """How many programs run side by side where each takes a multiprocessor."""
    if target.backend == "hip":
        return 304
    return _MULTIPROCESSORS.get(target.capability, 132)


@functools.lru_cache(maxsize=4096)
def images_per_program(
    B: int, programs_per_image: int, target: Target, resident: int | None = None
) -> int:
    """How many images one program streams past its query tile.

    The split into chunks that is done first: waves * (images of a chunk + 1), where 1 stands for
    loading the query tile and leaving its result; of equals the one with the fewest chunks.
    resident: how many programs one multiprocessor holds at once, all of which make a wave. Where it
    is not known, waves are counted as of one, and each multiprocessor gets two to eight programs,
    as far as there are images.
    """
    per_image = max(1, programs_per_image)
    if target.backend == "interpreter":
        return max(1, triton.cdiv(B, min(triton.cdiv(4, per_image), max(1, B))))
    processors = multiprocessors(target)
    at_once = processors * (resident or 1)
    fewest = 1 if resident else 2 * processors
    chosen, least = 1, math.inf
    for wanted in range(triton.cdiv(fewest, per_image), triton.cdiv(8 * processors, per_image) + 1):
        images = max(1, triton.cdiv(B, wanted))
        programs = triton.cdiv(B, images) * per_image
        cost = triton.cdiv(programs, at_once) * (images + 1)
        if cost < least and programs >= fewest:
            chosen, least = images, cost
    return chosen


def row_tile(width: int, elements: int, of_a_thread: int = 16) -> tuple[int, int, int]:
    """(rows, BLOCK_D, num_warps) of a kernel that holds whole rows in registers."""
    block_d = padded(width)
    rows = max(1, elements // block_d)
    return rows, block_d, min(16, max(4, rows * block_d // (32 * of_a_thread)))
