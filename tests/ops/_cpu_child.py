# SPDX-License-Identifier: Apache-2.0
"""Calls every CPU kernel on fixed inputs; also run as a program, in a process of its own.

python _cpu_child.py results FILE    saves what the kernels return
python _cpu_child.py guard           runs them on memory between two forbidden pages
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from vtclip.backends import native

Make = Callable[..., Tensor]
KERNELS = torch.ops.vtclip
# B, H, K, L, d: ragged, more than one query block, more than one key tile, whole vectors, tiny
SHAPES = ((3, 2, 17, 9, 5), (2, 1, 131, 49, 24), (2, 2, 7, 300, 20), (1, 1, 16, 16, 64), (1,) * 5)


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers, drawn in float64 so that every dtype rounds the same ones."""
    numbers = torch.randn(*shape, dtype=torch.float64)
    return numbers > 0 if dtype == torch.bool else numbers.to(dtype)


def call_all(dtype: torch.dtype, make: Make = random) -> list[Tensor]:
    """Every kernel, forward and backward, with a shared query and one per image."""
    if reason := native.load_cpu():
        raise SystemExit(reason)
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    torch.manual_seed(0)
    results: list[Tensor] = []
    for B, H, K, L, d in SHAPES:
        key, value = make(B, H, L, d, dtype=dtype), make(B, H, L, d, dtype=dtype)
        mask = make(B, L, dtype=torch.bool)
        for Bq in {1, B}:
            query = make(Bq, H, K, d, dtype=dtype)
            for key_mask in (None, mask):
                out, lse = KERNELS.cross_attn_fwd(query, key, value, key_mask, 0.5)
                seeds = make(B, H, K, d, dtype=dtype), make(B, H, K, dtype=acc)
                args = (query, key, value, key_mask, out, lse, 0.5)
                results += [out, lse, *KERNELS.cross_attn_bwd(*seeds, *args)]
                weights = KERNELS.cross_attn_weights_fwd(query, key, key_mask, 0.5)
                seed = make(B, H, K, L, dtype=dtype)
                results.append(weights)
                results += KERNELS.cross_attn_weights_bwd(seed, weights, query, key, 0.5)
        image, seed = make(B, d, dtype=dtype), make(B, K, dtype=dtype)
        for text in (make(K, d, dtype=dtype), make(B, K, d, dtype=dtype)):
            logits, *norms = KERNELS.cosine_logits_fwd(image, text, 3.0)
            results += [logits, *norms]
            results += KERNELS.cosine_logits_bwd(seed, image, text, *norms, 3.0)
        hidden = make(B, K, d, dtype=dtype)
        tail = (make(d, dtype=dtype), make(d, dtype=dtype), make(K, d, dtype=dtype), image)
        forward = KERNELS.norm_cosine_logits_fwd(hidden, *tail, 0.7, 3.0, 1e-5)
        results += forward
        results += KERNELS.norm_cosine_logits_bwd(seed, hidden, *tail, *forward, 0.7, 3.0, 1e-5)
        results += masked_logits(hidden, seed, make)
        results += map_fusion(B, H, K, d, dtype, make)
        results += unit_rows(B, K, d, dtype, make)
        results += feed_forward(hidden, seed, 2 * d + 1, make)
    # more than one weight panel, more than one step of the inner dimension
    wide, seed = make(2, 70, 200, dtype=dtype), make(2, 70, dtype=dtype)
    results += masked_logits(wide, seed, make) + feed_forward(wide, seed, 150, make)
    # more than one chunk of images and of texts, more than one running sum of each
    return results + unit_rows(70, 90, 40, dtype, make) + unit_rows(3, 1100, 20, dtype, make)


def map_fusion(B: int, H: int, K: int, d: int, dtype: torch.dtype, make: Make) -> list[Tensor]:
    """rational_attn with all queries, and with the shared text's alone."""
    key, value, pair, seed = (make(B, H, K, d, dtype=dtype) for _ in range(4))
    image, text = make(B, H, 1, d, dtype=dtype), make(1, H, K, d, dtype=dtype)
    results = []
    for queries in ((image, text, pair), (None, text, None)):
        out, *kept = KERNELS.rational_attn_fwd(*queries, key, value, 0.5, True)
        grads = KERNELS.rational_attn_bwd(seed, *queries, key, value, *kept, 0.5)
        results += [out, *kept, *grads]
    return results


