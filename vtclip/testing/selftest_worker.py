# SPDX-License-Identifier: Apache-2.0
"""The child process of `vtclip selftest`: works through (op, implementation, dtype) one by one.

    python -m vtclip.testing.selftest_worker WORK.json LINES

WORK.json holds {"device", "items": [[op, impl, dtype], ...]}. LINES gets a JSON line when an item
is begun and one when it is done, so that the parent knows which one a crash or a hang belongs to.
Where a kernel has left the device unusable, the process ends with `DEVICE_LOST` behind that item.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vtclip import testing
from vtclip.backends import record
from vtclip.ops._select import BACKENDS, Problem
from vtclip.testing.problems import FUNCTIONS, Function

DEVICE_LOST = 9
FEW = 64  # numbers of an output, such as one penalty per image
THREADS = 2  # of the CPU kernels, which split their work; everything else is tiny and takes one
# several tiles in every dimension and none of them full; then the widths that real features have
SIZES = {
    "odd": {"B": 5, "K": 70, "L": 131, "H": 2, "d": 72, "C": 200, "D": 200, "F": 24},
    "even": {"B": 4, "K": 128, "L": 64, "H": 2, "d": 64, "C": 256, "D": 256, "F": 64},
}
TINY = {"B": 2, "K": 5, "L": 7, "H": 1, "d": 8, "C": 16, "D": 16, "F": 4}  # Triton's interpreter


class Case(NamedTuple):
    """One call: a public function, a variant of its inputs, sizes."""

    name: str
    function: Function
    sizes: dict[str, int]


class Part(NamedTuple):
    """An output or a gradient of a case: its error against float64 and the one it is allowed."""

    name: str
    error: float
    budget: float
    wrong: str  # empty where it is within its budget

    @property
    def share(self) -> float:
        """Of the budget, that the error takes."""
        return self.error / self.budget if self.budget else float("inf" if self.error else 0.0)


def cases(op: str, interpreted: bool = False) -> Iterator[Case]:
    """Every call of an operator: its public functions, their variants, all sizes."""
    for size, sizes in {"tiny": TINY}.items() if interpreted else SIZES.items():
        for name, usual in FUNCTIONS.items():
            if usual.op.name != op:
                continue
            for variant, function in (("", usual), *usual.variants()):
                words = ", ".join(filter(None, (name, variant, size)))
                yield Case(words, function, sizes)


def step(function: Function, leaves: list[Tensor], impl: str) -> list[Tensor]:
    """All outputs, then the leaves' gradients for output gradients that differ from row to row."""
    outputs = function.outputs(*leaves, impl=impl)
    seeds = [_seed(out) for out in outputs]
    kept = [(out, seed) for out, seed in zip(outputs, seeds, strict=True) if out.requires_grad]
    grads = torch.autograd.grad([out for out, _ in kept], leaves, [seed for _, seed in kept])
    return [*(out.detach() for out in outputs), *grads]


def _seed(out: Tensor) -> Tensor:
    numbers = torch.arange(out.numel(), device=out.device)
    return torch.cos(3.0 * numbers).view(out.shape).to(out.dtype)


def parts(
    found: list[Tensor], oracle: list[Tensor], peer: list[Tensor], leaves: list[Tensor], name: str
) -> Iterator[Part]:
    """What `step` returned, held against float64 and the reference in the same dtype.

    Of few numbers the reference may be exact by luck: one rounding step of the inputs' dtype more.
    """
    count = len(found) - len(leaves)
    for i, (actual, want, other) in enumerate(zip(found, oracle, peer, strict=True)):
        factor = testing.FORWARD_FACTOR if i < count else testing.GRADIENT_FACTOR
        part = f"{name}: " + (f"output {i}" if i < count else f"gradient {i - count}")
        floor, wrong = 0.0, ""
        if 0 < want.numel() < FEW:
            floor = torch.finfo(leaves[0].dtype).eps * float(want.abs().amax().nan_to_num())
        try:
            testing.assert_within_budget(actual, want, other, factor=factor, name=part, floor=floor)
        except AssertionError as error:
            wrong = str(error)
        distance = float("inf")
        if actual.shape == want.shape:
            distance = float((actual.double() - want).nan_to_num(torch.inf).abs().amax())
        yield Part(part, distance, testing.budget(want, other, factor) + floor, wrong)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Within it torch has that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


