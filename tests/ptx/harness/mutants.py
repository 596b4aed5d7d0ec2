# SPDX-License-Identifier: Apache-2.0
"""Damaged copies of the real kernels: how many of them the cases and the checks notice.

python -m harness.mutants [--every N] [--kernel NAME] [--all] > X.jsonl     one line per mutant

A mutant is the PTX of one kernel with one line changed: a barrier deleted, a bound off by one, a
load or store moved by one element, two registers of a matrix product swapped. Only lines that a
case executes are changed, and tried with the cases that execute them, the quickest first. Noticed
is a wrong result, a finding, or a run that cannot go on.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from harness import cases, child

WIDTHS = {"8": 1, "16": 2, "32": 4, "64": 8, "128": 16}


class Target(NamedTuple):
    """A kernel and the cases it is tried with; --all takes every case of their operator."""

    set: str
    arch: str
    kernel: str  # a pattern of exactly one kernel of a forward that the cases run
    dtype: str
    cases: tuple[str, ...]


TARGETS = (
    Target("cuda", "sm_90", r"RationalForwardIfE", "float32",
           ("rational_logits B3 K5 D37", "rational_logits B3 K5 D38", "rational_logits B3 K5 D39",
            "rational_logits B2 K70 D136")),
    Target("cuda", "sm_90", r"CosineForward.*HalfELi32E", "float16",
           ("cosine_logits B5 K39 D37", "cosine_logits B33 K40 D200 misaligned",
            "cosine_logits B5 K7 D300 transposed")),
    Target("cuda", "sm_90", r"CrossAttnForward.*HalfELi64E", "float16",
           ("cross_attn B2 H2 K19 L21 d24 masked", "cross_attn B2 H1 K67 L70 d35 query per image",
            "cross_attn B2 H1 K67 L70 d64 masked misaligned")),
    Target("cuda", "sm_90", r"\d+NormForwardIfE", "float32",
           ("norm_cosine_logits B3 K5 C37", "norm_cosine_logits B5 K7 C300 misaligned")),
)  # fmt: skip


def _barrier(line: str) -> str | None:
    return "" if re.match(r"\s*(bar|barrier)(\.warp|\.cta)?\.sync\b", line) else None


def _bound(line: str) -> str | None:
    found = re.match(r"(\s*setp\.)(ge|gt|le|lt)(\.[su](?:32|64)\b.*)", line, re.DOTALL)
    if found is None:
        return None
    other = {"ge": "gt", "gt": "ge", "le": "lt", "lt": "le"}[found[2]]
    return f"{found[1]}{other}{found[3]}"


def _moved(line: str) -> str | None:
    found = re.match(
        r"(\s*(?:@!?%\w+\s+)?(?:ld|st)\.(?!param)[\w.:]*?\.[busf](\d+)\s[^\[]*)"
        r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\d+))?\s*\](.*)",
        line, re.DOTALL,
    )  # fmt: skip
    if found is None:
        return None
    offset = int(found[4] or 0) + WIDTHS[found[2]]
    return f"{found[1]}[{found[3]}+{offset}]{found[5]}"


def _swapped(line: str) -> str | None:
    """The first two registers of the second operand, which is A."""
    found = re.match(r"(\s*mma\.sync[^{]*\{[^}]*\},\s*\{)([^,}]+),([^,}]+)(.*)", line, re.DOTALL)
    return f"{found[1]}{found[3]},{found[2]}{found[4]}" if found else None


KINDS: dict[str, Callable[[str], str | None]] = {
    "barrier deleted": _barrier,
    "bound off by one": _bound,
    "access moved": _moved,
    "mma registers swapped": _swapped,
}


def sites(text: str, lines: set[int]) -> Iterator[tuple[str, int, str]]:
    """(kind, line, changed text) of every mutant of the lines given, counted from 1."""
    rows = text.split("\n")
    for number in sorted(lines):
        for kind, change in KINDS.items():
            changed = change(rows[number - 1])
            if changed is not None:
                whole = "\n".join([*rows[: number - 1], changed, *rows[number:]])
                yield kind, number, whole


def _reached(
    backend: Any, key: str, chosen: list[cases.Case], dtype: str
) -> dict[cases.Case, set[int]]:
    """The lines of a kernel that a case executes, of those that run it, the quickest first."""
    rows: dict[cases.Case, tuple[float, set[int]]] = {}
    code = backend.recorder.kernel(key, key, backend.text(key)).body.code
    for case in chosen:
        row = child.outcome(backend, case, dtype, backward=False)
        if row["errors"] or row["findings"]:
            raise RuntimeError(f"{case.name} is not right to begin with: {row['errors']}")
        hits = [x.report.executed for x in backend.recorder.launches if x.key == key]
        if hits:
            executed = np.logical_or.reduce([np.asarray(hit, bool) for hit in hits])
            lines = {x.line for x, hit in zip(code, executed, strict=True) if hit}
            rows[case] = row["seconds"], lines
    return {case: lines for case, (_, lines) in sorted(rows.items(), key=lambda item: item[1][0])}


def _noticed(backend: Any, chosen: list[cases.Case], dtype: str) -> tuple[str, str]:
    """By what the first of the cases notices and that case, or nothing.

    Backwards, which read what a forward keeps for them, run where no forward alone notices.
    """
    for backward in (False, True):
        for case in chosen:
            row = child.outcome(backend, case, dtype, backward)
            if row["findings"]:
                return str(row["findings"][0]["kind"]), case.name
            if row["errors"]:
                wrong = str(row["errors"][0])
                return ("result" if "error" in wrong else wrong[:200]), case.name
    return "", ""


def tried(
    target: Target, every: int, everything: bool, counted: dict[str, int]
) -> Iterator[dict[str, Any]]:
    """One of `every` mutants of each kind; of barriers, which are few, twenty times as many."""
    backend = child.opened(target.set, target.arch)
    keys = [key for key in backend.kernels() if re.search(target.kernel, key)]
    if len(keys) != 1:
        raise SystemExit(f"{target.kernel!r} names {len(keys)} kernels, wanted one")
    (key,) = keys
    chosen = [case for case in cases.CASES if case.name in target.cases]
    if len(chosen) != len(target.cases):
        raise SystemExit(f"{target.kernel}: a case of its list does not exist")
    if everything:
        chosen = [case for case in cases.CASES if case.op == chosen[0].op]
    text = backend.text(key)
    reached = _reached(backend, key, chosen, target.dtype)
    for kind, line, changed in sites(text, set().union(*reached.values())):
        counted[kind] += 1
        if counted[kind] % (max(1, every // 20) if kind == "barrier deleted" else every):
            continue
        executing = [case for case, lines in reached.items() if line in lines]
        backend.recorder.edit = lambda name, old, new=changed: new if name == key else old
        started = time.process_time()
        by, where = _noticed(backend, executing, target.dtype)
        backend.recorder.edit = None
        yield {
            "kernel": key,
            "kind": kind,
            "line": line,
            "text": text.split("\n")[line - 1].strip(),
            "noticed": by,
            "case": where,
            "cases": len(executing),
            "seconds": round(time.process_time() - started, 1),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="try one of so many")
    parser.add_argument("--kernel", default="", help="part of a target's pattern")
    parser.add_argument("--all", action="store_true", help="with every case of the operator")
    arguments = parser.parse_args()
    if "standin" not in os.environ.get("LD_PRELOAD", ""):
        sys.exit(child.start(sys.argv[1:], module="harness.mutants").wait())
    counted = dict.fromkeys(KINDS, 0)  # over all targets, so that small ones are sampled too
    for target in TARGETS:
        if arguments.kernel in target.kernel:
            for row in tried(target, arguments.every, arguments.all, counted):
                sys.stdout.write(json.dumps(row) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
