# SPDX-License-Identifier: Apache-2.0
"""Runs every launcher on memory that ends at a forbidden page: one element more is fatal.

Usage: python _guard.py PACKAGE      (TRITON_INTERPRET=1)
"""

import ctypes
import importlib
import math
import mmap
import sys

import torch

from vtclip.testing.problems import OPS

LIBC = ctypes.CDLL(None, use_errno=True)
MAPPINGS = []  # kept alive until the process ends


def guarded(*shape, dtype=torch.float32):
    """NaN-filled tensor whose last byte is the last byte before a PROT_NONE page."""
    size = math.prod(shape) * dtype.itemsize
    page = mmap.PAGESIZE
    body = max(1, -(-size // page)) * page
    mapping = mmap.mmap(-1, body + page)
    MAPPINGS.append(mapping)
    start = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    if LIBC.mprotect(ctypes.c_void_p(start + body), page, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    flat = torch.frombuffer(mapping, dtype=dtype, count=math.prod(shape), offset=body - size)
    return flat.fill_(math.nan if dtype.is_floating_point else 1).view(shape)


def make(shape, dtype):
    """Guarded memory of normal numbers, or of booleans that are all set."""
    memory = guarded(*shape, dtype=torch.uint8 if dtype == torch.bool else dtype)
    return memory.view(dtype) if dtype == torch.bool else memory.copy_(torch.randn(shape))


def main(package):
    def kernel(name):
        module = name.removesuffix("_fwd").removesuffix("_bwd")
        return getattr(importlib.import_module(f"{package}.{module}"), name)

    importlib.import_module("vtclip.ops")  # the schemas, before memory is guarded
    plain_new_empty = torch.Tensor.new_empty

    def new_empty(self, shape, dtype=None, device=None):
        if device is not None:  # the interpreter's own call
            return plain_new_empty(self, shape, dtype=dtype, device=device)
        return guarded(*shape, dtype=dtype or self.dtype)

    torch.Tensor.new_empty = new_empty
    torch.empty_like = lambda tensor: guarded(*tensor.shape, dtype=tensor.dtype)
    torch.manual_seed(0)
    for B, H, K, L, d in ((2, 2, 17, 9, 5), (1, 1, 33, 65, 20)):
        sizes = {"B": B, "H": H, "K": K, "L": L, "d": d, "D": d, "C": d, "F": 2 * d + 1}
        columns = [make(shape, torch.float32) for shape in ((B, d), (K, d), (B * K, 3 * d))]
        results = [kernel("column_sums")(*columns)]
        results += kernel("relu_gradient")(*(make((K, d), torch.float32) for _ in range(2)))
        product, start = make((B, K, d), torch.float32), make((K, d), torch.float32)
        vectors = [make((d,), torch.float32) for _ in range(3)]
        for shift in (vectors[2], None):
            out, shifted, *kept = kernel("sum_norm_fwd")(product, start, *vectors[:2], shift, 1e-5)
            results += [out, shifted, *kept]
        grads = (make((B, K, d), torch.float32) for _ in range(2))
        results += kernel("sum_norm_bwd")(*grads, product, start, vectors[0], *kept)
        for op in OPS.values():
            for variant in ("", *op.variants):
                inputs = op.draw(sizes, variant=variant, make=make)
                outputs, grads = op.run(kernel, inputs, make)
                results += [*outputs, *grads]
        if not all(result.isfinite().all() for result in results):
            raise SystemExit("an output has elements that were not written")


if __name__ == "__main__":
    main(sys.argv[1])
