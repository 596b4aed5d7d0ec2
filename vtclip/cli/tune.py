# SPDX-License-Identifier: Apache-2.0
"""`vtclip tune`: time the Triton kernels' tiles on this GPU, and keep a table of the faster."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import re
from pathlib import Path
from typing import Any

from vtclip.cli.bars import Bar
from vtclip.cli.parsing import Parser, emit, emit_json, note, one_of, several
from vtclip.names import TUNED_METHODS

DTYPES = ("bfloat16", "float16", "float32")


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--out", metavar="FILE", help="default: tuned.json in the cache folder")
    parser.add_argument(
        "--shape",
        metavar="SIZES",
        help="vtclip:B=32,K=1000,C=1024,L=49,H=8 or rada:B=32,K=50,D=512,H=8; default: a list",
    )
    parser.add_argument(
        "--method", type=one_of(*TUNED_METHODS), help="only its shapes of the list; default: both"
    )
    parser.add_argument(
        "--dtype",
        type=several(one_of(*DTYPES)),
        default=["bfloat16"],
        metavar="LIST",
        help=f"of {', '.join(DTYPES)}; default: bfloat16",
    )
    parser.add_argument("--device", help="cuda or cuda:N; default: the first GPU")
    parser.add_shared("--json")


def parse_shape(text: str) -> tuple[str, dict[str, int]]:
    """ "rada:B=32,K=50,D=512,H=8" as a method and its sizes."""
    method, colon, rest = text.partition(":")
    if not colon or method not in TUNED_METHODS:
        raise ValueError(f"--shape must begin with vtclip: or rada:, got {text!a}")
    from vtclip.tune.jobs import NAMES

    names = NAMES[method]
    sizes: dict[str, int] = {}
    for part in rest.split(","):
        match = re.fullmatch(r"([A-Z])=([0-9]{1,7})", part)
        if match is None or match[1] not in names or match[1] in sizes or int(match[2]) < 1:
            wish = ",".join(f"{name}=N" for name in names)
            raise ValueError(f"--shape must be {method}:{wish}, got {text!a}")
        sizes[match[1]] = int(match[2])
    missing = [name for name in names if name not in sizes]
    if missing:
        raise ValueError(f"--shape must give {missing[0]}, got {text!a}")
    width = "C" if method == "vtclip" else "D"
    if sizes[width] % sizes["H"]:
        fact = f"{width}={sizes[width]} and H={sizes['H']}"
        raise ValueError(f"--shape must have H that divides {width}, got {fact}")
    return method, {name: sizes[name] for name in names}


def run(args: argparse.Namespace) -> int:
    """0 with the table written; 2 where there is no CUDA device to time on."""
    if args.shape is not None and args.method is not None:
        raise ValueError("--shape names its method, --method is for the list")
    shape = None if args.shape is None else parse_shape(args.shape)
    import torch

    from vtclip.backends import triton
    from vtclip.tune import table as tuned
    from vtclip.tune.jobs import jobs
    from vtclip.tune.search import tune

    device = torch.device(cuda_device(args.device))
    missing = triton.load()
    if missing:
        raise ValueError(missing)
    if triton.interpreted():
        raise ValueError("TRITON_INTERPRET=1 runs no kernel on the GPU; unset it")
    path = tuned.default_place() if args.out is None else Path(args.out).expanduser()
    if path.exists():
        tuned.read(path)  # refused now, not after an hour
    shapes = listed_shapes(args.method) if shape is None else [shape]
    tiles: dict[str, Any] = {}
    with (
        torch.cuda.device(device),
        torch.no_grad(),
        contextlib.closing(Bar("shapes", "shape")) as bar,
    ):
        name, capability = triton.gpu_identity()
        cases = list(itertools.product(args.dtype, shapes))
        for number, (dtype, (method, sizes)) in enumerate(cases):
            bar.reach(number, len(cases))
            work = jobs(method, sizes, getattr(torch, dtype), str(device))
            tiles |= tune(work, report=note)
            # a table of what is known so far: an interrupted run keeps it
            entries = {key: timed.tile for key, timed in tiles.items()}
            tuned.write(path, name, capability, entries)
    if args.json:
        times = {key: {"ms": timed.after, "built_in_ms": timed.before}
                 for key, timed in tiles.items()}  # fmt: skip
        facts = {"file": str(path), "device": name, "capability": capability}
        emit_json("tune", {**facts, "tiles": times})
    else:
        emit(f"{path}: {len(tiles)} tiles faster than the built-in ones on {name}")
        emit(f"VTCLIP_TUNED={'1' if args.out is None else path} makes vtclip use them")
    return 0


def listed_shapes(method: str | None) -> list[tuple[str, dict[str, int]]]:
    """The shapes of the list, with their methods: all, or those of `method`."""
    from vtclip.tune.jobs import SHAPES

    methods = TUNED_METHODS if method is None else (method,)
    return [(method, sizes) for method in methods for sizes in SHAPES[method]]


def cuda_device(named: str | None) -> str:
    """A CUDA device that is there, or a ValueError."""
    import torch

    if not torch.cuda.is_available():
        raise ValueError("needs a CUDA device to time on, torch finds none")
    if named is None:
        return "cuda:0"
    match = re.fullmatch(r"cuda(?::([0-9]+))?", named)
    if match is None or int(match[1] or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(f"--device must be cuda or cuda:N, N below {count}, got {named!a}")
    return f"cuda:{match[1] or 0}"
