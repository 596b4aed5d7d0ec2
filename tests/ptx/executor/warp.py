# SPDX-License-Identifier: Apache-2.0
"""Warp-level instructions: shuffles, votes, ldmatrix, stmatrix, mma."""

import numpy as np

from .memory import WINDOWS
from .numeric import f32_of_bf16, f32_of_f16, tf32
from .races import Stamp
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
        come = here.reshape(self.blocks, -1, 32).any(2)
        clock = self.stamp.clock.reshape(self.blocks, -1, self.threads // 32 + 2).copy()
        seen = np.maximum(seen, np.where(come[:, :, None], clock, 0).max(1))
        self.arrived[name] = (count + here.reshape(self.blocks, -1).sum(1), seen)
        own = np.arange(self.threads // 32)
        clock[:, own, own] += come
        self.stamp = Stamp(self.stamp.segment, clock.reshape(self.stamp.clock.shape))

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
