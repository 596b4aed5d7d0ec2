# SPDX-License-Identifier: Apache-2.0
"""What every row of `targets.py` should take on one H200, from the kernels as they are compiled.

    python benchmarks/predict.py               # prints the table, rewrites CSV
    python benchmarks/predict.py --steps WORD  # the steps of the cases with WORD in their name

CSV is results/gpu/predicted.csv. Needs Triton and its compiler, no GPU. A step is traced on meta
tensors; its matrix products take the library's rate with whole waves of tiles, its passes their
bytes (`vtclip/heads/_step_time.py`), and Triton's kernels what their instructions take
(`kernel_time.py`). Nothing here is measured: the first run on a GPU confirms or refutes it, row by
row.

ms: our call alone, whatever the target is about.
floor: the operations at 790 TFLOP/s, or the bytes of operators that are all traffic, at 4.0 TB/s.
library: the share of the time that is matrix products of cuBLAS.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"

import compiled
import kernel_time
import targets
import torch
from compiled import launching
from results import output
from step_trace import Step, Trace, stored_bytes, tracing
from table import markdown

from vtclip.heads import _step_time

CSV = Path(__file__).parent / "results" / "gpu" / "predicted.csv"
DEVICE = "H200, 132 x 1.75 GHz"
PEAK, BANDWIDTH = 790e12, 4.0e12
RATES = _step_time.rates(90, torch.bfloat16)
NOT_PREDICTED = "not predicted"
COLUMNS = (
    *("case", "mode", "what", "graph", "at_most", "predicted", "within"),
    *(
        "ms",
        "floor",
        "library",
        "launches",
        "source",
        "device",
        "torch",
        "triton",
        "commit",
        "note",
    ),
)
Sizes = dict[str, torch.Size]  # of the tensors among an operator's arguments, by name


def _attention(times: int) -> Callable[[Sizes], int]:
    def count(sizes: Sizes) -> int:
        B, H, L, d = sizes["key"]
        return times * B * H * sizes["query"][2] * L * d

    return count


def _rational(times: int) -> Callable[[Sizes], int]:
    def count(sizes: Sizes) -> int:
        B, H, K, d = sizes["key"]
        return times * B * H * K * K * d

    return count


def _product(times: int, rows: str) -> Callable[[Sizes], int]:
    return lambda sizes: times * sizes[rows].numel() * sizes["weight"][0]


# operations of an operator's products; the others are all traffic
OPERATIONS = {
    "cross_attn_fwd": _attention(4),
    "cross_attn_bwd": _attention(10),
    "cross_attn_weights_fwd": _attention(2),
    "cross_attn_weights_bwd": _attention(4),
    "rational_attn_fwd": _rational(8),
    "rational_attn_bwd": _rational(16),
    "rational_head_fwd": _product(2, "context"),
    "rational_head_bwd": _product(4, "context"),
    "ffn_cosine_logits_fwd": _product(2, "hidden"),
    "ffn_cosine_logits_bwd": _product(6, "hidden"),
}


@dataclass
class Prediction:
    """Seconds of one call by kind of step."""

    products: float = 0.0
    passes: float = 0.0
    kernels: float = 0.0
    floor: float = 0.0
    launches: int = 0
    allocated: int = 0  # bytes
    lines: list[tuple[str, float, str]] = field(default_factory=list)
    guesses: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        return self.products + self.passes + self.kernels

    @property
    def library(self) -> float:
        return self.products / self.seconds if self.seconds else 0.0


class SDPA(NamedTuple):
    """torch's fused attention of the expanded query: assumed, from published rates.

    cuDNN's forward at 400 TFLOP/s for long keys, tiles of 64 keys; never below 40 us. Backward at
    275, and 20 us for the sum of the query's gradient over images.
    """

    forward: float
    both: float


def sdpa(B: int, H: int, K: int, L: int, d: int) -> SDPA:
    padded = -(-L // 64) * 64
    operations = 4 * B * H * K * padded * d
    forward = max(40e-6, operations / (400e12 * padded / (padded + 40)))
    backward = 2.5 * operations / (275e12 * padded / (padded + 40)) + 20e-6
    return SDPA(forward, forward + max(backward, 60e-6))


def least_seconds(name: str, args: tuple[Any, ...], out: Any) -> float:
    """Of an operator of vtclip: its operations at the peak, or its tensors' bytes."""
    schema = getattr(torch.ops.vtclip, name.removeprefix("vtclip::")).default._schema
    named = zip((argument.name for argument in schema.arguments), args, strict=False)
    tensors = {name: x for name, x in named if isinstance(x, torch.Tensor)}
    count = OPERATIONS.get(name.removeprefix("vtclip::").removesuffix("_triton"), lambda _: 0)
    written = [x for x in (out if isinstance(out, tuple | list) else [out]) if x is not None]
    traffic = sum(map(stored_bytes, [*tensors.values(), *written]))
    operations = count({name: x.shape for name, x in tensors.items()})
    return max(operations / PEAK, traffic / BANDWIDTH)


