# SPDX-License-Identifier: Apache-2.0
"""Numbers and tensors on their way to and from a compiled program (its other side is in C++)."""

from __future__ import annotations

import struct

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.int64)


def ints_of(*values: int) -> bytes:
    """A count and the numbers; `doubles` likewise."""
    return struct.pack(f"<q{len(values)}q", len(values), *values)


def doubles(*values: float) -> bytes:
    return struct.pack(f"<q{len(values)}d", len(values), *values)


def raw(tensor: Tensor) -> bytes:
    """The bytes of its elements, in order."""
    flat = tensor.detach().contiguous()
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def packed(tensor: Tensor | None) -> bytes:
    """The memory it spans, with its distance from an address of 16 bytes; None as no numbers."""
    if tensor is None:
        return ints_of()
    tensor = tensor.detach()
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    span = last + 1 if tensor.numel() else 0
    offset = tensor.data_ptr() % 16 // tensor.element_size()
    memory = tensor.as_strided((span,), (1,))
    head = ints_of(DTYPES.index(tensor.dtype), span, offset)
    return head + ints_of(*tensor.shape) + ints_of(*tensor.stride()) + raw(memory)


def unpacked(data: bytes) -> list[Tensor]:
    """The contiguous tensors that a program wrote."""
    tensors, at = [], 0
    while at < len(data):
        code, rank = struct.unpack_from("<2q", data, at)
        shape = struct.unpack_from(f"<{rank}q", data, at + 16)
        at += 16 + 8 * rank
        empty = torch.empty(shape, dtype=DTYPES[code])
        size = empty.numel() * empty.element_size()
        if size:
            flat = torch.frombuffer(bytearray(data[at : at + size]), dtype=DTYPES[code])
            empty = flat.view(shape)
        tensors.append(empty)
        at += size
    return tensors
