# SPDX-License-Identifier: Apache-2.0
"""How often each instruction of a compiled kernel runs: loops of its TTIR, loops of its SASS.

TTIR gives the loops of the source with bounds that are arithmetic on the arguments of the launch;
SASS gives the instructions of each loop. Where the compiler took a loop apart, a copy of a loop's
matrix instructions before or behind it counts as one pass less, and a loop of the source that is
missing multiplies into the one around or inside it.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

MATRIX = ("HGMMA", "HMMA", "QGMMA", "IMMA")


@dataclass
class Loop:
    """One loop: how often its body runs each time it is reached, and the loops inside."""

    trips: int | None = None  # None: not known
    inside: list[Loop] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)  # of a body in SASS, without `inside`

    @property
    def depth(self) -> int:
        return 1 + max((loop.depth for loop in self.inside), default=0)


# --- TTIR -------------------------------------------------------------------------------------

_BINARY = {
    "addi": lambda a, b: a + b,
    "subi": lambda a, b: a - b,
    "muli": lambda a, b: a * b,
    "divsi": lambda a, b: int(a / b) if b else None,
    "remsi": lambda a, b: a - b * int(a / b) if b else None,
    "ceildivsi": lambda a, b: -(-a // b) if b else None,
    "minsi": min,
    "maxsi": max,
    "andi": lambda a, b: a & b,
    "ori": lambda a, b: a | b,
    "shli": lambda a, b: a << b,
    "shrsi": lambda a, b: a >> b,
}
_COMPARE = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "slt": lambda a, b: a < b,
    "sle": lambda a, b: a <= b,
    "sgt": lambda a, b: a > b,
    "sge": lambda a, b: a >= b,
}
_FOR = re.compile(r"scf\.for (%[\w#]+) = (%[\w#]+) to (%[\w#]+) step (%[\w#]+)")
_IF = re.compile(r"^(?:(%\w+)(?::\d+)? = )?scf\.if (%[\w#]+)")
_ASSIGN = re.compile(r"^(%[\w#]+)(?::\d+)? = (.*)$")


class _Scalars:
    """Values of integers by name; what is read from memory or a tensor has none."""

    def __init__(self, values: dict[str, int]) -> None:
        self.known: dict[str, int | None] = {f"%{name}": v for name, v in values.items()}

    def of(self, name: str) -> int | None:
        return self.known.get(name)

    def assign(self, name: str, text: str) -> None:
        self.known[name] = self._value(text)

    def _value(self, text: str) -> int | None:
        text = text.split(" loc(")[0]
        if "tensor<" in text:
            return None
        if found := re.match(r"arith\.constant (-?\d+|true|false)\b", text):
            word = found.group(1)
            return int(word) if word.lstrip("-").isdigit() else int(word == "true")
        if text.startswith("tt.get_program_id"):
            return 0  # the first program has as much to do as any
        operands = [self.of(name) for name in re.findall(r"%[\w#]+", text)]
        if not operands or None in operands:
            return None
        if re.match(r"arith\.(ext|trunc|index_cast)", text):
            return operands[0]
        if found := re.match(r"arith\.cmpi (\w+)", text):
            compare = _COMPARE.get(found.group(1))
            return None if compare is None else int(compare(operands[0], operands[1]))
        if text.startswith("arith.select"):
            return operands[1] if operands[0] else operands[2]
        found = re.match(r"arith\.(\w+)", text)
        binary = _BINARY.get(found.group(1)) if found else None
        return None if binary is None or len(operands) != 2 else binary(*operands)


@dataclass
class _Branch:
    """An open `scf.if`: the name of its results, and whether this side is taken, if known."""

    name: str
    taken: bool | None


def of_ttir(text: str, values: dict[str, int]) -> list[Loop]:
    """The outermost loops of a kernel, their trips for these values of its arguments."""
    scalars, root = _Scalars(values), Loop(1)
    stack: list[Loop | _Branch | None] = []  # one for every open brace
    for line in text.splitlines():
        line = line.split(" loc(")[0].strip()
        opened: Loop | _Branch | None = None
        if line.startswith("}"):
            closed = stack.pop() if stack else None
            if isinstance(closed, _Branch) and closed.taken is not None:
                opened = _Branch(closed.name, not closed.taken)  # where it goes on with `else`
        elif "scf.for" in line:
            opened = _for(line, scalars)
        elif "scf.while" in line:
            opened = Loop(None)
        elif found := _IF.match(line):
            taken = scalars.of(found.group(2))
            opened = _Branch(found.group(1) or "", None if taken is None else bool(taken))
        elif line.startswith("scf.yield"):
            _yielded(line, stack, scalars)
        elif found := _ASSIGN.match(line):
            scalars.assign(*found.groups())
        if isinstance(opened, Loop):
            around = next((x for x in reversed(stack) if isinstance(x, Loop)), root)
            if not any(isinstance(x, _Branch) and x.taken is False for x in stack):
                around.inside.append(opened)
        if line.endswith("{"):
            stack.append(opened)
    return root.inside


def _yielded(line: str, stack: list[Loop | _Branch | None], scalars: _Scalars) -> None:
    """Results of the side of a branch that is taken."""
    branch = stack[-1] if stack else None
    if not isinstance(branch, _Branch) or branch.taken is not True:
        return
    names = re.findall(r"%[\w#]+", line.split(" : ")[0])
    for at, name in enumerate(names):
        result = branch.name if len(names) == 1 else f"{branch.name}#{at}"
        scalars.known[result] = scalars.of(name)


def _for(line: str, scalars: _Scalars) -> Loop:
    found = _FOR.search(line)
    if found is None:
        return Loop(None)
    index, *bounds = found.groups()
    first, last, step = (scalars.of(name) for name in bounds)
    scalars.known[index] = first
    if first is None or last is None or not step:
        return Loop(None)
    return Loop(max(0, -(-(last - first) // step)))


# --- SASS -------------------------------------------------------------------------------------

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
_LABEL = re.compile(r"^(\.L\w+):")


def of_sass(text: str) -> Loop:
    """The kernel as a loop of one trip: instructions by opcode, a matrix one with its shape."""
    code: list[tuple[str, str]] = []
    labels: dict[str, int] = {}
    jumps: list[tuple[int, str]] = []
    for line in text.splitlines():
        if found := _LABEL.match(line.strip()):
            labels[found.group(1)] = len(code)
        elif found := _INSTRUCTION.search(line):
            opcode, operands = found.group(3), found.group(4)
            if opcode.startswith("BRA") and (target := re.search(r"\.L\w+", operands)):
                jumps.append((len(code), target.group(0)))
            code.append((opcode, operands))
    ends: dict[int, int] = {}  # first instruction of a loop -> its last
    for at, name in jumps:
        start = labels.get(name, at)
        if start < at:
            ends[start] = max(ends.get(start, 0), at)
    root = Loop(1)
    open_: list[tuple[int, Loop]] = [(len(code), root)]
    for at, (opcode, operands) in enumerate(code):
        while at > open_[-1][0]:
            open_.pop()
        if at in ends and ends[at] <= open_[-1][0]:
            loop = Loop()
            open_[-1][1].inside.append(loop)
            open_.append((ends[at], loop))
        open_[-1][1].counts[_named(opcode, operands)] += 1
    return root


def _named(opcode: str, operands: str) -> str:
    if opcode == "NOP":
        return "NOP"
    if not opcode.startswith("HGMMA"):
        return opcode
    first = operands.split(",")[1] if "," in operands else ""
    return f"{opcode} {'registers' if first.strip().startswith('R') else 'shared'}"


def matrix(counts: Counter[str]) -> int:
    return sum(number for name, number in counts.items() if name.startswith(MATRIX))


# --- both -------------------------------------------------------------------------------------


def with_trips(sass: Loop, ttir: list[Loop]) -> list[str]:
    """Gives every loop of `sass` its trips; returns what had to be guessed."""
    sass.trips = 1
    return _match(sass, [loop for loop in ttir if loop.trips != 0])


def _match(around: Loop, sources: list[Loop]) -> list[str]:
    found, guesses = around.inside, []
    if not found:
        return []
    useful = [loop for loop in sources if loop.trips is None or loop.trips > 1 or loop.inside]
    sources = useful if len(useful) >= len(found) or not sources else sources
    pairs = _paired(found, sources)
    if len(sources) != len(found):
        guesses.append(f"{len(found)} loops compiled of {len(sources)} in the source")
    for loop, source in pairs:
        if source is None:
            loop.trips = 1
            guesses.append("a loop that the source does not have runs once")
            guesses += _match(loop, [])
            continue
        trips, inside = source.trips, source.inside
        if trips is None:
            trips, guesses = 1, [*guesses, "a loop of unknown length runs once"]
        while inside and loop.depth < 1 + max(part.depth for part in inside):
            # the loops inside are gone: this one runs through all of them
            longest = max(inside, key=lambda part: part.trips or 1)
            trips, inside = trips * max(1, longest.trips or 1), longest.inside
        copies = 0
        if matrix(loop.counts) and matrix(around.counts):
            copies = round(matrix(around.counts) / matrix(loop.counts))
        loop.trips = max(0, trips - copies)
        guesses += _match(loop, inside)
    return guesses


def _paired(found: list[Loop], sources: list[Loop]) -> list[tuple[Loop, Loop | None]]:
    if len(found) == len(sources):
        return list(zip(found, sources, strict=True))
    if len(found) < len(sources):  # the shortest were unrolled
        by_length = sorted(sources, key=lambda loop: -(loop.trips or 1) * loop.depth)
        kept = [loop for loop in sources if any(loop is x for x in by_length[: len(found)])]
        return list(zip(found, kept, strict=True))
    pairs: list[tuple[Loop, Loop | None]] = []
    spare = len(found) - len(sources)
    at = 0
    for source in sources:  # an unrolled loop and the one for its remainder
        first = found[at]
        size = first.counts.total()
        rest = found[at + 1].counts.total() if at + 1 < len(found) else 0
        times = round(size / rest) if rest else 1
        if spare and times > 1 and source.trips:
            pairs.append((first, Loop(source.trips // times, source.inside)))
            pairs.append((found[at + 1], Loop(source.trips % times, source.inside)))
            at, spare = at + 2, spare - 1
        else:
            pairs.append((first, source))
            at += 1
    return [*pairs, *((loop, None) for loop in found[at:])]
