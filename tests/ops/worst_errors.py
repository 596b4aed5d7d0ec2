# SPDX-License-Identifier: Apache-2.0
"""Looks for the inputs on which an implementation errs most, in multiples of the error budget.

    python tests/ops/worst_errors.py --path scalar --draws 20 --over 1

Not a test: it prints the worst case of every operator, dtype
and kind of input, with and without the room that the operator's tests leave for terms that cancel.
`--path` names the instruction set of the CPU kernels; without it the machine's best.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "ops"), str(TESTS / "helpers"), str(TESTS.parent)]

import torch  # noqa: E402
from floors import floor_of  # noqa: E402
from op_budget import Floor, run, wide  # noqa: E402
from torch import Tensor  # noqa: E402

from vtclip import testing  # noqa: E402
from vtclip.testing.problems import FUNCTIONS, Function, normal  # noqa: E402

DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float32, torch.float16, torch.bfloat16)}
SIZES = (
    {"B": 2, "H": 2, "K": 5, "L": 9, "d": 8, "D": 8, "C": 8, "F": 6},
    {"B": 3, "H": 1, "K": 20, "L": 49, "d": 32, "D": 64, "C": 64, "F": 48},
    {"B": 1, "H": 1, "K": 160, "L": 300, "d": 16, "D": 130, "C": 130, "F": 40},
    {"B": 1, "H": 1, "K": 2, "L": 2, "d": 4, "D": 2, "C": 2, "F": 3},
)
SCALES = (1e-3, 1.0, 7.0, 30.0, 100.0, 1e3)
NOTHING = 1e-30  # an error that no float32 number but those next to 0 can show
Inputs = dict[str, Tensor]


def _draw(call: Function, sizes: dict[str, int], seed: int) -> Inputs:
    make = normal(seed=seed)
    names = [*call.op.differentiable[: len(call.tensors)]]
    if call.name == "rational_attn_packed":
        names = ["image_query", "text_query", "pairs"]
    shapes = (
        tuple(int(s) if s.isdigit() else sizes[s] for s in axes.split()) for axes in call.tensors
    )
    return {n: make(shape, torch.float32) for n, shape in zip(names, shapes, strict=True)}


def kinds(inputs: Inputs) -> Iterator[tuple[str, Inputs]]:
    """The inputs as drawn, and with a structure under which something cancels or leaves a range."""
    yield "random", inputs
    for size in (1e-3, 30.0):
        yield f"all x {size:g}", {name: size * x for name, x in inputs.items()}
    for name in inputs:
        for size in (1e-6, 1e3):
            yield f"{name} x {size:g}", inputs | {name: size * inputs[name]}
        if inputs[name].dim() > 1:
            rows = inputs[name].clone()
            rows[..., 1:, :] = rows[..., :1, :] + 1e-4 * rows[..., 1:, :]
            yield f"{name} near ties", inputs | {name: rows}
        yield f"{name} whole numbers", inputs | {name: (3 * inputs[name]).round()}
    if "query" in inputs:
        rows = min(inputs["query"].shape[-2], inputs["key"].shape[-2])
        query = inputs["query"].clone()
        query[..., :rows, :] = 4 * inputs["key"][:1, :, :rows]
        yield "query along key", inputs | {"query": query}
    if "text" in inputs and "image" in inputs and inputs["text"].dim() == 2:
        text = inputs["text"] * 1e-4 + inputs["image"][:1]
        yield "text along image", inputs | {"text": text}
    if "hidden" in inputs:
        yield "hidden + 1000", inputs | {"hidden": inputs["hidden"] + 1000}


def scored(
    op: Callable[..., object],
    inputs: Inputs,
    impl: str,
    floor: Floor | None,
    fixed: dict[str, object],
) -> Iterator[tuple[str, float, float]]:
    """(name, error in budgets, the same with the floor) of every output and gradient."""
    dtype = next(iter(inputs.values())).dtype
    peer = run(op, inputs, fixed, "reference", None)
    exact = wide(inputs)
    oracle = run(op, exact, fixed, "reference", peer.seeds)
    actual = run(op, inputs, fixed, impl, peer.seeds)
    room = floor(exact, peer.seeds, fixed) if floor else {}
    found = [
        (f"output {i}", 2.0, *t)
        for i, t in enumerate(zip(actual.outputs, oracle.outputs, peer.outputs, strict=True))
    ]
    found += [(n, 3.0, actual.grads[n], oracle.grads[n], peer.grads[n]) for n in actual.grads]
    for name, factor, a, o, p in found:
        good = o.isfinite() & p.isfinite() & (o.abs() <= torch.finfo(dtype).max)
        if not good.any():
            continue
        error = float((a.double() - o)[good].abs().amax())
        if not a[good].isfinite().all():
            error = float("inf")
        if error < NOTHING:
            continue
        allowed = testing.budget(torch.where(good, o, torch.nan), p, factor)
        step = torch.finfo(dtype).eps * room.get(name, 0.0)
        yield name, error / max(allowed, 1e-45), error / max(allowed + step, 1e-45)


def fixed_arguments(call: Function) -> Iterator[dict[str, object]]:
    scales = SCALES if "H" in call.op.sizes else (1.0, 100.0)
    for scale in scales:
        fixed: dict[str, object] = dict(call.keywords) | {"scale": scale}
        yield fixed


def search(call: Function, dtype: torch.dtype, impl: str, draws: int) -> dict[str, tuple]:
    """kind, scale and result -> (worst ratio without room, with it, sizes, seed)."""
    from vtclip import ops

    worst: dict[str, tuple] = {}
    floor = floor_of(call)
    op = getattr(ops, call.name)
    for seed in range(draws):
        for number, sizes in enumerate(SIZES):
            for kind, inputs in kinds(_draw(call, sizes, seed)):
                given = {name: tensor.to(dtype) for name, tensor in inputs.items()}
                if not all(tensor.isfinite().all() for tensor in given.values()):
                    continue
                for fixed in fixed_arguments(call):
                    torch.manual_seed(seed)
                    for name, plain, roomy in scored(op, given, impl, floor, fixed):
                        key = f"{kind:28} scale {fixed['scale']:<7g} {name}"
                        if plain > worst.get(key, (0.0, 0.0))[1]:
                            worst[key] = (roomy, plain, number, seed)
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--path", choices=["scalar", "avx2", "avx512", "avx512_bf16"])
    parser.add_argument("--impl", default="cpu")
    parser.add_argument("--op", choices=FUNCTIONS, action="append")
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--over", type=float, default=1.0)
    parser.add_argument("--lines", type=int, default=8)
    parser.add_argument("--strict", action="store_true", help="leave no room")
    args = parser.parse_args()
    if args.path:
        os.environ["VTCLIP_CPU_CAPABILITY"] = args.path
    for name in args.op or FUNCTIONS:
        for dtype in args.dtype or DTYPES:
            worst = search(FUNCTIONS[name], DTYPES[dtype], args.impl, args.draws)
            rank = 1 if args.strict else 0
            over = [(v, k) for k, v in worst.items() if v[rank] > args.over]
            over.sort(key=lambda entry: entry[0][rank], reverse=True)
            sys.stdout.write(f"{name} {dtype}: {len(over)} of {len(worst)} over {args.over:g}\n")
            sys.stdout.flush()
            for (roomy, plain, number, seed), key in over[: args.lines]:
                where = f"{key} sizes {number} seed {seed}"
                sys.stdout.write(f"  {roomy:10.3g} (no room {plain:10.3g}) {where}\n")


if __name__ == "__main__":
    main()
