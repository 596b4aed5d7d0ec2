# SPDX-License-Identifier: Apache-2.0
"""Instructions that act on memory, on other lanes or on the schedule, as calls of the machine."""

from __future__ import annotations

import re
from dataclasses import replace

from . import types
from .moves import Moves
from .parse import Address, Instruction, Pair
from .report import PtxError
from .translate import Block

SPACES = {"global", "shared", "local", "param", "const"}
CACHE_HINTS = re.compile(
    r"(weak|relaxed|acquire|release|acq_rel|volatile|mmio|gpu|sys|cta|cluster|nc|ca|cg|cs|lu|cv|wb|wt"
    r"|unified|global|local|const|param(::\w+)?|shared(::\w+)?|v[248]|noftz|L[12]::\w+|b128)$"
)
# old and b are of the instruction's type
ATOMICS = {
    "add": "o + b",
    "min": "np.minimum(o, b)",
    "max": "np.maximum(o, b)",
    "and": "o & b",
    "or": "o | b",
    "xor": "o ^ b",
    "exch": "b",
    "inc": "where(o >= b, o.dtype.type(0), o + o.dtype.type(1))",
    "dec": "where((o == 0) | (o > b), b, o - o.dtype.type(1))",
    "cas": "where(o == b, c, o)",
}


