# SPDX-License-Identifier: Apache-2.0
"""Summaries of what children report: which kernels ran, were right, how much of each was reached.

python -m harness.coverage X.jsonl [KERNEL] prints the share of every kernel, or what of one kernel
was not reached.
"""

from __future__ import annotations

import functools
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

FLOOR = 0.95
# instruction that no case can reach, with its basic block -> why
OUT_OF_REACH = {
    r"\b(div|rem)\.[su]64\b": "divides operands of more than 32 bits: grids and tensors of 2**32"
}


@dataclass
class Kernel:
    """What all cases together saw of one kernel, or of one variant that Triton compiled."""

    executed: np.ndarray
    beyond: np.ndarray  # what cannot be reached
    launches: int = 0
    cases: set[str] = field(default_factory=set)

    @property
    def reachable(self) -> np.ndarray:
        """What the share is taken of."""
        return self.executed | ~self.beyond

    @property
    def share(self) -> float:
        return float(self.executed[self.reachable].mean())


@dataclass
class Summary:
    """Of one set."""

    name: str
    exist: list[str]
    kernels: dict[str, Kernel]
    cases: int
    errors: list[str]
    findings: list[str]
    suspects: set[str]  # kernels of cases that were wrong, or with findings of their own
    seconds: float
    thread_instructions: int

    @property
    def ran(self) -> set[str]:
        return {family(key, self.exist) for key in self.kernels}

    @property
    def right(self) -> set[str]:
        return self.ran - {family(key, self.exist) for key in self.suspects}

    def shares(self) -> dict[str, float]:
        """Of every kernel the share of its instructions that was reached, over all its variants."""
        reached: dict[str, list[int]] = {}
        for key, kernel in self.kernels.items():
            total = reached.setdefault(family(key, self.exist), [0, 0])
            total[0] += int(kernel.executed.sum())
            total[1] += int(kernel.reachable.sum())
        return {name: part / whole for name, (part, whole) in sorted(reached.items())}

    def line(self) -> str:
        """The counts, for people."""
        wrong = len({line.partition(":")[0] for line in self.errors})
        shares = self.shares().values()
        reached = (
            f"{100 * min(shares):.0f} % at least, {100 * np.mean(list(shares)):.0f} % on average"
        )
        return (
            f"{self.name}: {len(self.exist)} kernels exist, {len(self.ran)} ran"
            f" ({len(self.kernels)} variants), {len(self.right)} were right;"
            f" {self.cases - wrong} of {self.cases} cases right, {len(self.findings)} findings;"
            f" instructions reached: {reached if shares else 'none'}; {self.seconds:.0f} s of CPU"
        )


def family(key: str, exist: Iterable[str]) -> str:
    """The kernel that a variant belongs to: Triton's keys carry a digest of the code."""
    return key if key in exist else key.partition(" ")[0]


def unpacked(row: dict[str, Any], name: str) -> np.ndarray:
    """The flags that a child wrote as text."""
    bits = np.unpackbits(np.frombuffer(bytes.fromhex(row[name]), np.uint8))
    return bits[: row["instructions"]].astype(bool)


@functools.cache
def beyond_reach(kernel: Any) -> np.ndarray:
    """Flags of the instructions of a kernel that ran which `OUT_OF_REACH` names."""
    flags = np.zeros(kernel.instructions, bool)
    for block in kernel.program.blocks:
        code = kernel.body.code[block.start : block.end]
        if any(re.search(pattern, x.text) for x in code for pattern in OUT_OF_REACH):
            flags[block.start : block.end] = True
    return flags


def summary(lines: Iterable[str]) -> Summary:
    """Of the lines of one child."""
    rows = [json.loads(line) for line in lines]
    if not rows or "exist" not in rows[0]:
        raise RuntimeError("the child wrote nothing of what exists")
    first, *rows = rows
    found = Summary(
        f"{first['set']} {first['arch']}", first["exist"], {}, len(rows), [], [], set(), 0.0, 0
    )
    seen = set()
    for row in rows:
        label = f"{row['case']} {row['dtype']}"
        found.errors += [f"{label}: {error}" for error in row["errors"]]
        found.suspects |= set(row["kernels"] if row["errors"] else ())
        for finding in row["findings"]:
            found.suspects.add(finding["kernel"])
            what = finding["kernel"], finding["kind"], finding["line"]
            if what not in seen:
                seen.add(what)
                text = "{kernel}, line {line}: {kind}, {count} times: {message}".format(**finding)
                found.findings.append(f"{label}: {text}")
        for key, part in row["kernels"].items():
            executed, beyond = unpacked(part, "executed"), unpacked(part, "beyond")
            kernel = found.kernels.setdefault(key, Kernel(np.zeros_like(executed), beyond))
            kernel.executed |= executed
            kernel.launches += part["launches"]
            kernel.cases.add(label)
        found.seconds += row["seconds"]
        found.thread_instructions += row["thread_instructions"]
    return found


def unreached(kernel: Any, found: Kernel) -> list[str]:
    """The instructions of a parsed kernel that could be reached and were not, with their lines."""
    missed = found.reachable & ~found.executed
    return [f"{x.line}: {x.text}" for x, m in zip(kernel.body.code, missed, strict=True) if m]


def _sources(found: Summary) -> dict[str, str]:
    from harness import build, host

    set_name, arch = found.name.split()
    if set_name != "cuda":
        raise SystemExit("only kernels of the CUDA library are kept as text")
    parts = build.modules(build.library(arch).ptx.read_text())
    return {name: text for part in parts for name, text in host.entries(part).items()}


def main(path: str, pattern: str = "") -> None:
    from executor import Module

    from harness.cuda_set import short

    with open(path) as lines:
        found = summary(lines)
    print(found.line())  # noqa: T201
    if not pattern:
        for name, share in sorted(found.shares().items(), key=lambda item: item[1]):
            print(f"{100 * share:5.1f} %  {short(name)}")  # noqa: T201
        return
    sources = _sources(found)
    for key, kernel in found.kernels.items():
        if re.search(pattern, short(key)):
            print(f"{short(key)}: {100 * kernel.share:.1f} %")  # noqa: T201
            for line in unreached(Module(sources[key]).kernels[key], kernel):
                print(f"  {line}")  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