def trace_of(call: Callable[[], object]) -> tuple[Trace, float]:
    """The steps of a call and the least that its products and operators could take."""
    floors: list[float] = []
    inside: list[int] = []  # steps within operators of vtclip, which have floors of their own
    current: list[Trace] = []
    with launching(lambda: current[0].steps) as launched:

        def operator(name: str, args: tuple[Any, ...]) -> Any:
            begin = len(current[0].steps)
            out = launched(name, args)
            inside.extend(range(begin, len(current[0].steps)))
            floors.append(least_seconds(name, args, out))
            return out

        with tracing(operator) as trace:
            current.append(trace)
            call()
    for at, step in enumerate(trace.steps):
        if step.product is not None and at not in set(inside):
            floors.append(2 * prod(step.product) / PEAK)
    return trace, sum(floors)


def predict(call: Callable[[], object]) -> Prediction:
    """One call, whose tensors are on the meta device."""
    trace, floor = trace_of(call)
    found = Prediction(floor=floor, launches=len(trace.steps), allocated=trace.allocated)
    for step in trace.steps:
        taken, text = step_seconds(step, found)
        found.lines.append((step.name, taken, text))
    return found


def step_seconds(step: Step, into: Prediction) -> tuple[float, str]:
    """Adds a step to a prediction; its seconds and how they came about."""
    if step.launch is not None:
        kernel, guesses = compiled.kernel(step.launch)
        into.guesses += [f"{step.name}: {guess}" for guess in guesses]
        taken = kernel_time.seconds(kernel) + _step_time.LAUNCH
        into.kernels += taken
        parts, _ = kernel_time.cycles(kernel)
        share = parts.tensor / max(1.0, sum(parts.parts))
        text = f"{kernel.blocks} blocks, {kernel.resident} at a time, {kernel.warps} warps, "
        text += f"{kernel.registers} registers, tensor cores {share:.0%}, "
        return taken, text + f"{kernel.bytes / BANDWIDTH * 1e6:.0f} us of bytes"
    taken = 0.0
    if step.product is not None:
        taken = _step_time.product_seconds(*step.product, RATES)
        into.products += taken
    if step.bytes:
        copied = _step_time.pass_seconds(step.bytes, RATES)
        into.passes += copied
        taken += copied
    sizes = "" if step.product is None else " x ".join(map(str, step.product))
    return taken, sizes or f"{step.bytes / 2**20:.0f} MiB"


# --- cases ------------------------------------------------------------------------------------


def calls(case: Any) -> dict[str, Callable[[], object]]:
    """By mode, what `test_speed.py` times; and the backward alone."""

    work = case.build("cpu", case.dtype, **case.shape)  # heads look at the values of their texts
    leaves = [leaf.detach().to("meta").requires_grad_(leaf.requires_grad) for leaf in work.leaves]
    provider, wanted = work.providers["vtclip"], [leaf for leaf in leaves if leaf.requires_grad]
    if isinstance(provider, torch.nn.Module):
        provider = provider.to("meta")
        wanted = [x for x in provider.parameters() if x.requires_grad]

    def forward() -> object:
        with torch.no_grad():
            return provider(*leaves)

    def both() -> object:
        out = provider(*leaves)
        return torch.autograd.grad(out, wanted, torch.ones_like(out))

    return {"forward": forward, "forward+backward": both}


