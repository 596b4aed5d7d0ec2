# SPDX-License-Identifier: Apache-2.0
"""Instructions that act on memory, on other lanes or on the schedule: calls of the machine."""

import re
from dataclasses import replace

from . import opcodes, types
from .parse import Address, Instruction, listed
from .report import PtxError
from .writer import Writer, narrowed, widened

SPACES = {"global", "shared", "local", "param", "const"}
# of loads, stores and atomics: how far they are seen and where they are cached
ACCEPTED = re.compile(
    r"(weak|relaxed|acquire|release|acq_rel|volatile|mmio|gpu|sys|cta|cluster|nc|ca|cg|cs|lu|cv|wb|wt"
    r"|unified|global|local|const|param(::\w+)?|shared(::\w+)?|v[248]|noftz|L[12]::\w+)$"
)
# o is the old value, b and c the operands, all of the instruction's type
ATOMICS = {
    **{k: opcodes.TABLE[k][0].format("o", "b") for k in ("add", "min", "max", "and", "or", "xor")},
    "exch": "b",
    "inc": "where(o >= b, o.dtype.type(0), o + o.dtype.type(1))",
    "dec": "where((o == 0) | (o > b), b, o - o.dtype.type(1))",
    "cas": "where(o == b, c, o)",
}
# method of the machine, types of the operands: t that of the instruction, i 32 bits, p a predicate
WARP_LEVEL = {
    "shfl": ("shuffle", "iiii"),
    "vote": ("vote", "pi"),
    "match": ("match", "ti"),
    "redux": ("reduce", "ti"),
    "elect": ("elect", "i"),
    "activemask": ("active_mask", ""),
}
HOW = re.compile("up|down|bfly|idx|any|all|uni|ballot|add|min|max|and|or|xor")
ALIKE = {"ldu": "ld", "stmatrix": "ldmatrix", "barrier": "bar"}
WITHOUT_EFFECT = """prefetch prefetchu discard applypriority nanosleep membar setmaxnreg
    griddepcontrol brkpt pmevent createpolicy"""


def is_barrier(i: Instruction) -> bool:
    return i.base in ("bar", "barrier") and not {"warp", "arrive"} & set(i.parts)


def unless(condition: bool, text: str) -> None:
    if condition:
        raise PtxError(text)