def unit_rows(B: int, K: int, D: int, dtype: torch.dtype, make: Make) -> list[Tensor]:
    """unit_products of image [B, D] and text [K, D]."""
    image, text = make(B, D, dtype=dtype), make(K, D, dtype=dtype)
    seeds = [make(*shape, dtype=dtype) for shape in ((B, D), (K, D), (B, K, D))]
    results = list(KERNELS.unit_products_fwd(image, text, 3.0))
    return results + list(KERNELS.unit_products_bwd(*seeds, image, text, 3.0))


def feed_forward(state: Tensor, seed: Tensor, width: int, make: Make) -> list[Tensor]:
    """ffn_cosine_logits from `width` hidden units to state [B, K, C], with and without features."""
    (B, K, C), dtype = state.shape, state.dtype
    vectors = [make(C, dtype=dtype) for _ in range(3)]
    hidden, weight = make(B, K, width, dtype=dtype), make(C, width, dtype=dtype)
    text, image = make(K, C, dtype=dtype), make(B, C, dtype=dtype)
    layer = (hidden, weight, vectors[0], state, *vectors[1:], text, image)
    forward = KERNELS.ffn_cosine_logits_fwd(*layer, 0.7, 3.0, 1e-5)
    results = list(forward)
    for features in (False, True):
        results += KERNELS.ffn_cosine_logits_bwd(seed, *layer, *forward[1:], 0.7, 3.0, features)
    return results


def masked_logits(context: Tensor, seed: Tensor, make: Make) -> list[Tensor]:
    """rational_logits and rational_head, every penalty, on context [B, K, d] and seed [B, K]."""
    (B, K, d), dtype = context.shape, context.dtype
    image, text = make(B, d, dtype=dtype), make(K, d, dtype=dtype)
    results = [KERNELS.rational_logits_fwd(image, text, context, 3.0)]
    results += KERNELS.rational_logits_bwd(seed, image, text, context, 3.0)
    layer = (context, make(d, d, dtype=dtype), make(d, dtype=dtype), image, text)
    for penalty in range(4):
        logits, size, peak = KERNELS.rational_head_fwd(*layer, 3.0, penalty)
        results += [logits, size]
        grad_size = make(B, dtype=size.dtype)
        for features in (False, True):
            results += KERNELS.rational_head_bwd(
                seed, grad_size, *layer, peak, 3.0, penalty, features
            )
    return results


MAPPINGS: list[mmap.mmap] = []  # kept alive until the process ends


def guarded(shape: tuple[int, ...], dtype: torch.dtype, *, at_end: bool) -> Tensor:
    """Memory that begins right after a PROT_NONE page, or ends right before one."""
    size, page = math.prod(shape) * dtype.itemsize, mmap.PAGESIZE
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    body = -(-size // page) * page
    mapping = mmap.mmap(-1, body + 2 * page)
    MAPPINGS.append(mapping)
    start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    libc = ctypes.CDLL(None, use_errno=True)
    for address in (start, start + page + body):
        if libc.mprotect(ctypes.c_void_p(address), page, 0):
            raise OSError(ctypes.get_errno(), "mprotect")
    offset = page + (body - size if at_end else 0)
    flat = torch.frombuffer(mapping, dtype=dtype, count=math.prod(shape), offset=offset)
    return flat.view(shape)


def guard() -> None:
    """Inputs flush against a forbidden page, at either end."""
    for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
        plain = call_all(dtype)
        for at_end in (True, False):

            def make(*shape: int, dtype: torch.dtype, at_end: bool = at_end) -> Tensor:
                source = random(*shape, dtype=dtype)
                return guarded(shape, dtype, at_end=at_end).copy_(source)

            for actual, expected in zip(call_all(dtype, make), plain, strict=True):
                if not torch.equal(actual, expected):
                    raise SystemExit("a result depends on where its inputs lie")


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "guard":
        guard()
    else:
        dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
        torch.save({str(dtype): call_all(dtype) for dtype in dtypes}, sys.argv[2])
