# SPDX-License-Identifier: Apache-2.0
"""What Triton makes of a kernel, counted in its intermediate code and its PTX.

    rows = generated("sm_90", "float16", [launch("cross_attn", K=1000, L=196, d=128, B=32, H=8)])
    one = only(rows, "cross_attn_fwd_kernel")
    assert one["loops"][0]["narrow loads"] == 0

Launchers run in a process of their own (_compile.py), since the interpreter of the other tests is
chosen when Triton is imported. A row is one launch: kernel, grid, options, constants, registers,
spilled, shared, and what `counts` adds. "loops" are the innermost loops in the order of the code.
"""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

HELPERS = Path(__file__).parent
ROOT = HELPERS.parents[1]
SCRIPT = ROOT / "tests" / "kernels" / "_compile.py"

# of one multiprocessor: threads and bytes of shared memory; each has 65536 registers and 32 blocks
MULTIPROCESSOR = {
    "sm_80": (2048, 164 * 1024),
    "sm_90": (2048, 228 * 1024),
    "sm_100": (2048, 228 * 1024),
}
# one instruction each, whether predicated or not
INSTRUCTIONS = {
    "exp2": r"ex2\.approx",
    "divisions": r"div\.(?:full|rn|approx)|rcp\.rn",
    "float64": r"[\w.]+\.f64\b",
    "global loads": r"ld\.global|cp\.async\.c[ag]\.",
    "shared stores": r"st\.shared|stmatrix",
    "shared loads": r"ld\.shared|ldmatrix",
    "barriers": r"bar\.sync|barrier\.sync",
    "dots": r"(?:wgmma\.mma_async|mma\.sync|tcgen05\.mma)",
}
_START = r"(?:^|[;{}\s])(?:@!?%p\d+\s+)?"
# of less than 4 bytes a thread; a mask has one byte an element, and loads it as .b8 or .u8
_NARROW = re.compile(_START + r"ld\.global(?:\.\w+)*\.[bu]16\s")


def launch(op, variant="", **sizes):
    """A launch of an operator's forward and backward on `sizes` by the letters of `OPS`.

    Heads lie in memory as projections leave them.
    "column_sums" is the launcher of that name on B, K and D.
    """
    return [op, sizes, variant]


def generated(target, dtype, launches, precision="tf32", package="vtclip.kernels", path=ROOT):
    """The rows of every kernel that `launches` compile, of `package` found under `path`."""
    text = json.dumps(launches)
    return compiled(package, target, dtype, precision, ("-",), path, text)


def compiled(package, target, dtype, precision, widths, path=ROOT, text=""):
    """What _compile.py prints for these arguments and `text` as its input, as rows."""
    command = [sys.executable, str(SCRIPT), package, target, dtype, precision, *map(str, widths)]
    folders = os.pathsep.join((str(path), str(HELPERS)))
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": folders}
    result = subprocess.run(
        command, env=environment, input=text, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-4000:]
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert rows
    return rows


def named(rows, *kernels):
    """The rows of `kernels`; each must be there."""
    missing = set(kernels) - {row["kernel"] for row in rows}
    assert not missing, missing
    return [row for row in rows if row["kernel"] in kernels]


def only(rows, kernel):
    """The one row of `kernel`."""
    (row,) = named(rows, kernel)
    return row


def counts(ttir, ptx, target, num_warps, registers, shared):
    """What a row tells of its code besides registers, spills and shared memory."""
    whole = counted(ptx)
    return {
        "threads": 32 * num_warps,
        "blocks": blocks(target, num_warps, registers, shared),
        # 64-bit numbers in the intermediate code: constants alone are enough to widen a kernel
        "float64": len(re.findall(r"\bf64\b", ttir)),
        "chained": chained_dots(ttir),
        "unequal lanes": unequal_lanes(ptx),
        "whole": whole,
        "loops": [counted(body) for body in innermost_loops(ptx)],
    }


def counted(ptx):
    """Instructions of a piece of PTX by kind."""
    found = {
        name: len(re.findall(_START + f"(?:{pattern})", ptx, flags=re.M))
        for name, pattern in INSTRUCTIONS.items()
    }
    found["narrow loads"] = len(_NARROW.findall(ptx))
    found["all"] = len(re.findall(r";\s*(?://.*)?$", ptx, flags=re.M))
    return found


def innermost_loops(ptx):
    """Bodies of the loops that hold no other, in order: from a label to a branch back to it."""
    lines = [line.split("//")[0].strip() for line in ptx.splitlines()]
    labels = {line[:-1]: i for i, line in enumerate(lines) if re.fullmatch(r"\$\w+:", line)}
    spans = {}
    for i, line in enumerate(lines):
        branch = re.search(r"\bbra(?:\.uni)?\s+(\$\w+)", line)
        if branch and labels.get(branch.group(1), i) < i:
            spans[labels[branch.group(1)]] = i  # the last branch back closes the loop
    inner = [
        (start, end)
        for start, end in sorted(spans.items())
        if not any(start < other < end for other in spans)
    ]
    return ["\n".join(lines[start:end]) for start, end in inner]


def blocks(target, num_warps, registers, shared):
    """How many blocks a multiprocessor holds: by threads, registers and shared memory."""
    threads, memory = MULTIPROCESSOR[target]
    of_a_warp = 32 * math.ceil(max(1, registers) / 8) * 8
    by_registers = 65536 // (of_a_warp * num_warps)
    return min(32, threads // (32 * num_warps), by_registers, memory // (shared + 1024))


def chained_dots(ttir):
    """Whether an operand of a dot comes from the result of another."""
    defined, dots = {}, []
    for line in ttir.splitlines():
        found = re.match(r"\s*(%[\w#]+)(?::\d+)? = (.*)", line)
        if found:
            defined[found.group(1)] = found.group(2)
            if found.group(2).startswith("tt.dot "):
                dots.append(found.group(1))

    def reaches(name, seen):
        body = defined.get(name.split("#")[0], "")
        if name in seen or not body or body.startswith(("tt.load", "scf.for")):
            return False
        seen.add(name)
        return body.startswith("tt.dot ") or any(
            reaches(operand, seen) for operand in re.findall(r"%[\w#]+", body.split(" loc(")[0])
        )

    return any(
        reaches(operand, {name})
        for name in dots
        for operand in re.findall(r"%[\w#]+", defined[name])[:2]
    )


def unequal_lanes(ptx):
    """Sums over lanes whose last product was contracted with the first exchange.

    fma(a_i, b_i, round(a_j b_j)) in one lane and fma(a_j, b_j, round(a_i b_i)) in its partner
    differ in the last bit, and then both are stored to one word.
    """
    found = []
    exchanged = set()
    for line in ptx.splitlines():
        shuffle = re.search(r"shfl\.sync\.bfly\.b32\s+(%\w+)", line)
        if shuffle:
            exchanged.add(shuffle.group(1))
            continue
        moved = re.search(r"mov\.b32\s+(%\w+), (%\w+);", line)
        if moved and moved.group(2) in exchanged:
            exchanged.add(moved.group(1))
        product = re.search(r"fma\.rn(?:\.ftz)?\.f32\s+%\w+, %\w+, %\w+, (%\w+);", line)
        if product and product.group(1) in exchanged:
            found.append(line.strip())
    return found
