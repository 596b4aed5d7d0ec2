# SPDX-License-Identifier: Apache-2.0
"""`vtclip bench`: its arguments, its call of `vtclip.bench.run.run_bench` and what it prints."""

from __future__ import annotations

import argparse
import logging
from contextlib import AbstractContextManager, nullcontext

from vtclip.cli.parsing import (
    FEATURES,
    Parser,
    a_method,
    count,
    demo_model_noted,
    emit,
    emit_headline,
    emit_json,
    emit_table,
    existing,
    on_terminal,
    options_of,
    others_line,
    seed,
    several,
)
from vtclip.names import METHODS, SHOTS


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "sources",
        metavar="SOURCE",
        nargs="*",
        action="extend",
        help="image folders, lists of files, features folders, .npz files",
    )
    parser.add_argument("--data", metavar="ROOT", help="the field's data sets, in place of SOURCE")
    parser.add_argument(
        "--sets",
        type=several(str),
        metavar="LIST",
        help="of --data (default: those that are there)",
    )
    parser.add_argument(
        "--methods",
        type=several(a_method("all")),
        metavar="LIST",
        help=f"or all; default: those that apply; of {','.join(METHODS)}",
    )
    parser.add_argument(
        "--shots", type=several(count), default=list(SHOTS), metavar="LIST",
        help=f"images per class (default: {','.join(map(str, SHOTS))})",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=several(seed), default=[1, 2, 3], metavar="LIST",
        help="each draws the shots once (default: 1,2,3)",
    )  # fmt: skip
    parser.more_help = others_line
    parser.add_argument("--out", metavar="DIR", required=True, help="rows, runs and tables")
    parser.add_argument(
        "--shard", metavar="I/N", help="this process's part (default: by torchrun, or all)"
    )
    parser.add_argument("--resume", action="store_true", help="continue in --out (the default)")
    parser.add_shared("--follow-links")
    parser.add_shared(*FEATURES, "--model", "--cache-dir", "--device", "--threads", "--json")


def run(args: argparse.Namespace) -> int:
    check_sources(args)
    from vtclip.bench.jobs import Settings, every_method, parse_shard, path_sources, set_sources
    from vtclip.bench.run import run_bench

    shard = parse_shard(args.shard)
    settings = Settings(
        templates=None if args.templates is None else (args.templates,),
        **options_of(
            args,
            *("model", "spatial", "prompt", "test_fraction", "augment_passes", "follow_links"),
        ),
    )
    if args.data is not None:
        sources = set_sources(args.data, args.sets, settings)
    else:
        sources = path_sources(args.sources, settings)
    encodes = args.model == "demo" and any(source.encoder for source in sources)
    progress = on_terminal()
    with job_lines(progress), demo_model_noted(encodes):
        report = run_bench(
            sources,
            args.out,
            methods=every_method() if args.methods == ["all"] else args.methods,
            settings=settings,
            shard=shard,
            progress=progress,
            **options_of(args, "shots", "seeds", "device", "threads", "cache_dir"),
        )
    if args.json:
        emit_json("bench", report.as_json())
    else:
        emit_headline(report.line())
        # of several processes the one that finds nothing left prints the tables
        if not report.left:
            emit_table((report.out / "table.md").read_text("utf-8"))
        emit(f"{report.out}: table.md, table.csv, results.csv, {shard.file} and runs")
    return 1 if report.failed else 0


def check_sources(args: argparse.Namespace) -> None:
    """Sources that are there, or a ValueError that names the argument."""
    if args.methods is not None and "all" in args.methods and len(args.methods) > 1:
        raise ValueError("--methods all stands alone")
    if args.data is None:
        if args.sets is not None:
            raise ValueError("--sets needs --data ROOT")
        if not args.sources:
            raise ValueError("SOURCE or --data ROOT must be given")
        for source in args.sources:
            existing("SOURCE", source)
        return
    if args.sources:
        raise ValueError(
            f"SOURCE {args.sources[0]!a} and --data exclude each other; name data sets by --sets"
        )
    existing("--data", args.data)


def job_lines(shown: bool) -> AbstractContextManager[None]:
    """On a terminal a line per job above the bar, elsewhere only what failed."""
    if not shown:
        return nullcontext()
    from tqdm.contrib.logging import logging_redirect_tqdm

    logging.getLogger("vtclip.bench").setLevel(logging.INFO)
    redirected: AbstractContextManager[None] = logging_redirect_tqdm()
    return redirected
