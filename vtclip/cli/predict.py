# SPDX-License-Identifier: Apache-2.0
"""`vtclip predict`: its arguments, and one line, one object or some CSV rows per image.

Lines and CSV rows are written as the images are done. An unreadable image is named on stderr, the
others are predicted, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vtclip.cli.parsing import emit, emit_json, existing, fail, number

CSV_COLUMNS = ("image", "rank", "label", "probability")


def add_arguments(predict: Any) -> None:
    predict.add_argument("folder", metavar="RUN")
    predict.add_argument(
        "images", metavar="IMAGE", nargs="+", action="extend", help="files, and folders of them"
    )
    predict.add_argument("--topk", type=number(int, 1, 1_000_000), default=5)
    predict.add_argument(
        "--batch-size", type=number(int, 1, 1_000_000), default=64, metavar="N", help="default: 64"
    )
    predict.add_argument("--csv", action="store_true", help="print CSV: " + ",".join(CSV_COLUMNS))


def run_predict(args: argparse.Namespace) -> int:
    """0 where every image could be read, else 1."""
    folder = existing("RUN", args.folder)
    if args.json and args.csv:
        fail("vtclip predict: --json and --csv exclude each other")
    given = [existing("IMAGE", path) for path in args.images]
    paths, broken = _listed(args.images, given)
    from vtclip.classifier import Classifier
    from vtclip.settings import set_threads

    set_threads(args.threads)
    classifier = Classifier.load(folder, model=args.model, device=args.device)
    found = classifier.predict_each(paths, args.topk, batch_size=args.batch_size)
    rows = zip(paths, found, strict=True)
    if args.json:
        return _as_json(rows, broken)
    if args.csv:
        emit(_csv_line(*CSV_COLUMNS))
    for path, best in rows:
        if not isinstance(best, list):
            broken.append((path, best.reason))
        elif args.csv:
            for rank, one in enumerate(best, start=1):
                emit(_csv_line(path, rank, one.label, one.probability))
        else:
            shown = ", ".join(f"{one.label} {100 * one.probability:.1f} %" for one in best)
            emit(f"{path}: {shown}")
    return _tell(broken)


def _listed(words: list[str], paths: list[Path]) -> tuple[list[str], list[tuple[str, str]]]:
    """The files as they were typed, folders as the images below them; and what was passed over."""
    from vtclip.data.images import walk_images

    files: list[str] = []
    skipped: list[tuple[str, str]] = []
    for word, path in zip(words, paths, strict=True):
        if not path.is_dir():
            files.append(str(path) if word.startswith("~") else word)
            continue
        below, passed_over = walk_images(path)
        if not below and not passed_over:
            fail(f"vtclip predict: IMAGE {word!a} is a folder without images")
        files += map(str, below)
        skipped += passed_over
    return files, skipped


def _as_json(rows: Iterator[tuple[str, Any]], broken: list[tuple[str, str]]) -> int:
    answer: list[dict[str, Any]] = []
    for path, best in rows:
        if isinstance(best, list):
            answer.append({"image": path, "predictions": [one._asdict() for one in best]})
        else:
            answer.append({"image": path, "error": best.reason})
    answer += [{"image": path, "error": reason} for path, reason in broken]
    emit_json(answer)
    return _tell([(row["image"], row["error"]) for row in answer if "error" in row])


def _tell(broken: list[tuple[str, str]]) -> int:
    from vtclip.data.images import printable

    for path, reason in broken:
        sys.stderr.write(f"vtclip predict: {printable(path)}: {reason}\n")
    return 1 if broken else 0


def _csv_line(*cells: Any) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(cells)
    return line.getvalue()