def moved(leaves: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The same numbers as leaves on the CPU."""
    return [leaf.detach().to("cpu", dtype).requires_grad_() for leaf in leaves]


def compared(case: Case, impl: str, dtype: torch.dtype, device: str) -> Iterator[Part]:
    """Outputs and gradients against the reference: in float64 on the CPU, and its own error.

    Its own is that in the same dtype on the same device; of the reference itself, on the CPU.
    """
    function = case.function
    leaves = function.draw(case.sizes, dtype=dtype, device=device)
    with threads(THREADS if impl == "cpu" else 1):
        found = [tensor.cpu() for tensor in step(function, leaves, impl)]
    oracle = step(function, moved(leaves, torch.float64), "reference")
    home = moved(leaves, dtype) if impl == "reference" else leaves
    peer = [tensor.cpu() for tensor in step(function, home, "reference")]
    yield from parts(found, oracle, peer, leaves, case.name)


def unavailable(op: str, impl: str, dtype: torch.dtype, device: str) -> str:
    """Why an implementation cannot run here at all; the record of earlier runs is not asked."""
    (backend,) = (backend for backend in BACKENDS if backend.name == impl)
    problem = Problem(op, torch.device(device).type, dtype, SIZES["even"]["d"])
    return "; ".join(backend.why_not(problem))


def tested(op: str, impl: str, dtype_name: str, device: str) -> dict[str, Any]:
    """The row of one item."""
    row: dict[str, Any] = {"op": op, "impl": impl, "dtype": dtype_name, "reason": ""}
    dtype = getattr(torch, dtype_name)
    refused = unavailable(op, impl, dtype, device)
    if refused:
        return {**row, "status": record.UNAVAILABLE, "reason": refused}
    interpreted = impl == "triton" and device == "cpu"
    found, count = list[Part](), 0
    for case in cases(op, interpreted):
        found += compared(case, impl, dtype, device)
        count += 1
    for direction, chosen in {
        "forward": [part for part in found if ": output" in part.name],
        "backward": [part for part in found if ": gradient" in part.name],
    }.items():
        worst = max(chosen, key=lambda part: (bool(part.wrong), part.share))
        row[direction] = {"part": worst.name, "error": worst.error, "budget": worst.budget}
    wrong = [part for part in found if part.wrong]
    reason = ""
    if wrong:
        worst = max(wrong, key=lambda part: part.share)
        more = f", and {len(wrong) - 1} more of {len(found)} results" if len(wrong) > 1 else ""
        reason = worst.wrong + more
    status = record.WRONG if wrong else record.RIGHT
    return {**row, "status": status, "reason": reason, "cases": count}


def device_works(device: str) -> bool:
    """Whether a fault of a kernel has left the device usable in this process."""
    if not device.startswith("cuda"):
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def main(arguments: list[str]) -> int:
    """Works through the items; 0, or `DEVICE_LOST` where the rest needs a fresh process."""
    work = json.loads(Path(arguments[0]).read_text())
    device = work["device"]
    torch.set_num_threads(1)
    with open(arguments[1], "a", buffering=1) as lines, record.ignored():
        for op, impl, dtype in work["items"]:
            row = {"op": op, "impl": impl, "dtype": dtype}
            lines.write(json.dumps({**row, "status": "begun"}) + "\n")
            try:
                row = tested(op, impl, dtype, device)
            except Exception as error:
                told = str(error).strip().splitlines() or ["no message"]
                reason = f"{type(error).__name__}: {told[0]}"[:300]
                row = {**row, "status": record.FAILED, "reason": reason}
            lines.write(json.dumps(row) + "\n")
            if row["status"] == record.FAILED and not device_works(device):
                return DEVICE_LOST
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
