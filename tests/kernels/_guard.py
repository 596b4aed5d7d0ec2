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


def random(*shape):
    return guarded(*shape).copy_(torch.randn(*shape))


def main(package):
    attn, weights, cosine, norm, rational, ending, masked, unit, sums, ffn = (
        importlib.import_module(f"{package}.{name}")
        for name in (
            "cross_attn",
            "cross_attn_weights",
            "cosine_logits",
            "norm_cosine_logits",
            "rational_attn",
            "rational_head",
            "rational_logits",
            "unit_products",
            "column_sums",
            "ffn_cosine_logits",
        )
    )
    plain_new_empty = torch.Tensor.new_empty

    def new_empty(self, shape, dtype=None, device=None):
        if device is not None:  # the interpreter's own call
            return plain_new_empty(self, shape, dtype=dtype, device=device)
        return guarded(*shape, dtype=dtype or self.dtype)

    torch.Tensor.new_empty = new_empty
    torch.empty_like = lambda tensor: guarded(*tensor.shape, dtype=tensor.dtype)
    torch.manual_seed(0)
    for B, H, K, L, d in ((2, 2, 17, 9, 5), (1, 1, 33, 65, 20)):
        query, key, value = random(1, H, K, d), random(B, H, L, d), random(B, H, L, d)
        key_mask = guarded(B, L, dtype=torch.uint8).view(torch.bool)
        out, lse = attn.cross_attn_fwd(query, key, value, key_mask, 0.5)
        grads = (random(B, H, K, d), random(B, H, K))
        results = [out, lse]
        results += attn.cross_attn_bwd(*grads, query, key, value, key_mask, out, lse, 0.5)
        p = weights.cross_attn_weights_fwd(query, key, key_mask, 0.5)
        results += [p, *weights.cross_attn_weights_bwd(random(B, H, K, L), p, query, key, 0.5)]
        for text in (random(K, d), random(B, K, d)):
            image, g = random(B, d), random(B, K)
            forward = cosine.cosine_logits_fwd(image, text, 1.0)
            results += forward
            results += cosine.cosine_logits_bwd(g, image, text, *forward[1:], 1.0)
        tensors = (random(B, K, d), random(d), random(d), random(K, d), random(B, d))
        forward = norm.norm_cosine_logits_fwd(*tensors, 1.0, 1.0, 1e-5)
        results += forward
        results += norm.norm_cosine_logits_bwd(g, *tensors, *forward, 1.0, 1.0, 1e-5)
        layer = (random(B, K, 2 * d + 1), random(d, 2 * d + 1), random(d), *tensors)
        forward = ffn.ffn_cosine_logits_fwd(*layer, 1.0, 1.0, 1e-5)
        results += forward
        results += ffn.ffn_cosine_logits_bwd(random(B, K), *layer, *forward[1:], 1.0, 1.0, True)
        heads = (random(B, H, 1, d), query, *(random(B, H, K, d) for _ in range(3)))
        forward = rational.rational_attn_fwd(*heads, 0.5, True)
        results += forward
        g = random(B, H, K, d)
        results += rational.rational_attn_bwd(g, *heads, *forward[1:], 0.5)
        g, size = random(B, K), random(B)
        features, mask = (random(B, d), random(K, d)), random(B, K, d)
        results += [masked.rational_logits_fwd(*features, mask, 1.0)]
        results += masked.rational_logits_bwd(g, *features, mask, 1.0)
        forward = unit.unit_products_fwd(*features, 2.0)
        results += [*forward, *unit.unit_products_bwd(*features, mask, *features, 2.0)]
        results += [sums.column_sums(*features, random(B * K, 3 * d))]
        for penalty in range(4):
            tensors = (mask, random(d, d), random(d), *features)
            logits, sizes, peak = ending.rational_head_fwd(*tensors, 1.0, penalty)
            results += [logits, sizes]
            results += ending.rational_head_bwd(g, size, *tensors, peak, 1.0, penalty, True)
        if not all(result.isfinite().all() for result in results):
            raise SystemExit("an output has elements that were not written")


if __name__ == "__main__":
    main(sys.argv[1])
