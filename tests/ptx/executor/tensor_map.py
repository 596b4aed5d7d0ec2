# SPDX-License-Identifier: Apache-2.0
"""Tensor maps of 128 bytes, in a form of our own: what cuTensorMapEncodeTiled makes on a GPU."""

import struct
from dataclasses import dataclass

import numpy as np

from .report import PtxError

MAGIC = b"TILEMAP1"
FORMAT = "<8sQ4B5Q5Q5H5B13x"


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
    rank, got = len(dims), (address, dims, strides, box)
    steps = tuple(steps or (1,) * rank)
    row = box[0] * element
    for name, good in (
        ("rank: 1 to 5", 1 <= rank <= 5),
        ("address: a multiple of 16", address % 16 == 0),
        ("strides: one less than dims", len(strides) == rank - 1),
        ("strides: multiples of 16 below 2^40", all(s % 16 == 0 and s < 2**40 for s in strides)),
        ("dims: 1 to 2^32", all(1 <= d <= 2**32 for d in dims)),
        ("box: 1 to 256 in each dim", len(box) == rank and all(1 <= b <= 256 for b in box)),
        ("element: 1, 2, 4 or 8 bytes", element in (1, 2, 4, 8)),
        ("box: a row of a multiple of 16 bytes", row % 16 == 0),
        ("swizzle: 0 to 3", swizzle in range(4)),
        ("swizzle: its span not below a row", not swizzle or row <= 16 << swizzle),
        ("steps: 1 to 8", len(steps) == rank and all(1 <= s <= 8 for s in steps)),
    ):
        if not good:
            raise PtxError(f"tensor map: wanted {name}, got {got}")
    lists = [(*values, *(0,) * (5 - len(values))) for values in (dims, strides, box, steps)]
    numbers = [x for values in lists for x in values]
    return struct.pack(FORMAT, MAGIC, address, rank, element, swizzle, fill, *numbers)


def decode(raw: bytes) -> TensorMap:
    magic, address, rank, element, swizzle, fill, *rest = struct.unpack(FORMAT, raw)
    if magic != MAGIC:
        raise PtxError("tensor map: these 128 bytes were not made by tensor_map.encode")
    dims, strides, box, steps = (tuple(rest[k : k + rank]) for k in range(0, 20, 5))
    return TensorMap(address, dims, strides[: rank - 1], box, element, swizzle, steps, fill)


def swizzled(place: np.ndarray, swizzle: int) -> np.ndarray:
    """Shared addresses with their 16-byte pieces exchanged: bits 4.. xor bits 7.."""
    return place ^ (((place >> 7) & ((1 << swizzle) - 1)) << 4)
