# SPDX-License-Identifier: Apache-2.0
"""Tensor maps of 128 bytes, in a form of our own: what cuTensorMapEncodeTiled makes on a GPU."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from .report import PtxError

MAGIC = b"TILEMAP1"
FORMAT = "<8sQBBBB4x5Q4Q5H5B"  # 127 bytes
SPAN = {0: 0, 1: 32, 2: 64, 3: 128}  # bytes of a swizzled row


@dataclass(frozen=True)
class TensorMap:
    """A box of a tensor in global memory; the innermost dimension comes first."""

    address: int
    dims: tuple[int, ...]
    strides: tuple[int, ...]  # bytes, of dimensions 1, 2, ...
    box: tuple[int, ...]
    element: int  # bytes
    swizzle: int = 0  # 0: none, 1, 2, 3: 32, 64, 128 bytes
    steps: tuple[int, ...] = ()
    fill: int = 0  # 1: out of bounds reads NaN instead of 0 (not modelled)

    def elements(self, coordinates) -> tuple[np.ndarray, np.ndarray]:
        """Addresses of the box's elements in the order of shared memory; which are in bounds."""
        address, good = np.array([self.address]), np.array([True])
        strides = (self.element, *self.strides)
        for k, count in enumerate(self.box):
            at = int(coordinates[k]) + np.arange(-(-count // self.steps[k])) * self.steps[k]
            inside = (at >= 0) & (at < self.dims[k])
            address = ((at * strides[k])[:, None] + address).ravel()
            good = (inside[:, None] & good).ravel()
        return address, good


def encode(
    address: int, dims, strides, box, element: int, swizzle: int = 0, steps=None, fill: int = 0
) -> bytes:
    """The 128 bytes of a map; refuses what the driver refuses."""
    rank = len(dims)
    steps = tuple(steps or (1,) * rank)
    for name, good in (
        ("rank: 1 to 5", 1 <= rank <= 5),
        ("address: a multiple of 16", address % 16 == 0),
        ("strides: one less than dims", len(strides) == rank - 1),
        ("strides: multiples of 16 below 2^40", all(s % 16 == 0 and s < 2**40 for s in strides)),
        ("dims: 1 to 2^32", all(1 <= d <= 2**32 for d in dims)),
        ("box: 1 to 256 in each dim", len(box) == rank and all(1 <= b <= 256 for b in box)),
        ("element: 1, 2, 4 or 8 bytes", element in (1, 2, 4, 8)),
        ("box: a row of a multiple of 16 bytes", box[0] * element % 16 == 0),
        (
            "swizzle: 0 to 3, its span not below a row",
            swizzle in SPAN and (not swizzle or box[0] * element <= SPAN[swizzle]),
        ),
        ("steps: 1 to 8", len(steps) == rank and all(1 <= s <= 8 for s in steps)),
    ):
        if not good:
            raise PtxError(f"tensor map: wanted {name}, got {(address, dims, strides, box)}")
    padded = lambda values, n: (*values, *(0,) * (n - len(values)))  # noqa: E731
    head = (MAGIC, address, rank, element, swizzle, fill)
    tail = (*padded(dims, 5), *padded(strides, 4), *padded(box, 5), *padded(steps, 5))
    return struct.pack(FORMAT, *head, *tail).ljust(128, b"\0")


def decode(raw: bytes) -> TensorMap:
    if raw[:8] != MAGIC:
        raise PtxError("tensor map: these 128 bytes were not made by tensor_map.encode")
    _, address, rank, element, swizzle, fill, *rest = struct.unpack_from(FORMAT, raw)
    dims, strides, box, steps = rest[:5], rest[5:9], rest[9:14], rest[14:19]
    return TensorMap(
        address, tuple(dims[:rank]), tuple(strides[: rank - 1]), tuple(box[:rank]), element,
        swizzle, tuple(steps[:rank]), fill,
    )  # fmt: skip


def swizzled(place: np.ndarray, swizzle: int) -> np.ndarray:
    """Shared addresses with their 16-byte pieces exchanged: bits 4.. xor bits 7.."""
    return place ^ (((place >> 7) & ((1 << swizzle) - 1)) << 4)
