# SPDX-License-Identifier: Apache-2.0
"""`vtclip extend`: its arguments, its call of `vtclip.extend` and what it prints."""

from __future__ import annotations

import argparse
from typing import Any

from vtclip.cli.parsing import (
    Parser,
    emit,
    emit_headline,
    emit_json,
    emit_table,
    existing,
    number_or_all,
    on_terminal,
    options_of,
)


def add_arguments(parser: Parser) -> None:
    parser.add_argument("folder", metavar="RUN", help="folder of a run")
    parser.add_argument(
        "source", metavar="FOLDER", help="images of one new class, or a folder of class folders"
    )
    parser.add_argument("--out", metavar="RUN2", required=True, help="folder of the new run")
    parser.add_argument("--name", help="the one new class, where it is not called like its folder")
    parser.add_argument(
        "--shots",
        type=number_or_all(1),
        metavar="N|all",
        help="images per new class, for methods that keep images: at most N, or all (of a run of "
        "--exact-shots exactly N; default: as the run)",
    )
    parser.add_shared("--class-names", "--follow-links")
    parser.add_model_of_run()
    parser.add_shared("--encoder-batch-size", "--cache-dir", "--device", "--threads", "--json")


def run(args: argparse.Namespace) -> int:
    folder, source = existing("RUN", args.folder), existing("FOLDER", args.source)
    from vtclip.runs.extend import extend

    extended = extend(
        folder,
        source,
        progress=on_terminal(),
        **options_of(args, "out", "name", "class_names", "follow_links", "shots"),
        **options_of(args, "model", "encoder_batch_size"),
        **options_of(args, "device", "threads", "cache_dir"),
    )
    if args.json:
        emit_json("extend", {**extended.result, "run": str(extended.folder)})
    else:
        emit_headline(headline(extended.result))
        emit_table(summary(extended.result))
        files = ", ".join(sorted(path.name for path in extended.folder.iterdir()))
        emit(f"run in {extended.folder}: {files}")
    return 0


def headline(result: Any) -> str:
    """Accuracy over old and new classes, in one sentence."""
    values, names = result["adapted"], result["classes"]
    right = f"{100 * values['accuracy']:.1f} % right on {values['count']:,} test images"
    return (
        f"{right} of all {len(names)} classes, {len(result['sources'][-1]['classes'])} of them new"
    )


def summary(result: Any) -> str:
    """Accuracy before and after, of zero-shot and of the method; the images of the new classes."""
    from vtclip.files import printable, several
    from vtclip.runs.class_counts import class_table

    added, method = result["sources"][-1], printable(result["method"])
    K, names = len(result["classes"]), added["classes"]
    old = K - len(names)
    kept = [counts["train"] for counts in added["images_per_class"].values()]
    number = f"{min(kept)}" if min(kept) == max(kept) else f"{min(kept)} to {max(kept)}"
    of_each = (
        f"{number} {'image' if number == '1' else 'images'} of each"
        if added["learns"]
        else "no images of them"
    )
    rows = {
        f"{several(old, 'old class', 'old classes')}, before": result["before"],
        f"{several(old, 'old class', 'old classes')} among {K}": result["old_classes"],
        f"{len(names)} new among {K}": result["new_classes"],
        f"all {K}": {key: result[key] for key in ("zero_shot", "adapted")},
    }
    width = max(map(len, rows))
    lines = [
        f"{method} on {printable(result['source'])}, with {', '.join(map(printable, names[:4]))}"
        f"{', ...' if len(names) > 4 else ''}: {of_each} kept",
        f"{'accuracy':<{width}} {'images':>7} {'zero-shot':>10} {method:>14}",
    ]
    for name, row in rows.items():
        shares = [f"{100 * row[key]['accuracy']:.2f} %" for key in ("zero_shot", "adapted")]
        images = row["adapted"]["count"]
        lines.append(f"{name:<{width}} {images:>7} {shares[0]:>10} {shares[1]:>14}")
    table = class_table(added["images_per_class"])
    return "\n".join([*lines, table, printable(result["extension"]["note"])])
