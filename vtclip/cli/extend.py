# SPDX-License-Identifier: Apache-2.0
"""`vtclip extend`: its arguments, its call of `vtclip.extend` and what it prints."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from vtclip.cli.parsing import emit, emit_json, existing, number


def add_arguments(extend: Any) -> None:
    extend.add_argument("folder", metavar="RUN")
    extend.add_argument(
        "source", metavar="FOLDER", help="images of one new class, or a folder of class folders"
    )
    extend.add_argument("--out", metavar="RUN2", required=True)
    extend.add_argument("--name", help="the one new class, where it is not called like its folder")
    extend.add_argument(
        "--shots",
        type=number(int, 1, 1_000_000),
        metavar="N",
        help="images per new class, for methods that keep images (default: as the run)",
    )


def run_extend(args: argparse.Namespace) -> int:
    folder, source = existing("RUN", args.folder), existing("FOLDER", args.source)
    from vtclip.extend_run import extend

    run = extend(
        folder,
        source,
        out=args.out,
        name=args.name,
        shots=args.shots,
        model=args.model,
        device=args.device,
        threads=args.threads,
        cache_dir=args.cache_dir,
        progress=sys.stderr is not None and sys.stderr.isatty(),
    )
    if args.json:
        emit_json(run.result)
    else:
        emit(summary(run.result))
        emit(f"run in {run.folder}: {', '.join(sorted(p.name for p in run.folder.iterdir()))}")
    return 0


def summary(result: Any) -> str:
    """Accuracy before and after, zero-shot beside adapted."""
    added, method = result["sources"][-1], result["method"]
    K, names = len(result["classes"]), added["classes"]
    old = K - len(names)
    shots = f"{added['shots']} images of each" if added["learns"] else "no images of them"
    rows = {
        f"{old} old classes, before": result["before"],
        f"{old} old classes among {K}": result["old_classes"],
        f"{len(names)} new among {K}": result["new_classes"],
        f"all {K}": {key: result[key] for key in ("zero_shot", "adapted")},
    }
    width = max(map(len, rows))
    lines = [
        f"{method} on {result['source']}, with {', '.join(names[:4])}"
        f"{', ...' if len(names) > 4 else ''}: {shots} kept",
        f"{'accuracy':<{width}} {'images':>7} {'zero-shot':>10} {method:>14}",
    ]
    for name, row in rows.items():
        shares = [f"{100 * row[key]['accuracy']:.2f} %" for key in ("zero_shot", "adapted")]
        count = row["adapted"]["count"]
        lines.append(f"{name:<{width}} {count:>7} {shares[0]:>10} {shares[1]:>14}")
    return "\n".join([*lines, result["extension"]["note"]])
