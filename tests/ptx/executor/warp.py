# SPDX-License-Identifier: Apache-2.0
"""Shuffles, votes, ldmatrix, stmatrix, mma of warps; wgmma of warpgroups (sm_90)."""

import numpy as np

from .memory import WINDOWS
from .numeric import f32_of_bf16, f32_of_f16, tf32
from .races import Stamp
from .report import PtxError
from .tensor_map import swizzled
from .types import f4, f8, i4, i8, u4, u8

REDUCED = {"min": np.minimum, "max": np.maximum, "add": np.add}
REDUCED |= {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
BITS = np.arange(32, dtype=np.uint32)


class WarpLevel:
    """Needs of a machine: lanes, lane, warp_of, alive, find(), load and store."""

    def standing(self, mask) -> np.ndarray:
        """Active lanes as an array."""
        return self.exists if mask is None else np.broadcast_to(mask, self.lanes.shape)

    def standing_warps(self, mask) -> np.ndarray:
        return np.flatnonzero(self.standing(mask).reshape(-1, 32).any(1))

    def full(self, x) -> np.ndarray:
        x = np.asarray(x)
        return x if x.ndim else np.full(self.lanes.size, x)

    def demand(self, members, mask, pc: int) -> None:
        """Every lane of a member mask stands here, and no other does."""
        everyone = mask is None and np.ndim(members) == 0 and int(members) == -1
        if everyone or not self.checks.barriers:
            return
        here = self.standing(mask)
        members = np.broadcast_to(np.asarray(members).view(u4), here.shape)
        outside = here & ((members >> self.lane.view(u4)) & u4(1) == 0)
        text = "the lane that executes it is not in its member mask"
        self.find("member mask", pc, text, outside)
        standing = self.ballot(here)
        missing = here & (members & self.ballot(self.exists) & ~standing != 0)
        if missing.any():
            k = int(np.flatnonzero(missing)[0])
            text = f"member mask {int(members[k]):#x}, but lanes {int(standing[k]):#x} stand here"
            self.find("member mask", pc, text, missing)

    def ballot(self, p: np.ndarray) -> np.ndarray:
        """For each lane the 32 bits of its warp."""
        return (p.reshape(-1, 32).astype(u4) << BITS).sum(1, dtype=u4)[self.warp_of]

    def active_mask(self, mask, pc: int):
        return self.ballot(self.standing(mask)), None

    def sync_warp(self, mask, pc: int) -> None:
        self.stamp = Stamp(self.stamp.after(self.standing(mask)), self.stamp.clock)

    def barrier_arrive(self, name, mask, pc: int) -> None:
        """bar.arrive: counts the lanes and what they have seen, without stopping them."""
        name, here = int(np.ravel(name)[0]), self.standing(mask)
        count, seen = self.arrived.get(name, (0, 0))
        seen = self.meet(here, seen, wait=False)
        self.arrived[name] = (count + here.reshape(self.blocks, -1).sum(1), seen)

    def shuffle(self, how: str, a, b, c, members, mask, pc: int):
        a, lane = self.full(a), self.lane.astype(i8)
        b, c = np.asarray(b).astype(i8) & 31, np.asarray(c).astype(i8)
        segment, clamp = (c >> 8) & 31, c & 31
        low, high = lane & segment, (lane & segment) | (clamp & ~segment)
        sources = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": low | (b & ~segment)}
        source = sources[how]
        inside = source >= high if how == "up" else source <= high
        source = self.warp_of * 32 + np.where(inside, source, lane)
        if mask is not None and self.checks.barriers:
            here, text = self.standing(mask), "a value is read from a lane that does not take part"
            self.find("member mask", pc, text, here & ~here[source])
        return a[source], inside

    def vote(self, how: str, p, members, mask, pc: int):
        here, p = self.standing(mask), np.broadcast_to(p, self.lanes.shape)
        yes, all_of = self.ballot(p & here), self.ballot(here)
        if how == "ballot":
            return yes, None
        every = yes == all_of
        return {"any": yes != 0, "all": every, "uni": (yes == 0) | every}[how], None

    def match(self, how: str, a, members, mask, pc: int):
        here = self.standing(mask).reshape(-1, 32)
        a = self.full(a).reshape(-1, 32)
        same = (a[:, :, None] == a[:, None, :]) & here[:, None, :]
        words = (same.astype(u4) << BITS).sum(2, dtype=u4).reshape(-1)
        if how == "any":
            return words.view(i4), True
        whole = words == self.ballot(here.reshape(-1))
        return np.where(whole, words, u4(0)).view(i4), whole

    def reduce(self, how: str, a, members, mask, pc: int):
        """redux: over the lanes that stand here and share a member mask."""
        a, out = self.full(a), np.zeros(self.lanes.size, np.asarray(a).dtype)
        group = self.warp_of.astype(i8) << 32 | self.full(members).view(u4)
        for g in np.unique(group[self.standing(mask)]):
            here = self.standing(mask) & (group == g)
            out[here] = REDUCED[how].reduce(a[here])
        return out, None

    def elect(self, members, mask, pc: int):
        """The lowest lane of the members, and whether this lane is it."""
        members = self.full(members)
        leader = np.bitwise_count((members & -members).view(u4) - u4(1)).astype(i4)
        return leader, leader == self.lane

    def warps(self, mask, pc: int) -> np.ndarray:
        """Warps that execute an instruction which needs all of their lanes."""
        if mask is None and self.whole:
            return np.arange(self.lanes.size // 32)
        self.demand(i4(-1), mask, pc)
        return self.standing_warps(mask)

    def by_warp(self, x, warps: np.ndarray) -> np.ndarray:
        """[warps, 32] values of a register."""
        x = self.full(x).reshape(-1, 32)
        return x if warps.size == x.shape[0] else x[warps]

    def to_lanes(self, x: np.ndarray, warps: np.ndarray) -> np.ndarray:
        """[warps, 32] back to all lanes."""
        if warps.size * 32 == self.lanes.size:
            return np.ascontiguousarray(x).reshape(-1)
        out = np.zeros((self.lanes.size // 32, 32), x.dtype)
        out[warps] = x
        return out.reshape(-1)

    def _rows(self, address, offset: int, count: int, warps) -> tuple[np.ndarray, np.ndarray]:
        """Addresses of 8 rows for each of `count` matrices, and the lanes that give them."""
        a = self.by_warp(address, warps)[:, : 8 * count].astype(i8).ravel() + offset
        return a, self.by_warp(self.lanes, warps)[:, : 8 * count].ravel()

    def load_matrices(self, address, offset: int, count: int, transposed: bool, mask, pc: int):
        """Lane 4 r + c gets columns 2 c, 2 c + 1 of row r; of column r where transposed.

        The lanes wait for each other: what any of them writes later comes after the read.
        """
        warps = self.warps(mask, pc)
        a, lanes = self._rows(address, offset, count, warps)
        rows = np.stack(self.read(space_of(a), a, lanes, 8, 2, pc, engine=-1), 1)
        rows = turned(rows, count, transposed).view(i4).reshape(-1, count, 32)
        return [self.to_lanes(rows[:, k], warps) for k in range(count)]

    def store_matrices(self, address, offset: int, values: list, transposed: bool, mask, pc: int):
        warps, count = self.warps(mask, pc), len(values)
        a, lanes = self._rows(address, offset, count, warps)
        rows = np.stack([self.by_warp(v, warps) for v in values], 1)
        rows = turned(rows, count, transposed).view(u8).reshape(-1, 2)
        self.write(space_of(a), a, rows, lanes, pc)

    def multiply(self, shape, kinds, a, b, c, mask, pc: int) -> list:
        """mma: D = A B + C with A [m, k] by rows and B [k, n] by columns, in float32 or float64."""
        warps = self.warps(mask, pc)
        self.report.matrix_products += warps.size
        m, n, k = shape
        a, b, c = ([self.by_warp(x, warps) for x in part] for part in (a, b, c))
        left, right = fragment(a, kinds[1], m, k), fragment(b, kinds[2], n, k)
        total = accumulator(c, kinds[3], m, n) + np.matmul(left, right.swapaxes(1, 2))
        return [self.to_lanes(x, warps) for x in scattered(total, kinds[0])]


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


def space_of(a: np.ndarray) -> str:
    """Shared addresses may be given as generic ones."""
    return "" if (a >= WINDOWS["param"]).any() else "shared"


def turned(rows: np.ndarray, count: int, transposed: bool) -> np.ndarray:
    """[warps, matrix, row, column] of 16 bits, transposed or not."""
    rows = np.ascontiguousarray(rows).view(np.uint16).reshape(-1, count, 8, 8)
    return np.ascontiguousarray(rows.swapaxes(2, 3) if transposed else rows)


def numbers(x: np.ndarray, kind: str) -> np.ndarray:
    """Bits to the type of computation."""
    if kind in ("f16", "bf16"):
        return (f32_of_f16 if kind == "f16" else f32_of_bf16)(x.view(np.int16))
    return tf32(x, "rz") if kind == "tf32" else x


def placed(values: list, rows: int, columns: int) -> np.ndarray:
    """[W, 32, width] of each register to [W, rows, columns].

    A register of lane 4 r + c holds row r of 8 and `width` neighbouring columns; the registers go
    down the blocks of 8 rows first, then along the columns.
    """
    width, tall = values[0].shape[2], rows // 8
    out = np.empty((values[0].shape[0], rows, columns), values[0].dtype)
    for k, x in enumerate(values):
        r, c = k % tall * 8, k // tall * 4 * width
        out[:, r : r + 8, c : c + 4 * width] = x.reshape(-1, 8, 4 * width)
    return out


def fragment(registers: list, kind: str, rows: int, columns: int) -> np.ndarray:
    """Registers of an operand to [W, rows, columns]."""
    return placed(
        [numbers(np.ascontiguousarray(x)[..., None], kind) for x in registers], rows, columns
    )


def accumulator(registers: list, kind: str, rows: int, columns: int) -> np.ndarray:
    """As `fragment`; a lane holds columns 2 c, 2 c + 1, in one register (halves) or in two."""
    if kind in ("f16", "bf16"):
        return fragment(registers, kind, rows, columns)
    pairs = [np.stack(registers[k : k + 2], 2) for k in range(0, len(registers), 2)]
    return placed(pairs, rows, columns)


def scattered(total: np.ndarray, kind: str) -> list[np.ndarray]:
    """[W, rows, columns] to registers of [W, 32]."""
    w, rows, columns = total.shape
    t = {"f32": f4, "f64": f8, "f16": np.float16}[kind]
    blocks = total.astype(t).reshape(w, rows // 8, 8, columns // 8, 4, 2)
    out = []
    for c in range(columns // 8):
        for r in range(rows // 8):
            x = blocks[:, r, :, c].reshape(w, 32, 2)
            x = np.ascontiguousarray(x).view(i4) if kind == "f16" else x
            out += [x[:, :, k] for k in range(x.shape[2])]
    return out


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