class Effects(Writer):
    def call(self, i: Instruction, pc: int, method: str, *arguments, give=()) -> None:
        """Assigns what M.method(arguments, mask, pc) returns to (register, NumPy type), ..."""
        words = [self.temporary() for _ in give]
        target = f"[{', '.join(words)}] = " if words else ""
        given = ", ".join(str(x) for x in (*arguments, self.mask(i), pc))
        self.emit(f"{target}M.{method}({given})")
        for word, (register, have) in zip(words, give, strict=True):
            self.write(register, word if have[0] == "?" else f"{word}.view({have})", have, i)

    def values(self, operands, kind: str) -> str:
        return f"[{', '.join(self.read(x, kind) for x in operands)}]"

    def address(self, address: Address) -> str:
        """Base and offset as two arguments; registers in their own width."""
        known = address.base in self.program.index
        base = self.register(address.base) if known else self.read(address.base, "s64")
        return f"{base}, {address.offset}"

    def access(self, i: Instruction, address: Address, *known: str) -> tuple[str, int, str]:
        """Type, its bytes, and the space of a load, store or atomic."""
        for p in i.parts[1:]:
            unless(p not in types.TYPES | set(known) and not ACCEPTED.match(p), f"modifier {p}")
        space = next((p.split("::")[0] for p in i.parts[1:] if p.split("::")[0] in SPACES), "")
        if not space and address.base in self.program.symbols:
            space = self.program.symbols[address.base][0]
        kind = i.types()[-1]
        return kind, types.bits(kind) // 8, {"const": "global"}.get(space, space)

    def op_ld(self, i: Instruction, pc: int) -> None:
        targets, address = listed(i.operands[0]), i.operands[1]
        kind, n, space = self.access(i, address)
        have = types.NAMES[kind]
        if kind[0] == "b" or kind in types.HALVES:  # zeros are put before bits
            have = f"u{n}"
        if space == "param" and address.base in self.program.symbols:
            at = self.program.symbols[address.base][1] + address.offset
            for k, register in enumerate(targets):
                value = f"np.frombuffer(M.raw, {have}, 1, {at + k * n})[0]"
                self.write(register, value, have, i)
            return
        give = [(register, have) for register in targets]
        self.call(i, pc, "load", repr(space), self.address(address), n, len(targets), give=give)

    def op_st(self, i: Instruction, pc: int) -> None:
        address, source = i.operands[:2]
        kind, n, space = self.access(i, address)
        values = self.values(listed(source), kind if kind in types.FLOATS else f"u{8 * n}")
        self.call(i, pc, "store", repr(space), self.address(address), values, n)

    def op_atom(self, i: Instruction, pc: int) -> None:
        target, address, *sources = i.operands
        how = next(p for p in i.parts[1:] if p in ATOMICS)
        unless(isinstance(target, tuple), "vector")
        kind, n, space = self.access(i, address, how)
        t, names = types.NAMES[kind], "o, b, c" if how == "cas" else "o, b"
        change = f"(lambda {names}: {ATOMICS[how]})(o.view({t}), {names[3:]})"
        if kind in types.HALVES and how != "exch":
            unless(how != "add", f"{how} of {kind}")
            change = narrowed(f"{widened('o', kind)} + {widened('b', kind)}", kind)
        values = self.values(sources[: 2 if how == "cas" else 1], kind)
        arguments = (repr(space), self.address(address), f"lambda {names}: {change}", values, n)
        self.call(i, pc, "atomic", *arguments, give=[(target, t)])

    def op_red(self, i: Instruction, pc: int) -> None:
        self.op_atom(replace(i, operands=["_", *i.operands]), pc)

    def op_fence(self, i: Instruction, pc: int) -> None:
        if "proxy" in i.parts:
            self.call(i, pc, "fence_proxy")

    def op_shfl(self, i: Instruction, pc: int) -> None:
        """Results are a value and a predicate beside it, `a|p`, or the first alone."""
        method, letters = WARP_LEVEL[i.base]
        how = [repr(p) for p in i.parts[1:] if HOW.fullmatch(p)]
        kind = next(iter(i.types()), "b32")
        kinds = {"t": f"u{kind[1:]}" if kind[0] == "b" else kind, "i": "s32", "p": "pred"}
        operands = (*i.operands[1:], *["-1"] * (i.base == "shfl"))
        values = [self.read(x, kinds[t]) for t, x in zip(letters, operands, strict=False)]
        target, have = i.operands[0], "?" if kind == "pred" else types.NAMES[kinds["t"]]
        have = "i4" if i.base in ("shfl", "match", "elect") else have
        give = list(zip((*listed(target), "_"), (have, "?"), strict=False))
        if i.base != "activemask":
            self.call(i, pc, "demand", values[-1])
        self.call(i, pc, method, *how, *values, give=give)

    def op_bar(self, i: Instruction, pc: int) -> None:
        values = [self.read(x, "s32") for x in i.operands]
        if "warp" in i.parts:
            self.call(i, pc, "demand", *values)
            self.call(i, pc, "sync_warp")
        elif "cluster" not in i.parts:
            self.call(i, pc, "barrier_arrive", values[0])

    def ending(self, i: Instruction, pc: int, block) -> str:
        """What a block's function returns: a condition, or a barrier's name and count."""
        p = self.predicate(i)
        if i.base == "trap":
            self.emit(f"M.find('trap', {pc}, 'a trap is reached', M.standing({self.mask(i)}))")
        if block.kind != "barrier":
            return p or "None"
        operands, value = ["-1"] if "cluster" in i.parts else list(i.operands), "None"
        if "red" in i.parts:
            target, *operands, source = operands
            value = self.read(source, "pred")
            have = self.program.body.registers[target]
            how = i.parts[i.parts.index("red") + 1]
            block.reduction = (how, self.program.index[target], have)
        words = [self.read(x, "s32") for x in (*operands, "0", "0")[:2]]
        name, count = (f"int(np.ravel({word})[0])" for word in words)
        return f"({name}, {count}, {value}, {p})"

    def op_ldmatrix(self, i: Instruction, pc: int) -> None:
        unless(not {"m8n8", "b16"} <= set(i.parts), "shape or type")
        trans, load = "trans" in i.parts, i.base == "ldmatrix"
        registers, address = i.operands if load else i.operands[::-1]
        place, registers = self.address(address), listed(registers)
        if load:
            give = [(register, "i4") for register in registers]
            self.call(i, pc, "load_matrices", place, len(registers), trans, give=give)
        else:
            self.call(i, pc, "store_matrices", place, self.values(registers, "s32"), trans)

    def op_mma(self, i: Instruction, pc: int) -> None:
        unless("row" not in i.parts or "col" not in i.parts or "sp" in i.parts, "layout")
        shape = tuple(int(x) for x in re.search(r"m(\d+)n(\d+)k(\d+)", i.text).groups())
        kinds = tuple(i.types())  # of D, A, B, C
        held = [kind if kind in ("f32", "f64", "s32") else "s32" for kind in kinds]
        d, *sources = (listed(v) for v in i.operands)
        values = [self.values(v, kind) for v, kind in zip(sources, held[1:], strict=True)]
        give = [(register, types.NAMES[held[0]]) for register in d]
        self.call(i, pc, "multiply", shape, kinds, *values, give=give)

    def op_wgmma(self, i: Instruction, pc: int) -> None:
        if i.parts[1] == "commit_group":
            self.call(i, pc, "commit_products")
        elif i.parts[1] == "wait_group":
            self.call(i, pc, "wait_products", int(i.operands[0]))
        elif i.parts[1] == "mma_async":
            n, k = (int(x) for x in re.search(r"m64n(\d+)k(\d+)", i.text).groups())
            into, kind, other = i.types()
            unless(kind != other or kind not in ("f16", "bf16", "tf32"), "types")
            unless("sp" in i.parts, "sparse")
            d, a, b, keep, *flags = i.operands
            flags = [int(x) for x in flags]
            have = "f32" if into == "f32" else "s32"
            left = self.values(a, "s32") if isinstance(a, tuple) else self.read(a, "s64")
            values = self.values(d, have), list(d), left, self.read(b, "s64")
            how = self.read(keep, "pred"), flags[:2], [0] * (4 - len(flags)) + flags[2:]
            give = [(register, types.NAMES[have]) for register in d]
            shape = n, k, repr(into), repr(kind)
            self.call(i, pc, "group_product", *shape, *values, *how, give=give)

    def op_cp(self, i: Instruction, pc: int) -> None:
        words = i.parts[2:]
        unless(i.parts[1] != "async", "form")
        if words[0] in ("cg", "ca"):
            to, source, n, *have = i.operands
            count = int(n, 0)
            if have and self.program.body.registers.get(have[0]) == "?":
                count = f"where({self.read(have[0], 'pred')}, 0, {count})"
            elif have and "L2::cache_hint" not in words:
                count = self.read(have[0], "s32")
            places = self.address(to), self.address(source)
            self.call(i, pc, "copy_async", *places, int(n, 0), count)
        elif words[0] == "commit_group":
            self.call(i, pc, "commit_copies")
        elif words[0] in ("wait_group", "wait_all"):
            self.call(i, pc, "wait_copies", int(i.operands[0], 0) if i.operands else None)
        elif words[0] == "mbarrier":
            self.call(i, pc, "copies_arrive", self.address(i.operands[0]), "noinc" in words)
        else:
            unless(words[0] != "bulk", "form")
            self._bulk(i, words, pc)

    def _bulk(self, i: Instruction, words: tuple[str, ...], pc: int) -> None:
        unless(bool({"multicast::cluster", "im2col", "tile::gather4"} & set(words)), "form")
        if "commit_group" in words or "prefetch" in words:
            return
        if "wait_group" in words:
            self.call(i, pc, "wait_bulk", int(i.operands[0], 0))
            return
        load = any(w.startswith("mbarrier") for w in words)
        to, source, *rest = (self.address(x) if isinstance(x, Address) else x for x in i.operands)
        if "tensor" in words:
            extent = self.values(i.operands[1 if load else 0].coordinates, "s32")
        else:
            extent = self.read(rest.pop(0), "s32")
        barrier = rest[:1] if load else ()
        self.call(i, pc, "bulk_load" if load else "bulk_store", to, source, extent, *barrier)

    def op_mbarrier(self, i: Instruction, pc: int) -> None:
        how, operands, parity = i.parts[1], list(i.operands), "parity" in i.parts
        target = "_" if isinstance(operands[0], Address) else operands.pop(0)
        kind = "s64" if "wait" in how and not parity else "s32"
        place, values = self.address(operands[0]), [self.read(x, kind) for x in operands[1:]]
        if how in ("test_wait", "try_wait"):
            self.call(i, pc, "barrier_test", place, values[0], parity, give=[(target, "?")])
        elif how in ("arrive", "arrive_drop"):
            first = values[0] if values else 1
            counts = (1, first) if "expect_tx" in i.parts else (first, 0)
            give = [(target, "i8")]
            self.call(i, pc, "arrive", place, *counts, how == "arrive_drop", give=give)
        elif how in ("expect_tx", "complete_tx"):
            self.call(i, pc, "expect_bytes", place, values[0], 1 if how == "expect_tx" else -1)
        else:
            unless(how not in ("init", "inval"), "form")
            self.call(i, pc, f"barrier_{how}", place, *values)


for name in WITHOUT_EFFECT.split():
    setattr(Effects, f"op_{name}", lambda self, i, pc: None)
for name, like in {**dict.fromkeys(WARP_LEVEL, "shfl"), **ALIKE}.items():
    setattr(Effects, f"op_{name}", getattr(Effects, f"op_{like}"))
