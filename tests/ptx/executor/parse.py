# SPDX-License-Identifier: Apache-2.0
"""PTX text to kernels of instructions."""

import bisect
import functools
import math
import re
from dataclasses import dataclass

import numpy as np

from . import types
from .report import PtxError

NAME = r"[%$\w][\w$]*(?:\.\w+)?"
# nothing of interest, a brace, a label, a statement
TOKEN = re.compile(
    r"(?:\.(?:loc|pragma|file)\b[^\n;]*;?|[\s;])+|([{}])|([$\w]+)\s*:(?!:)"
    r"|([^;{}]*(?:\{[^{}]*\}[^;{}]*)*);"
)
ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*(?:\(([^)]*)\))?([^{;]*)\{")
VARIABLE = re.compile(
    r"(?:\.(?:extern|visible|weak|common)\s+)*\.(shared|global|const|local)\s+"
    r"(?:\.align\s+(\d+)\s+)?(?:\.v(\d)\s+)?\.(\w+)\s+([\w$]+)((?:\s*\[\s*\d*\s*\])*)"
    r"\s*(?:=\s*(.*?))?\s*$",
    re.S,
)
PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\b(?:\s*\.(?:global|shared|const|local))?"
    r"(?:\s*\.align\s+\d+)?\s+)?(?:\.align\s+(\d+)\s+)?([\w$]+)\s*(?:\[(\d+)\])?"
)
INSTRUCTION = re.compile(rf"(?:@(!?)({NAME})\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
OPERAND = re.compile(r"(?:\[[^\]]*\]|\{[^}]*\}|[^,{\[])+")
ADDRESS = re.compile(rf"({NAME})\s*(?:([+-])\s*(-?\w+))?(?:\s*,\s*(\{{.*\}}))?$", re.S)


@dataclass(frozen=True)
class Address:
    """[base + offset], with coordinates where a tensor map is addressed."""

    base: str
    offset: int = 0
    coordinates: tuple[str, ...] = ()


Operand = str | tuple[str, ...] | Address  # several words: {a, b} or a|b


def listed(operand: Operand) -> tuple[str, ...]:
    """The names and numbers in an operand."""
    if isinstance(operand, Address):
        return (operand.base, *operand.coordinates)
    return operand if isinstance(operand, tuple) else (operand,)


@dataclass
class Instruction:
    parts: tuple[str, ...]  # the opcode between its dots
    operands: list[Operand]
    predicate: str | None
    negated: bool
    line: int
    text: str

    def __post_init__(self):
        self.base = self.parts[0]

    def types(self) -> tuple[str, ...]:
        return tuple(part for part in self.parts[1:] if part in types.TYPES)


@dataclass(frozen=True)
class Parameter:
    name: str
    offset: int
    size: int
    alignment: int


@dataclass(frozen=True)
class Variable:
    """A named piece of memory; `size` 0 stands for dynamic shared memory."""

    space: str
    name: str
    size: int
    alignment: int
    data: bytes = b""


@dataclass(eq=False)
class Kernel:
    """An entry; its body is read when it is first asked for."""

    name: str
    module: "Module"
    span: tuple[int, int]  # of its body in the module's text
    parameters: tuple[Parameter, ...]
    parameter_bytes: int
    maximum_threads: tuple[int, ...] | None
    required_threads: tuple[int, ...] | None
    program: object = None  # the translated form, once made

    @functools.cached_property
    def body(self) -> "Body":
        return Body(self)

    @property
    def instructions(self) -> int:
        return len(self.body.code)


class Module:
    """All kernels of a PTX text; bodies are read when a kernel is first asked for."""

    def __init__(self, text: str):
        blank = lambda m: "\n" * m.group().count("\n") or " "  # noqa: E731
        self.text = re.sub(r"/\*.*?\*/|//[^\n]*", blank, text, flags=re.S)
        self.line_ends = [m.start() for m in re.finditer("\n", self.text)]
        target = re.search(r"^\s*\.target\s+(\w+)", self.text, re.M)
        if target is None:
            raise PtxError("line 1: wanted a .target directive, got none")
        self.target = target[1]
        self.kernels: dict[str, Kernel] = {}
        self.data: dict[str, np.ndarray] = {}  # module variables, once a kernel uses them
        outside, at = "", 0
        for found in ENTRY.finditer(self.text):
            outside += self.text[at : found.start()]
            at = _closing(self.text, found.end())
            self.kernels[found[1]] = self._kernel(found, at - 1)
        statements = re.findall(r"\.(?:shared|global|const)\b[^;]*", outside + self.text[at:])
        found = [_variable(statement) for statement in statements]
        self.variables = {v.name: v for v in found if v}

    def place(self, variable: Variable) -> int:
        """Address of a module's variable, which the module keeps."""
        if variable.name not in self.data:
            room = np.zeros(variable.size + 256, np.uint8)
            room = room[-room.ctypes.data % 256 :][: variable.size]
            room[: len(variable.data)] = np.frombuffer(variable.data, np.uint8)
            self.data[variable.name] = room
        return self.data[variable.name].ctypes.data

    def line(self, position: int) -> int:
        return bisect.bisect_left(self.line_ends, position) + 1

    def _kernel(self, found: re.Match, end: int) -> Kernel:
        parameters, offset = [], 0
        for text in _split(found[2] or ""):
            match = PARAMETER.match(text)
            if match is None:
                at = self.line(found.start())
                raise PtxError(f"line {at}: parameter {text!r} not understood")
            width = types.bits(match[2]) // 8
            alignment = int(match[1] or match[3] or width)
            size = width * int(match[5] or 1)
            offset = -(-offset // alignment) * alignment
            parameters.append(Parameter(match[4], offset, size, alignment))
            offset += size
        words = (re.search(rf"\.{key}\s+([\d\s,]+)", found[3]) for key in ("maxntid", "reqntid"))
        limits = (match and tuple(int(x) for x in match[1].split(",")) for match in words)
        return Kernel(found[1], self, (found.end(), end), tuple(parameters), offset, *limits)


class Body:
    """One kernel's statements; registers of inner scopes get names of their own."""

    def __init__(self, kernel: Kernel):
        self.module = kernel.module
        self.registers: dict[str, str] = {}  # name to NumPy type
        self.variables: dict[str, Variable] = {}
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self._scopes: list[dict[str, str]] = [{}]
        self._renamed, self._operands = 0, {}
        self._branches: list[tuple[Instruction, list[dict[str, str]]]] = []
        self._read(*kernel.span)
        for instruction, scopes in self._branches:
            instruction.operands[0] = self._name(instruction.operands[0], scopes)

    def _read(self, at: int, end: int) -> None:
        text = self.module.text
        while at < end:
            match = TOKEN.match(text, at, end)
            if match is None:
                raise PtxError(f"line {self.module.line(at)}: cannot read {text[at : at + 60]!r}")
            brace, label, statement = match.groups()
            if brace:
                self._scopes = [*self._scopes, {}] if brace == "{" else self._scopes[:-1]
            elif label:
                label = label if len(self._scopes) == 1 else self._rename(label)
                self.labels[label] = len(self.code)
            elif statement:
                self._statement(statement, self.module.line(at))
            at = match.end()

    def _statement(self, text: str, line: int) -> None:
        if text.startswith(".reg"):
            self._registers(text)
        elif text.startswith("."):
            variable = _variable(text)
            if variable is None:
                raise PtxError(f"line {line}: directive {text!r} not understood")
            self.variables[variable.name] = variable
        else:
            match = INSTRUCTION.match(text)
            if match is None:
                raise PtxError(f"line {line}: cannot read {text!r}")
            negated, predicate, opcode, rest = match.groups()
            operands = [self._operand(part, line) for part in _split(rest)]
            predicate, parts = predicate and self._name(predicate), tuple(opcode.split("."))
            words = " ".join(text.split())
            self.code.append(Instruction(parts, operands, predicate, negated == "!", line, words))
            if parts[0] == "bra":
                self._branches.append((self.code[-1], self._scopes))

    def _registers(self, text: str) -> None:
        match = re.match(r"\.reg\s+(?:\.v\d\s+)?\.(\w+)\s+(.*)", text, re.S)
        kind = types.REGISTERS[match[1]]
        for word in match[2].split(","):
            stem, _, count = word.strip().rstrip(">").partition("<")
            for name in [f"{stem}{i}" for i in range(int(count))] if count else [stem]:
                if len(self._scopes) > 1 or name in self.registers:
                    self._rename(name)
                self.registers[self._name(name)] = kind

    def _rename(self, name: str) -> str:
        self._renamed += 1
        self._scopes[-1][name] = f"{name}__{self._renamed}"
        return self._scopes[-1][name]

    def _name(self, word: str, scopes: list[dict[str, str]] | None = None) -> str:
        for scope in reversed(scopes or self._scopes):
            word = scope.get(word, word) if scope else word
        return word

    def _operand(self, text: str, line: int) -> Operand:
        known = self._operands if not any(self._scopes) else {}
        if text not in known:
            known[text] = self._read_operand(text, line)
        return known[text]

    def _read_operand(self, text: str, line: int) -> Operand:
        if text[0] == "[":
            match = ADDRESS.match(text[1:-1].strip())
            if match is None:
                raise PtxError(f"line {line}: address {text!r} not understood")
            offset = int(match[3].rstrip("U"), 0) if match[3] else 0
            inner = self._words(match[4]) if match[4] else ()
            return Address(self._name(match[1]), -offset if match[2] == "-" else offset, inner)
        if text[0] == "!":
            return self._words(text)[0]
        return self._words(text) if text[0] == "{" or "|" in text else self._name(text)

    def _words(self, text: str) -> tuple[str, ...]:
        """Names, with an exclamation mark where negated, and numbers."""
        words = re.findall(r"(!?)\s*([^\s!{},|]+)", text)
        return tuple(mark + self._name(word) for mark, word in words)


def _split(text: str) -> list[str]:
    """Parts between commas outside brackets."""
    parts = OPERAND.findall(text) if "[" in text or "{" in text else text.split(",")
    return [part.strip() for part in parts if part and not part.isspace()]


def _closing(text: str, at: int) -> int:
    """Position behind the brace that closes a body which starts at `at`."""
    depth = 1
    for match in re.compile(r"[{}]").finditer(text, at):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return match.end()
    raise PtxError("a kernel's body is not closed")


def _variable(text: str) -> Variable | None:
    match = VARIABLE.match(text.strip())
    if match is None:
        return None
    space, alignment, vector, kind, name, extents, values = match.groups()
    width = types.bits(kind) // 8 * int(vector or 1)
    count = math.prod(int(extent or 0) for extent in re.findall(r"\[\s*(\d*)\s*\]", extents))
    numbers = re.findall(r"[-\w.]+", values or "")
    data = b"".join(types.immediate(x, types.NAMES[kind]).tobytes() for x in numbers)
    return Variable(space, name, width * count, int(alignment or width), data)
