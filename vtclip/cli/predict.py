# SPDX-License-Identifier: Apache-2.0
"""`vtclip predict`: its arguments, and one line, one object or some CSV rows per image.

Lines and CSV rows are written as the images are done. An unreadable image is named on stderr, the
others are predicted, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vtclip.cli.parsing import (
    Parser,
    count,
    emit,
    emit_json,
    existing,
    note,
    open_classifier,
)

CSV_COLUMNS = ("image", "rank", "label", "probability")


def add_arguments(parser: Parser) -> None:
    parser.add_argument("folder", metavar="RUN")
    parser.add_argument(
        "images", metavar="IMAGE", nargs="+", action="extend", help="files, and folders of them"
    )
    parser.add_argument("--topk", type=count, default=5)
    parser.add_batch_size("--batch-size", "--encoder-batch-size")
    parser.add_argument("--csv", action="store_true", help="print CSV: " + ",".join(CSV_COLUMNS))
    parser.add_model_of_run()
    parser.add_shared("--device", "--threads", "--json")


def run(args: argparse.Namespace) -> int:
    """0 where every image could be read, else 1."""
    folder = existing("RUN", args.folder)
    if args.json and args.csv:
        raise ValueError("--json and --csv exclude each other")
    places = [existing("IMAGE", path) for path in args.images]
    paths, unreadable = _listed(args.images, places)
    classifier = open_classifier(args, folder)
    predicted = classifier.predict_each(paths, args.topk, batch_size=args.batch_size)
    rows = zip(paths, predicted, strict=True)
    if args.json:
        return _print_json(rows, unreadable)
    if args.csv:
        emit(_csv_line(*CSV_COLUMNS))
    for path, best in rows:
        if not isinstance(best, list):
            unreadable.append((path, best.reason))
        elif args.csv:
            for rank, class_ in enumerate(best, start=1):
                emit(_csv_line(path, rank, class_.label, class_.probability))
        else:
            shown = ", ".join(f"{class_.label} {100 * class_.probability:.1f} %" for class_ in best)
            emit(f"{path}: {shown}")
    return _report(unreadable)


def _listed(words: list[str], places: list[Path]) -> tuple[list[str], list[tuple[str, str]]]:
    """Files as they were typed, folders as the images below them; and what was passed over, why."""
    from vtclip.data.folders import walk_images

    files: list[str] = []
    skipped: list[tuple[str, str]] = []
    for word, place in zip(words, places, strict=True):
        if not place.is_dir():
            files.append(str(place) if word.startswith("~") else word)
            continue
        below, passed_over = walk_images(place)
        if not below and not passed_over:
            raise ValueError(f"IMAGE {word!a} is a folder without images")
        files += map(str, below)
        skipped += passed_over
    return files, skipped


def _print_json(rows: Iterator[tuple[str, Any]], unreadable: list[tuple[str, str]]) -> int:
    entries: list[dict[str, Any]] = []
    for path, best in rows:
        if isinstance(best, list):
            entries.append({"image": path, "predictions": [class_._asdict() for class_ in best]})
        else:
            entries.append({"image": path, "error": best.reason})
    entries += [{"image": path, "error": reason} for path, reason in unreadable]
    emit_json(entries)
    return _report([(entry["image"], entry["error"]) for entry in entries if "error" in entry])


def _report(unreadable: list[tuple[str, str]]) -> int:
    """Names each on stderr; returns the exit status."""
    from vtclip.files import printable

    for path, reason in unreadable:
        note(f"vtclip predict: {printable(path)}: {reason}")
    return 1 if unreadable else 0


def _csv_line(*cells: Any) -> str:
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow(cells)
    return line.getvalue()
