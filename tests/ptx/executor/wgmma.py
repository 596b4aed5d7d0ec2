# SPDX-License-Identifier: Apache-2.0
"""wgmma: products of warpgroups, 128 lanes, on matrices in shared memory (sm_90)."""

import numpy as np

from .report import PtxError
from .tensor_map import swizzled
from .types import f4
from .warp import accumulator, fragment, numbers, scattered


class WarpGroups:
    """Needs of a machine: standing(), by lanes, shared memory with its checks."""

    def prepare_groups(self) -> None:
        self.committed: list[np.ndarray] = []  # ticks of each block by then
        self.unfinished: dict[str, int] = {}  # accumulators in flight: register to group

    def warpgroups(self, mask, pc: int) -> np.ndarray:
        here = self.standing(mask)
        if self.threads % 128:
            self.find("barrier", pc, "the block does not consist of whole warpgroups")
            here = here[: here.size // 128 * 128]
        by_group = here.reshape(-1, 128)
        part = np.flatnonzero(by_group.any(1) & ~by_group.all(1))
        if part.size:
            self.find("barrier", pc, "reached by a part of a warpgroup", part * 128)
        return np.flatnonzero(by_group.any(1))

    def group_product(
        self, n, k, into, kind, d, names, a, b, keep, negate, transposed, mask, pc: int
    ) -> list:
        """D = A B (+ D): A [64, k] from registers or a descriptor, B [n, k] from a descriptor."""
        groups = self.warpgroups(mask, pc)
        self.report.matrix_products += groups.size
        warps = (groups[:, None] * 4 + np.arange(4)).ravel()
        if isinstance(a, list):
            registers = [self.by_warp(x, warps) for x in a]
            left = fragment(registers, kind, 16, k).reshape(-1, 64, k)
        else:
            left = self.tile(self.full(a), groups, 64, k, kind, transposed[0], pc)
        right = self.tile(self.full(b), groups, n, k, kind, transposed[1], pc)
        product = np.matmul(left * f4(negate[0]), (right * f4(negate[1])).swapaxes(1, 2))
        product = product.reshape(-1, 16, n)
        old = accumulator([self.by_warp(x, warps) for x in d], into, 16, n)
        keep = self.full(keep).reshape(-1, 32)[warps][:, :1, None]
        total = np.where(keep, old, f4(0)) + product
        for name in names:
            self.unfinished[name] = len(self.committed)
        results = [self.to_lanes(x, warps) for x in scattered(total, into)]
        if warps.size * 32 == self.lanes.size:
            return results
        here = self.standing(mask)
        return [np.where(here, x, before) for x, before in zip(results, d, strict=True)]

    def tile(self, descriptors, groups, rows: int, k: int, kind: str, transposed: bool, pc: int):
        """[groups, rows, k] of a matrix in shared memory; rows run along M or N, k along K."""
        size = 4 if kind == "tf32" else 2
        words = descriptors.reshape(-1, 128)[groups]
        if (words != words[:, :1]).any():
            self.find("barrier", pc, "the descriptor differs within a warpgroup", groups * 128)
        places = np.stack([layout(int(w), rows, k, size, transposed) for w in words[:, 0]])
        who = np.repeat(groups * 128, rows * k)
        with self.asynchronously(groups * 128, 2):
            x = self.read("shared", places.ravel(), who, size, 1, pc, engine=2)[0]
        self.check_proxy(places.ravel(), who, size, pc)
        x = x.view(f4) if kind == "tf32" else x
        return numbers(x, kind).reshape(-1, rows, k)

    def commit_products(self, mask, pc: int) -> None:
        self.committed.append(self.ticks[:, 2].copy())

    def wait_products(self, newest: int, mask, pc: int) -> None:
        """All groups but the newest are done: accumulators may be read, operands written."""
        done = len(self.committed) - newest
        self.unfinished = {r: g for r, g in self.unfinished.items() if g >= done}
        if done > 0:
            self.waited(mask, 2, self.committed[done - 1])

    def accumulator_read(self, name: str, mask, pc: int) -> None:
        if name in self.unfinished and self.checks.proxies:
            text = f"accumulator {name} is read before wgmma.wait_group"
            self.find("proxy", pc, text, np.flatnonzero(self.standing(mask)))

    def accumulator_moved(self, into: str, source: str) -> None:
        """A copy of an accumulator in flight is in flight itself."""
        if source in self.unfinished:
            self.unfinished[into] = self.unfinished[source]
        else:
            self.unfinished.pop(into, None)


def layout(descriptor: int, rows: int, k: int, size: int, transposed: bool) -> np.ndarray:
    """Shared addresses [rows, k] that a matrix descriptor stands for.

    The matrix consists of cores of 8 rows of 16 bytes, joined to rows of 32, 64 or 128 bytes where
    swizzled. K-major: 8 rows lie `stride` apart, cores along K `leading` apart (unswizzled) or side
    by side. MN-major (transposed): K runs down the rows of a core; unswizzled, the two distances
    change their parts.
    """
    if descriptor >> 49 & 7:
        raise PtxError("wgmma: the base offset of a matrix descriptor is not modelled")
    start, leading, stride = ((descriptor >> at & 0x3FFF) << 4 for at in (0, 16, 32))
    swizzle = (0, 3, 2, 1)[descriptor >> 62 & 3]
    r, c = np.arange(rows)[:, None], np.arange(k)[None, :]
    width = 16 << swizzle  # bytes of a row
    if transposed:
        r, c = c, r
        leading, stride = (leading, stride) if swizzle else (stride, leading)
    n = width // size
    place = r % 8 * width + r // 8 * stride + c // n * leading + c % n * size
    return swizzled(start + place, swizzle)
