# SPDX-License-Identifier: Apache-2.0
"""`vtclip bench`: its arguments, its call of `vtclip.bench.run.run_bench` and what it prints."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from typing import Any

from vtclip.cli.fit import DEMO_NOTE
from vtclip.cli.parsing import emit, emit_json, existing, fail, number
from vtclip.names import METHODS, SHOTS, nearest


def add_arguments(bench: Any) -> None:
    bench.add_argument(
        "sources",
        metavar="SOURCE",
        nargs="*",
        action="extend",
        help="image folders, features folders, .npz files",
    )
    bench.add_argument("--data", metavar="ROOT", help="the field's data sets, in place of SOURCE")
    bench.add_argument(
        "--sets", type=some(str), metavar="LIST", help="of --data (default: those that are there)"
    )
    bench.add_argument(
        "--methods",
        type=some(method),
        metavar="LIST",
        help=f"or all; default: those that apply; of {','.join(METHODS)}",
    )
    shots, seed = number(int, 1, 1_000_000), number(int, 0, 2**32 - 1)
    bench.add_argument(
        "--shots", type=some(shots), default=list(SHOTS), metavar="LIST",
        help=f"images per class (default: {','.join(map(str, SHOTS))})",
    )  # fmt: skip
    bench.add_argument(
        "--seeds", type=some(seed), default=[1, 2, 3], metavar="LIST",
        help="each draws the shots once (default: 1,2,3)",
    )  # fmt: skip
    bench.add_argument("--out", metavar="DIR", required=True, help="rows, runs and tables")
    bench.add_argument(
        "--shard", metavar="I/N", help="this process's part (default: by torchrun, or all)"
    )
    bench.add_argument(
        "--resume", action="store_true", help="go on with --out, which is done anyway"
    )
    bench.add_argument("--spatial", metavar="OPT", help="kind of spatial features (vtclip.clip)")
    bench.add_argument("--prompt", metavar="NAME", help="one prompt of .npz files with several")
    bench.add_argument(
        "--templates", metavar="NAME|FILE", help="imagenet7, imagenet80, a .txt, or text with {}"
    )
    bench.add_argument("--test-fraction", type=number(float, 0, 1), default=0.5, metavar="F")
    bench.add_argument("--augment-passes", type=number(int, 0, 1000), default=0, metavar="N")


def some(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """A list with commas between, of values that all differ."""

    def check(value: str) -> list[Any]:
        found = [kind(part.strip()) for part in value.split(",")]
        if len(set(found)) < len(found):
            raise argparse.ArgumentTypeError(f"values must differ, got {value!r}")
        return found

    return check


def method(name: str) -> str:
    if name not in (*METHODS, "all"):
        raise argparse.ArgumentTypeError(f"unknown name {name!r}{nearest(name, METHODS)}")
    return name


def run_bench_command(args: argparse.Namespace) -> int:
    check_sources(args)
    from vtclip.bench.jobs import Settings, own_sources, parse_shard, set_sources
    from vtclip.bench.run import run_bench

    shard = parse_shard(args.shard)
    settings = Settings(
        model=args.model,
        spatial=args.spatial,
        prompt=args.prompt,
        templates=None if args.templates is None else (args.templates,),
        test_fraction=args.test_fraction,
        augment_passes=args.augment_passes,
    )
    if args.data is not None:
        sources = set_sources(args.data, args.sets, settings)
    else:
        sources = own_sources(args.sources, settings)
    if args.model == "demo" and any(source.encoder for source in sources):
        sys.stderr.write(DEMO_NOTE + "\n")
    progress = sys.stderr is not None and sys.stderr.isatty()
    with job_lines(progress):
        report = run_bench(
            sources,
            args.out,
            methods=list(METHODS) if args.methods == ["all"] else args.methods,
            shots=args.shots,
            seeds=args.seeds,
            settings=settings,
            shard=shard,
            device=args.device,
            threads=args.threads,
            cache_dir=args.cache_dir,
            progress=progress,
        )
    if args.json:
        emit_json(report.as_json())
    else:
        # of several processes the one that finds nothing left prints the tables
        if not report.left:
            emit((report.out / "table.md").read_text("utf-8"))
        emit(report.line())
        emit(f"{report.out}: table.md, table.csv, results.csv, {shard.file} and runs")
    return 1 if report.failed else 0


def check_sources(args: argparse.Namespace) -> None:
    """Sources that are there, or exit 2 naming the argument."""
    if args.methods is not None and "all" in args.methods and len(args.methods) > 1:
        fail("vtclip bench: --methods all stands alone")
    if args.data is None:
        if args.sets is not None:
            fail("vtclip bench: --sets needs --data ROOT")
        if not args.sources:
            fail("vtclip bench: SOURCE or --data ROOT must be given")
        for source in args.sources:
            existing("SOURCE", source)
        return
    if args.sources:
        fail(
            f"vtclip bench: SOURCE {args.sources[0]!a} and --data exclude each other; "
            "name data sets by --sets"
        )
    existing("--data", args.data)


def job_lines(shown: bool) -> Any:
    """One line per job above the bar on a terminal; else only what failed."""
    from contextlib import nullcontext

    if not shown:
        return nullcontext()
    from tqdm.contrib.logging import logging_redirect_tqdm

    logging.getLogger("vtclip.bench").setLevel(logging.INFO)
    return logging_redirect_tqdm()