class Effects(Moves):
    # ---- memory
    def space(self, i: Instruction, address: Address) -> str:
        named = next((p.split("::")[0] for p in i.parts[1:] if p.split("::")[0] in SPACES), "")
        if not named and address.base in self.program.symbols:
            named = self.program.symbols[address.base][0]
        return {"const": "global"}.get(named, named)

    def address(self, address: Address) -> str:
        """Base and offset as two arguments; registers in their own width."""
        base = address.base
        if base in self.program.index:
            register = self.register(base)
            return f"{register}, {address.offset}"
        return f"{self.read(base, 's64')}, {address.offset}"

    def _access(self, i: Instruction, address: Address) -> tuple[str, int, str]:
        """Type, its bytes, and the space of a load or store."""
        for p in i.parts[1:]:
            if p not in types.TYPES and not CACHE_HINTS.match(p):
                raise PtxError(f"modifier {p}")
        kind = i.types()[-1]
        return kind, types.bits(kind) // 8, self.space(i, address)

    def op_ld(self, i: Instruction, pc: int) -> None:
        target, address = i.operands[:2]
        kind, n, space = self._access(i, address)
        targets = target if isinstance(target, tuple) else (target,)
        have = types.name(kind)
        if kind[0] == "b" or kind in types.HALVES:  # zeros are put before bits
            have = f"u{n}"
        if space == "param" and address.base in self.program.symbols:
            at = self.program.symbols[address.base][1] + address.offset
            for k, register in enumerate(targets):
                self.write(register, f"M.parameter({at + k * n}, {have})", have, i)
            return
        words = [self.temporary() for _ in targets]
        place, mask = self.address(address), self.mask(i)
        self.emit(
            f"[{', '.join(words)}] = M.load({space!r}, {place}, {n}, {len(words)}, {mask}, {pc})"
        )
        for word, register in zip(words, targets, strict=True):
            view = word if have == f"u{n}" else f"{word}.view({have})"
            self.write(register, view, have, i)

    op_ldu = op_ld

    def op_st(self, i: Instruction, pc: int) -> None:
        address, source = i.operands[:2]
        kind, n, space = self._access(i, address)
        sources = source if isinstance(source, tuple) else (source,)
        kind = kind if kind in types.FLOATS else f"u{8 * n}"
        values = ", ".join(self.read(s, kind) for s in sources)
        place, mask = self.address(address), self.mask(i)
        self.emit(f"M.store({space!r}, {place}, [{values}], {n}, {mask}, {pc})")

    def op_atom(self, i: Instruction, pc: int) -> None:
        target, address, *sources = i.operands
        how = next(p for p in i.parts[1:] if p in ATOMICS)
        for p in i.parts[1:]:
            if p not in types.TYPES and p != how and not CACHE_HINTS.match(p):
                raise PtxError(f"modifier {p}")
        if isinstance(target, tuple):
            raise PtxError("vector")
        kind = i.types()[-1]
        n, t = types.bits(kind) // 8, types.name(kind)
        names = "o, b, c" if how == "cas" else "o, b"
        if kind in types.HALVES and how != "exch":
            wide = "f32_of_" + kind.removesuffix("x2")
            o, b = (f"halves({x})" if kind.endswith("x2") else x for x in "ob")
            if how != "add":
                raise PtxError(f"{how} of {kind}")
            change = self.narrowed(f"{wide}({o}) + {wide}({b})", kind)
        else:
            change = ATOMICS[how]
            change = f"(lambda {names}: {change})(o.view({t}), {names[3:]})"
        values = ", ".join(self.read(s, kind) for s in sources[: 2 if how == "cas" else 1])
        old = self.temporary()
        self.emit(
            f"{old} = M.atomic({self.space(i, address)!r}, {self.address(address)}, "
            f"lambda {names}: {change}, [{values}], {n}, {self.mask(i)}, {pc})"
        )
        if target != "_":
            self.write(target, f"{old}.view({t})", t, i)

    def op_red(self, i: Instruction, pc: int) -> None:
        if i.parts[1] == "async":
            raise PtxError("red.async")
        self.op_atom(replace(i, operands=["_", *i.operands]), pc)

    # ---- no effect that is modelled
    def op_prefetch(self, i: Instruction, pc: int) -> None:
        """Hints to caches, clocks and registers."""

    op_prefetchu = op_discard = op_applypriority = op_nanosleep = op_membar = op_prefetch
    op_setmaxnreg = op_griddepcontrol = op_brkpt = op_pmevent = op_createpolicy = op_prefetch

    def op_fence(self, i: Instruction, pc: int) -> None:
        if "proxy" in i.parts:
            self.emit(f"M.fence_proxy({self.mask(i)})")

    # ---- lanes of a warp
    def op_shfl(self, i: Instruction, pc: int) -> None:
        target, a, b, c, *members = i.operands
        value, inside = self.temporary(), self.temporary()
        mask = self.read(members[0], "s32") if members else "i4(-1)"
        how = next(p for p in i.parts if p in ("up", "down", "bfly", "idx"))
        self.emit(
            f"{value}, {inside} = M.shuffle({how!r}, "
            f"{self.read(a, 's32')}, {self.read(b, 's32')}, {self.read(c, 's32')}, {mask}, "
            f"{self.mask(i)}, {pc})"
        )
        if isinstance(target, Pair):
            self.write(target.second, inside, "?", i)
            target = target.first
        self.write(target, value, "i4", i)

    def op_vote(self, i: Instruction, pc: int) -> None:
        target, p, members = i.operands
        how = i.parts[2]
        value = (
            f"M.vote({how!r}, {self.read(p, 'pred')}, {self.read(members, 's32')}, "
            f"{self.mask(i)}, {pc})"
        )
        self.write(target, value, "i4" if how == "ballot" else "?", i)

    def op_match(self, i: Instruction, pc: int) -> None:
        target, a, members = i.operands
        kind = types.signless(i.types()[-1])
        value, same = self.temporary(), self.temporary()
        self.emit(
            f"{value}, {same} = M.match({i.parts[1]!r}, {self.read(a, kind)}, "
            f"{self.read(members, 's32')}, {self.mask(i)}, {pc})"
        )
        if isinstance(target, Pair):
            self.write(target.second, same, "?", i)
            target = target.first
        self.write(target, value, "i4", i)

    def op_redux(self, i: Instruction, pc: int) -> None:
        target, a, members = i.operands
        kind = i.types()[-1]
        kind = f"u{kind[1:]}" if kind[0] == "b" else kind
        value = (
            f"M.reduce({i.parts[2]!r}, {self.read(a, kind)}, {self.read(members, 's32')}, "
            f"{self.mask(i)}, {pc})"
        )
        self.write(target, value, types.name(kind), i)

    def op_elect(self, i: Instruction, pc: int) -> None:
        target, members = i.operands
        leader, chosen = self.temporary(), self.temporary()
        self.emit(
            f"{leader}, {chosen} = M.elect({self.read(members, 's32')}, {self.mask(i)}, {pc})"
        )
        self.write(target.second, chosen, "?", i)
        self.write(target.first, leader, "i4", i)

    def op_activemask(self, i: Instruction, pc: int) -> None:
        self.write(i.operands[0], f"M.active_mask({self.mask(i)})", "i4", i)

    # ---- barriers
    def op_bar(self, i: Instruction, pc: int) -> None:
        if "warp" in i.parts:
            self.emit(f"M.sync_warp({self.read(i.operands[0], 's32')}, {self.mask(i)}, {pc})")
        elif "arrive" in i.parts and "cluster" not in i.parts:
            name, count = (self.read(x, "s32") for x in i.operands)
            self.emit(f"M.barrier_arrive({name}, {count}, {self.mask(i)}, {pc})")
        elif "arrive" not in i.parts:
            raise PtxError("a barrier within a block")

    op_barrier = op_bar

    def ending(self, i: Instruction, pc: int, block: Block) -> str:
        """What a block's function returns: a condition, or a barrier's name and count."""
        p = self.predicate(i)
        if block.kind == "branch":
            return p or "None"
        if block.kind == "exit":
            if i.base == "trap":
                self.emit(f"M.trap({self.mask(i)}, {pc})")
            return p or "None"
        operands = list(i.operands)
        value = "None"
        if "red" in i.parts:
            target, *operands, source = operands
            value = self.read(source, "pred")
            how = i.parts[2] if i.base == "bar" else i.parts[i.parts.index("red") + 1]
            have = self.program.body.registers[target]
            block.reduction = (how, self.program.index[target], have)
            self.register(target)
        if "cluster" in i.parts:
            operands = ["-1"]
        name, count = (
            f"int(np.ravel({self.read(x, 's32')})[0])" if x else "0"
            for x in (operands + [""] * 2)[:2]
        )
        result = f"({name}, {count}, {value})"
        return f"({result}, np.broadcast_to({p}, M.lanes.shape))" if p else result

    # ---- matrices
    def op_ldmatrix(self, i: Instruction, pc: int) -> None:
        count = int(next(p for p in i.parts if re.fullmatch(r"x[124]", p))[1:])
        if "m8n8" not in i.parts or "b16" not in i.parts:
            raise PtxError("shape or type")
        targets = i.operands[0] if isinstance(i.operands[0], tuple) else (i.operands[0],)
        words = [self.temporary() for _ in range(count)]
        self.emit(
            f"[{', '.join(words)}] = M.load_matrices({self.address(i.operands[1])}, {count}, "
            f"{'trans' in i.parts}, {self.mask(i)}, {pc})"
        )
        for word, register in zip(words, targets, strict=True):
            self.write(register, word, "i4", i)

    def op_stmatrix(self, i: Instruction, pc: int) -> None:
        if "m8n8" not in i.parts or "b16" not in i.parts:
            raise PtxError("shape or type")
        sources = i.operands[1] if isinstance(i.operands[1], tuple) else (i.operands[1],)
        values = ", ".join(self.read(s, "s32") for s in sources)
        self.emit(
            f"M.store_matrices({self.address(i.operands[0])}, [{values}], {'trans' in i.parts}, "
            f"{self.mask(i)}, {pc})"
        )

    def op_mma(self, i: Instruction, pc: int) -> None:
        shape = next(p for p in i.parts if re.fullmatch(r"m\d+n\d+k\d+", p))
        into, a_kind, b_kind, c_kind = i.types()
        if "row" not in i.parts or "col" not in i.parts or "sp" in i.parts:
            raise PtxError("layout")
        vectors = [v if isinstance(v, tuple) else (v,) for v in i.operands]
        kinds = [_fragment(k) for k in (into, a_kind, b_kind, c_kind)]
        a, b, c = (
            ", ".join(self.read(x, kind) for x in v)
            for v, kind in zip(vectors[1:], kinds[1:], strict=True)
        )
        words = [self.temporary() for _ in vectors[0]]
        self.emit(
            f"[{', '.join(words)}] = M.multiply({shape!r}, {into!r}, {a_kind!r}, {b_kind!r}, "
            f"{c_kind!r}, [{a}], [{b}], [{c}], {self.mask(i)}, {pc})"
        )
        for word, register in zip(words, vectors[0], strict=True):
            self.write(register, word, types.name(kinds[0]), i)

    def op_wgmma(self, i: Instruction, pc: int) -> None:
        if i.parts[1] == "fence":
            return
        if i.parts[1] == "commit_group":
            self.emit("M.commit_products()")
            return
        if i.parts[1] == "wait_group":
            self.emit(f"M.wait_products({int(i.operands[0])}, {self.mask(i)}, {pc})")
            return
        shape = next(p for p in i.parts if re.fullmatch(r"m64n\d+k\d+", p))
        n, k = (int(x) for x in re.findall(r"\d+", shape)[1:])
        into, kind, other = i.types()
        if kind != other or kind not in ("f16", "bf16", "tf32") or "sp" in i.parts:
            raise PtxError("types")
        d, a, b, keep, *flags = i.operands
        have = "f32" if into == "f32" else "s32"
        flags = [int(x) for x in flags]
        negate, transposed = flags[:2], flags[2:]
        transposed = [0] * (2 - len(transposed)) + transposed
        old = ", ".join(self.read(x, have) for x in d)
        if isinstance(a, tuple):
            a = f"[{', '.join(self.read(x, 's32') for x in a)}]"
        else:
            a = self.read(a, "s64")
        words = [self.temporary() for _ in d]
        self.emit(
            f"[{', '.join(words)}] = M.group_product({n}, {k}, {into!r}, {kind!r}, [{old}], "
            f"{list(d)}, {a}, {self.read(b, 's64')}, {self.read(keep, 'pred')}, {negate}, "
            f"{transposed}, {self.mask(i)}, {pc})"
        )
        for word, register in zip(words, d, strict=True):
            self.write(register, word, types.name(have), i)

    # ---- asynchronous copies
    def op_cp(self, i: Instruction, pc: int) -> None:
        words, mask = i.parts[2:], self.mask(i)
        if i.parts[1] != "async":
            raise PtxError("form")
        if words[0] in ("cg", "ca"):
            to, source, n, *have = i.operands
            count = "None"
            if have and self.program.body.registers.get(have[0]) == "?":
                count = f"where({self.read(have[0], 'pred')}, 0, {int(n, 0)})"
            elif have and "L2::cache_hint" not in words:
                count = self.read(have[0], "s32")
            place = f"{self.address(to)}, {self.address(source)}"
            self.emit(f"M.copy_async({place}, {int(n, 0)}, {count}, {mask}, {pc})")
        elif words[0] == "commit_group":
            self.emit(f"M.commit_copies({mask})")
        elif words[0] in ("wait_group", "wait_all"):
            newest = int(i.operands[0], 0) if i.operands else None
            self.emit(f"M.wait_copies({newest}, {mask}, {pc})")
        elif words[0] == "mbarrier":
            place = self.address(i.operands[0])
            self.emit(f"M.copies_arrive({place}, {'noinc' in words}, {mask}, {pc})")
        elif words[0] == "bulk":
            self._bulk(i, words, mask, pc)
        else:
            raise PtxError("form")

    def _bulk(self, i: Instruction, words, mask: str, pc: int) -> None:
        if {"multicast::cluster", "im2col", "reduce", "tile::gather4"} & set(words):
            raise PtxError("form")
        if "commit_group" in words or "prefetch" in words:
            return
        if "wait_group" in words:
            self.emit(f"M.wait_bulk({int(i.operands[0], 0)}, {mask}, {pc})")
            return
        load = any(w.startswith("mbarrier") for w in words)
        to, source, *rest = (self.address(x) if isinstance(x, Address) else x for x in i.operands)
        if "tensor" in words:
            tensor = i.operands[1 if load else 0].coordinates
            coordinates = f"[{', '.join(self.read(c, 's32') for c in tensor)}]"
            if load:
                self.emit(f"M.tensor_load({to}, {source}, {coordinates}, {rest[0]}, {mask}, {pc})")
            else:
                self.emit(f"M.tensor_store({to}, {coordinates}, {source}, {mask}, {pc})")
            return
        size = self.read(rest[0], "s32")
        if load:
            self.emit(f"M.bulk_load({to}, {source}, {size}, {rest[1]}, {mask}, {pc})")
        else:
            self.emit(f"M.bulk_store({to}, {source}, {size}, {mask}, {pc})")

    def op_mbarrier(self, i: Instruction, pc: int) -> None:
        how, operands = i.parts[1], list(i.operands)
        target = "_" if isinstance(operands[0], Address) else operands.pop(0)
        place, mask = self.address(operands[0]), self.mask(i)
        values = [
            self.read(x, "s64" if "wait" in how and "parity" not in i.parts else "s32")
            for x in operands[1:]
        ]
        if how == "init":
            self.emit(f"M.barrier_init({place}, {values[0]}, {mask}, {pc})")
        elif how == "inval":
            self.emit(f"M.barrier_end({place}, {mask}, {pc})")
        elif how in ("expect_tx", "complete_tx"):
            sign = 1 if how == "expect_tx" else -1
            self.emit(f"M.expect_bytes({place}, {values[0]}, {mask}, {pc}, {sign})")
        elif how in ("arrive", "arrive_drop"):
            expect = "expect_tx" in i.parts
            count = values[0] if values and not expect else "1"
            state = self.temporary()
            self.emit(
                f"{state} = M.arrive({place}, {count}, {mask}, {pc}, "
                f"{values[0] if expect else 0}, {how == 'arrive_drop'})"
            )
            self.write(target, state, "i8", i)
        elif how in ("test_wait", "try_wait"):
            done, parity = self.temporary(), "parity" in i.parts
            self.emit(f"{done} = M.barrier_test({place}, {values[0]}, {parity}, {mask}, {pc})")
            self.write(target, done, "?", i)
        else:
            raise PtxError("form")


def _fragment(kind: str) -> str:
    """Type of the registers that hold a fragment."""
    return kind if kind in ("f32", "f64", "s32") else "s32"
