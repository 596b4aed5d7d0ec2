# SPDX-License-Identifier: Apache-2.0
"""Calls every CPU kernel on fixed inputs; also run as a program, in a process of its own.

python _cpu_child.py results FILE    saves what the kernels return
python _cpu_child.py guard           runs them on memory between two forbidden pages
python _cpu_child.py extreme         names inputs whose results overflow, but not the reference's
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys

import torch
from torch import Tensor

from vtclip.backends import native
from vtclip.testing.problems import FUNCTIONS, OPS, Function, Make

KERNELS = torch.ops.vtclip
# B, H, K, L, d: ragged, more than one query block, more than one key tile, whole vectors, tiny
SHAPES = ((3, 2, 17, 9, 5), (2, 1, 131, 49, 24), (2, 2, 7, 300, 20), (1, 1, 16, 16, 64), (1,) * 5)
WIDE = {"B": 2, "K": 70, "D": 200, "C": 200, "F": 150}
MORE = {
    # more than one weight panel, more than one step of the inner dimension
    "rational_logits": [WIDE],
    "rational_head": [WIDE],
    "ffn_cosine_logits": [WIDE],
    # more than one chunk of images and of texts, more than one running sum of each
    "unit_products": [{"B": 70, "K": 90, "D": 40}, {"B": 3, "K": 1100, "D": 20}],
}


def random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Standard normal numbers, drawn in float64 so that every dtype rounds the same ones."""
    numbers = torch.randn(shape, dtype=torch.float64)
    return numbers > 0 if dtype == torch.bool else numbers.to(dtype)


def call_all(dtype: torch.dtype, make: Make = random) -> list[Tensor]:
    """Every kernel, forward and backward, in all variants: what they return but indices."""
    if reason := native.load_cpu():
        raise SystemExit(reason)
    torch.manual_seed(0)
    results: list[Tensor] = []
    for op in OPS.values():
        all_sizes = [
            {"B": B, "H": H, "K": K, "L": L, "d": d, "D": d, "C": d, "F": 2 * d + 1}
            for B, H, K, L, d in SHAPES
        ]
        # no scale of 100, which magnifies the rounding of gradients that cancel
        numbers = {"scale": 0.5 if "H" in op.sizes else 3.0, "residual": 0.7}
        for sizes in all_sizes + MORE.get(op.name, []):
            for variant in ("", *op.variants):
                inputs = op.draw(sizes, variant=variant, dtype=dtype, make=make, **numbers)
                outputs, grads = op.run(lambda name: getattr(KERNELS, name), inputs, make)
                results += [x for x in (*outputs, *grads) if x.is_floating_point()]
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

            def make(shape: tuple[int, ...], dtype: torch.dtype, at_end: bool = at_end) -> Tensor:
                return guarded(shape, dtype, at_end=at_end).copy_(random(shape, dtype))

            for actual, expected in zip(call_all(dtype, make), plain, strict=True):
                if not torch.equal(actual, expected):
                    raise SystemExit("a result depends on where its inputs lie")


def extreme() -> None:
    """Inputs far from 1, one at a time and all together."""
    sizes = {"B": 2, "H": 2, "K": 5, "L": 9, "d": 8, "D": 20, "C": 20, "F": 6}
    wrong = []
    for call in FUNCTIONS.values():
        tensors = [tensor.detach() for tensor in call.draw(sizes)]
        for size in (1e-38, 1e-30, 1e-20, 1e10, 1e18, 1e30):
            for changed in (*range(len(tensors)), None):
                given = [x * size if changed in (None, i) else x for i, x in enumerate(tensors)]
                if not _are_finite(call, given, "reference"):
                    continue  # sums that overflow do so in some order
                if not _are_finite(call, given, "cpu"):
                    which = "all" if changed is None else changed
                    wrong.append(f"{call.name}: tensor {which} times {size:g}")
    if wrong:
        raise SystemExit("\n".join(wrong))


def _are_finite(call: Function, tensors: list[Tensor], impl: str) -> bool:
    """Whether outputs and the gradients of their sum are."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    outputs = call.outputs(*leaves, scale=1.0, impl=impl)
    grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(out) for out in outputs])
    return all(bool(result.isfinite().all()) for result in (*outputs, *grads))


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "guard":
        guard()
    elif sys.argv[1] == "extreme":
        extreme()
    else:
        dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
        torch.save({str(dtype): call_all(dtype) for dtype in dtypes}, sys.argv[2])
