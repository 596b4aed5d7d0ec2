# SPDX-License-Identifier: Apache-2.0
"""Launch configurations: pure functions of shapes, dtype and target. Nothing is timed at run time."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton

MAX_HEAD_DIM = 256  # cross_attn, cross_attn_weights: one padded [rows, d] tile
MAX_WIDTH = 16384  # cosine_logits, norm_cosine_logits: one row of a program


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


@functools.lru_cache(maxsize=None)
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
    """How `tl.dot` treats float32: as torch.matmul is told to on the same device."""
    if dtype != torch.float32 or target.backend != "cuda":
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def accumulate_precision(dtype: torch.dtype, target: Target) -> str:
    """The same for float32 intermediates of `dtype` tensors: tf32 carries all bits of 16-bit ones."""
    if dtype != torch.float32 and target.backend == "cuda":
        return "tf32"
    return input_precision(dtype, target)


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


def attention(kind: str, dtype: torch.dtype, d: int, K: int, L: int, target: Target) -> Tile:
    """Tile of an attention kernel; kind is "fwd", "bwd_query", "bwd_key" or "weights"."""
    block_d = padded(d)
    row = (target.backend == "interpreter", dtype == torch.float32, block_d)
    block_k, block_l, num_warps, num_stages = _attention_row(kind, row, dtype, target)
    return Tile(min(block_k, padded(K)), min(block_l, padded(L)), num_warps, num_stages)


def _attention_row(
    kind: str, row: tuple[bool, bool, int], dtype: torch.dtype, target: Target
) -> tuple[int, int, int, int]:
    interpreted, is_float32, block_d = row
    if interpreted:
        return 32, 64, 4, 1
    return 64, 64, 4, 1


def row_tile(width: int, elements: int) -> tuple[int, int, int]:
    """(rows, BLOCK_D, num_warps) of a kernel that holds whole rows in registers."""
    block_d = padded(width)
    rows = max(1, elements // block_d)
    return rows, block_d, min(16, max(4, rows * block_d // 1024))
