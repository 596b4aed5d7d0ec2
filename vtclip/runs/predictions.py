# SPDX-License-Identifier: Apache-2.0
"""What a run says of each of its images: `predictions.csv`, and which classes it takes for others.

predictions.csv has one line per validation and test image, in UTF-8:

    file,label,predicted,role,label1,prob1,...,label5,prob5

file is the image's name in its source, role "val" or "test", label1 the most probable class. The
probabilities are those of `vtclip predict`, at the run's temperature. The model that a line is of
did not train on its image, but may have chosen its hyper-parameters by those of role "val". Of a
run that was fitted once more on training and validation images ("refit" of result.json) lines of
role "val" are of the model before that, lines of role "test" of the one that the run saved.

A name is written so that a spreadsheet does not take it for a formula and a line stays a line, as
`vtclip.files.escape` says. `unescape` takes that back, and `read_predictions` does so for a file.
"""

from __future__ import annotations

import csv
import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from vtclip.files import Json, NewFiles, csv_lines, unescape
from vtclip.runs.confusion import draw_confusion
from vtclip.train import metrics

if TYPE_CHECKING:
    from vtclip.data.splits import Split
    from vtclip.train.calibration import Decisions, Judged

logger = logging.getLogger(__name__)
PREDICTIONS, CONFUSION = "predictions.csv", "confusion.png"
COLUMNS = ("file", "label", "predicted", "role")
TABLE_SIGN = ",".join(COLUMNS).encode()
TOPK = 5
MOST_CELLS = 50  # classes up to which a confusion matrix is written in full


class Prediction(NamedTuple):
    """A class and its probability 0..1."""

    label: str
    probability: float


class Part(NamedTuple):
    """Images of one role: their names, and what the head says of them in the same order.

    Of validation images it is the head of the first fit, see the module.
    """

    role: str
    names: list[str]
    decisions: Decisions


def named_parts(names: Sequence[str], split: Split, judged: Judged) -> list[Part]:
    """The validation and test images of a split of rows called `names`."""
    parts = []
    for role, index, decisions in (
        ("val", split.val, judged.val),
        ("test", split.test, judged.test),
    ):
        if decisions is not None:
            parts.append(Part(role, [names[row] for row in index.tolist()], decisions))
    return parts


def write_decisions(
    new: NewFiles, parts: Sequence[Part], class_names: Sequence[str], temperature: float | None
) -> Json:
    """Write predictions.csv and confusion.png; returns what result.json says of them.

    "predictions": file, its sha256 and the images per role. "confusion": see `confusion_of`. The
    last part is that of the test images, which alone the confusion counts.
    """
    table = predictions_csv(parts, class_names, temperature)
    new.write(PREDICTIONS, table)
    test = parts[-1].decisions
    counts = metrics.confusion(test.logits, test.label)
    try:
        new.write(CONFUSION, draw_confusion(counts, class_names))
    except (ImportError, OSError, ValueError) as error:  # a Pillow without fonts
        logger.warning("%s could not be drawn: %s", CONFUSION, error)
    return {
        "predictions": {
            "file": PREDICTIONS,
            "sha256": hashlib.sha256(table).hexdigest(),
            "images": {part.role: len(part.names) for part in parts},
        },
        "confusion": confusion_of(counts, class_names),
    }


def predictions_csv(
    parts: Sequence[Part], class_names: Sequence[str], temperature: float | None
) -> bytes:
    """The table of the module's docstring, with min(5, K) classes per image."""
    topk = min(TOPK, len(class_names))
    ranked = [f"{column}{rank}" for rank in range(1, topk + 1) for column in ("label", "prob")]
    rows: list[list[object]] = [[*COLUMNS, *ranked]]
    for role, names, decisions in parts:
        logits = decisions.logits.double() / (temperature or 1.0)
        best = logits.softmax(dim=1).topk(topk, dim=1)
        predicted = logits.argmax(dim=1).tolist()
        for name, label, first, classes, values in zip(
            names,
            decisions.label.tolist(),
            predicted,
            best.indices.tolist(),
            best.values.tolist(),
            strict=True,
        ):
            cells: list[object] = [name, class_names[label], class_names[first], role]
            for k, value in zip(classes, values, strict=True):
                cells += [class_names[k], f"{value:.6g}"]
            rows.append(cells)
    return csv_lines(rows).encode("utf-8")


def read_predictions(path: str | Path) -> list[dict[str, str]]:
    """The lines of a predictions.csv, column to value, with every name as it was."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows, 2):
        if None in row or None in row.values():  # more cells than columns, or fewer
            raise ValueError(f"{path} is damaged at its row {number}")
    names = [name for name in (rows[0] if rows else {}) if not name.startswith("prob")]
    return [{**row, **{name: unescape(row[name]) for name in names}} for row in rows]


def rows_of(folder: str | Path) -> list[Json]:
    """What a run says of each image: file, label, predicted, role, probability and top.

    probability: of the predicted class, 0..1; top: the (class, probability) pairs of the file, best
    first. ValueError for a run without predictions.csv.
    """
    path = Path(folder) / PREDICTIONS
    if not path.is_file():
        raise ValueError(f"{folder} holds no {PREDICTIONS}: its run keeps no table of predictions")
    found = []
    for row in read_predictions(path):
        try:
            ranks = [name.removeprefix("label") for name in row if name.startswith("label")]
            top = [(row[f"label{n}"], float(row[f"prob{n}"])) for n in ranks if n]
            values = {name: row[name] for name in COLUMNS}
            found.append({**values, "probability": top[0][1], "top": top})
        except (KeyError, IndexError, TypeError, ValueError):
            raise ValueError(f"{path} is damaged at its row {len(found) + 2}") from None
    return found


def confusion_of(counts: Tensor, class_names: Sequence[str]) -> Json:
    """Counts [K, K], row = true class, column = prediction, as result.json holds them.

    "classes" is the order of rows and columns. Up to 50 classes "matrix" is the whole table; of
    more "cells" lists [true, predicted, count] of what is not 0, by their places in that order.
    """
    if len(class_names) <= MOST_CELLS:
        return {"classes": list(class_names), "matrix": counts.tolist()}
    places = counts.nonzero()
    cells = torch.cat([places, counts[places[:, 0], places[:, 1]][:, None]], dim=1)
    return {"classes": list(class_names), "cells": cells.tolist()}


def confusion_counts(confusion: Json) -> Tensor:
    """The counts [K, K] that `confusion_of` wrote."""
    K = len(confusion["classes"])
    if "matrix" in confusion:
        return torch.tensor(confusion["matrix"], dtype=torch.long).reshape(K, K)
    cells = torch.tensor(confusion["cells"], dtype=torch.long).reshape(-1, 3)
    counts = torch.zeros(K, K, dtype=torch.long)
    counts[cells[:, 0], cells[:, 1]] = cells[:, 2]
    return counts


def confused_line(confusion: Json, most: int = 3) -> str:
    """One line on the pairs of classes that are confused most; empty where nothing was wrong."""
    from vtclip.files import printable
    from vtclip.runs.confusion import confused_pairs

    names = [printable(name) for name in confusion["classes"]]
    pairs = confused_pairs(confusion_counts(confusion), most)
    shown = [f"{names[true]} as {names[other]} ({count})" for true, other, count in pairs]
    return f"most confused: {', '.join(shown)}" if shown else ""