def predictions(only: str = "") -> dict[tuple[str, str], Prediction]:
    """By case and mode."""
    import cuda_registry

    found = {}
    for case in cuda_registry.CASES:
        if only in case.name:
            for mode, call in calls(case).items():
                found[case.name, mode] = one = predict(call)
                print(
                    f"{case.name} {mode}: {one.seconds * 1e3:.4g} ms", file=sys.stderr, flush=True
                )
    return found


def value(target: Any, found: Predictions) -> tuple[float | None, str]:
    """What is predicted for one target, in its own unit, and a remark."""
    here = found[target.case, target.mode]
    if target.what == "median_ms":
        parts = {"products": here.products, "passes": here.passes, "own kernels": here.kernels}
        return here.seconds * 1e3, ", ".join(f"{k} {v * 1e3:.3f} ms" for k, v in parts.items())
    if target.what == "kernels":
        return float(here.launches), "operators of torch count as one kernel each"
    if target.what == "backward_mib":
        backward = here.allocated - found[target.case, "forward"].allocated
        return backward / 2**20, "all that the backward allocates"
    if target.what == "vtclip / best sdpa":
        sizes = {letter: int(n) for letter, n in re.findall(r"([BHKLd])(\d+)", target.case)}
        best = sdpa(**sizes)
        theirs = best.forward if target.mode == "forward" else best.both
        return here.seconds / theirs, f"sdpa assumed to take {theirs * 1e6:.0f} us"
    return None, "lengths of the C++ kernels' loops are not read"


Predictions = dict[tuple[str, str], Prediction]


def table(found: Predictions, where: dict[str, str]) -> list[dict[str, str]]:
    """One row for every target."""
    lines = []
    for target in targets.TARGETS:
        here, (number, note) = found[target.case, target.mode], value(target, found)
        line = dict.fromkeys(COLUMNS, "") | where
        line |= {"case": target.case, "mode": target.mode, "what": target.what}
        line |= {"graph": "yes" if target.graph else "no", "at_most": f"{target.at_most:g}"}
        line |= {"source": "predicted", "note": note, "predicted": NOT_PREDICTED}
        line |= {"ms": f"{here.seconds * 1e3:.4g}", "launches": str(here.launches)}
        line |= {"floor": f"{here.floor * 1e3:.3g}", "library": f"{here.library:.0%}"}
        if number is not None:
            line |= {"predicted": f"{number:.4g}"}
            line |= {"within": "yes" if number <= target.at_most else "no"}
        lines.append(line)
    return lines


def place() -> dict[str, str]:
    """Device, versions, commit."""
    commit = output("git", "-C", str(CSV.parent), "describe", "--always", "--dirty").strip()
    versions = {name: version(name) for name in ("torch", "triton")}
    return {"device": DEVICE, **versions, "commit": commit}


def write(path: Path, lines: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def show(found: Predictions) -> None:
    """Every step of every call."""
    for (case, mode), one in found.items():
        sums = f"products {one.products * 1e3:.3f}, passes {one.passes * 1e3:.3f}, "
        sums += f"kernels {one.kernels * 1e3:.3f}, floor {one.floor * 1e3:.3f} ms"
        print(f"{case} {mode}: {one.seconds * 1e3:.3f} ms in {one.launches} steps: {sums}")
        for name, seconds, text in one.lines:
            print(f"    {seconds * 1e6:8.1f} us  {name:32} {text}")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", metavar="WORD", help="show the steps of these cases")
    args = parser.parse_args(arguments)
    if args.steps is not None:
        return show(predictions(args.steps))
    found = predictions()
    lines = table(found, place())
    shown = ("case", "mode", "what", "at_most", "predicted", "within", "ms", "floor", "library")
    shown = (*shown, "note")
    print("\n".join(markdown(shown, [[line[name] for name in shown] for line in lines])))
    guesses = sorted({guess for one in found.values() for guess in one.guesses})
    print(f"\nloops whose length was guessed: {len(guesses)}")
    print("\n".join(guesses))
    write(CSV, lines)


if __name__ == "__main__":
    main(sys.argv[1:])
