# SPDX-License-Identifier: Apache-2.0
"""`vtclip predict`: its arguments, and one line, one object or some CSV rows per image.

Lines and CSV rows are written as the images are done; names in CSV are as `vtclip.files.escape` has
them. An unreadable image is named on stderr, the others are predicted, and the exit status is 1.
With --unknown and --coverage each image says more: "unknown" and its p-value, and the set of
classes; without them nothing changes. With --together all images are read before the first line,
and each entry says how many were decided with it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from vtclip.cli.parsing import (
    Parser,
    count,
    emit,
    emit_json,
    existing,
    note,
    number,
    on_terminal,
    open_classifier,
)

CSV_COLUMNS = ("image", "rank", "label", "probability")
Row = tuple[str, Any]
share = number(float, 0, 1, above=True)


def add_arguments(parser: Parser) -> None:
    parser.add_argument("folder", metavar="RUN", help="folder of a run")
    parser.add_argument(
        "images", metavar="IMAGE", nargs="+", action="extend", help="files, and folders of them"
    )
    parser.add_argument(
        "--topk", type=count, default=5, metavar="N", help="classes to show per image (default: 5)"
    )
    parser.add_batch_size("--batch-size", "--encoder-batch-size")
    parser.add_argument("--csv", action="store_true", help="print CSV: " + ",".join(CSV_COLUMNS))
    parser.add_argument(
        "--unknown",
        type=share,
        metavar="RATE",
        help='say "unknown" of images of no class; of the others at most this share is lost',
    )
    parser.add_argument(
        "--coverage",
        type=share,
        metavar="SHARE",
        help="also the set of classes that holds the true one this often, e.g. 0.95",
    )
    parser.add_argument(
        "--together",
        action="store_true",
        help="decide all images as one batch, by what they look like among each other too",
    )
    parser.add_model_of_run()
    parser.add_shared("--follow-links", "--device", "--threads", "--json")


def run(args: argparse.Namespace) -> int:
    """0 where every image could be read, else 1."""
    from vtclip.files import printable, several
    from vtclip.machine import doing

    folder = existing("RUN", args.folder)
    if args.json and args.csv:
        raise ValueError("--json and --csv exclude each other")
    places = [existing("IMAGE", path) for path in args.images]
    paths, unreadable = _listed(args.images, places, args.follow_links)
    asked = {"unknown": args.unknown, "coverage": args.coverage}
    _check_asked(folder, asked, args.together)
    classifier = open_classifier(args, folder)
    answers = classifier.answer_each(
        paths, args.topk, batch_size=args.batch_size, together=args.together, **asked
    )
    together: dict[str, int] = {}
    if args.together:
        with doing("deciding", on_terminal()):
            answers = list(answers)
        together = {"together": sum(not hasattr(answer, "reason") for answer in answers)}
    rows: Iterable[Row] = zip(paths, answers, strict=True)
    if args.json or not _watched():
        rows = behind_bar(rows, len(paths))
    if args.json:
        return _print_json(rows, unreadable, together)
    if args.csv:
        more = [name for name, option in (("unknown", "unknown"), ("in_set", "coverage"))
                if asked[option] is not None]  # fmt: skip
        emit(_csv_line(*CSV_COLUMNS, *more, *together))
    elif together:
        emit(f"{several(together['together'], 'image')} decided together")
    for path, answer in rows:
        if hasattr(answer, "reason"):
            unreadable.append((path, answer.reason))
        elif args.csv:
            for cells in _csv_cells(answer):
                emit(_csv_line(path, *cells, *together.values()))
        else:
            emit(f"{printable(path)}: {_in_words(answer)}")
    return _report(unreadable)


def _watched() -> bool:
    """Whether the lines themselves show how far the work is."""
    return sys.stdout is not None and sys.stdout.isatty()


def behind_bar(rows: Iterable[Row], total: int) -> Iterator[Row]:
    """The rows as they come, and a bar of them where somebody watches."""
    from vtclip.data.threads import progress_bar

    with progress_bar(total, "predict", on_terminal()) as bar:
        for row in rows:
            yield row
            bar.update()


def _check_asked(folder: Path, asked: dict[str, Any], together: bool) -> None:
    """Refuse what the scores of the run do not allow before its model is loaded."""
    from vtclip.runs.adapter import load_adapter
    from vtclip.runs.answers import Rule
    from vtclip.runs.together import check_together

    if not together and all(value is None for value in asked.values()):
        return
    adapter = load_adapter(folder)
    if together:
        check_together(adapter, asked)
    Rule(adapter, **asked)


def _csv_cells(answer: Any) -> Iterator[list[Any]]:
    """Rank, label and probability of each class, whether the image is unknown, and whether the
    class is in the set; a set of more classes than --topk has rows for all of them.
    """
    classes = list(answer.predictions)
    if answer.set is not None:
        classes += answer.set[len(classes) :]
    for rank, class_ in enumerate(classes, start=1):
        cells = [rank, class_.label, class_.probability]
        if answer.unknown is not None:
            cells.append(str(answer.unknown).lower())
        if answer.set is not None:
            cells.append(str(rank <= len(answer.set)).lower())
        yield cells


def _in_words(answer: Any) -> str:
    shown = ", ".join(f"{one.label} {100 * one.probability:.1f} %" for one in answer.predictions)
    if answer.unknown:
        shown = f"unknown ({shown})"
    if answer.set is not None:
        shown += f"; set: {{{', '.join(one.label for one in answer.set)}}}"
    return shown


def _listed(
    words: list[str], places: list[Path], follow_links: bool
) -> tuple[list[str], list[tuple[str, str]]]:
    """Files as they were typed, folders as the images below them; and what was passed over, why."""
    from vtclip.data.folders import other_files, walk_images

    files: list[str] = []
    skipped: list[tuple[str, str]] = []
    for word, place in zip(words, places, strict=True):
        if not place.is_dir():
            files.append(str(place) if word.startswith("~") else word)
            continue
        below, passed_over = walk_images(place, follow_links=follow_links)
        if not below and not passed_over:
            others = other_files(place, follow_links=follow_links)
            raise ValueError(f"IMAGE {word!a} is a folder without images{others}")
        files += map(str, below)
        skipped += passed_over
    return files, skipped


def _print_json(
    rows: Iterable[Row], unreadable: list[tuple[str, str]], together: dict[str, int]
) -> int:
    entries: list[dict[str, Any]] = []
    for path, answer in rows:
        if hasattr(answer, "reason"):
            entries.append({"image": path, "error": answer.reason})
            continue
        entry = {"image": path, "predictions": [one._asdict() for one in answer.predictions]}
        if answer.unknown is not None:
            entry |= {"unknown": answer.unknown, "p_value": answer.p_value}
        if answer.set is not None:
            entry["set"] = [one.label for one in answer.set]
        entries.append({**entry, **together})
    entries += [{"image": path, "error": reason} for path, reason in unreadable]
    emit_json("predict", {"images": entries})
    return _report([(entry["image"], entry["error"]) for entry in entries if "error" in entry])


def _report(unreadable: list[tuple[str, str]]) -> int:
    """Names each on stderr; returns the exit status."""
    from vtclip.files import printable

    for path, reason in unreadable:
        note(f"vtclip predict: {printable(path)}: {reason}")
    return 1 if unreadable else 0


def _csv_line(*cells: Any) -> str:
    from vtclip.files import csv_lines

    return csv_lines([cells]).removesuffix("\n")
