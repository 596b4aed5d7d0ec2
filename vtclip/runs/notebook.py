# SPDX-License-Identifier: Apache-2.0
"""How a notebook shows a run or a classifier: HTML on its own, in the colours of the page.

No scripts and no links; lines and shades are half transparent, so that they are seen on light and
on dark pages. Every name is escaped. Wrong images stand in the page itself, small, where their
files are still those of the fit.
"""

from __future__ import annotations

import base64
import html
import io
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vtclip.files import Json, printable, several
from vtclip.runs.confusion import confused_pairs
from vtclip.runs.kept_images import KeptImages, places_in
from vtclip.runs.predictions import confusion_counts, rows_of
from vtclip.runs.seen import Seen

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

logger = logging.getLogger(__name__)
MOST_CLASSES, MOST_ROWS = 20, 8  # of a matrix; of a list
SIDE = 72  # pixels of the longer side of a wrong image
RULE = "border-bottom:1px solid rgba(128,128,128,.35);padding:2px 8px"
SHADES = {True: "38,120,220", False: "225,120,20"}  # right, wrong


def run_html(folder: Path, result: Json) -> str:
    """Metrics, accuracy first; confusions; the wrong test images of highest probability."""
    images = several(int(result.get("test", {}).get("images", 0)), "test image")
    classes = several(len(result.get("classes", ())), "class", "classes")
    title = f"{result.get('method')}: {classes}, {images}"
    parts = [f"<b>{_text(title)}</b> <small>{_text(str(folder))}</small>", _metrics(result)]
    if "confusion" in result:
        counts, names = confusion_counts(result["confusion"]), result["confusion"]["classes"]
        parts.append(
            _matrix(counts, names) if len(names) <= MOST_CLASSES else _pairs(counts, names)
        )
    if "predictions" in result:
        parts.append(_worst(folder, result))
    return _framed(parts)


def classifier_html(facts: Sequence[tuple[str, str]], class_names: Sequence[str]) -> str:
    """What a classifier is, line by line, and the names of its classes."""
    shown = ", ".join(class_names[:MOST_CLASSES])
    more = len(class_names) - MOST_CLASSES
    shown += f" and {more} more" if more > 0 else ""
    lines = [*facts, (several(len(class_names), "class", "classes"), shown)]
    return _framed([_table([], lines)])


def _framed(parts: Iterable[str]) -> str:
    body = "".join(f'<div style="margin:4px 0">{part}</div>' for part in parts if part)
    return f'<div style="color:inherit;background:transparent;overflow-x:auto">{body}</div>'


def _text(value: object) -> str:
    return html.escape(printable(str(value)))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of plain text under a head; the first column left, the others as they are."""
    lines = []
    if head:
        cells = "".join(f'<th style="{RULE};text-align:left">{_text(name)}</th>' for name in head)
        lines.append(f"<tr>{cells}</tr>")
    for row in rows:
        cells = "".join(f'<td style="{RULE};text-align:left">{_text(cell)}</td>' for cell in row)
        lines.append(f"<tr>{cells}</tr>")
    return f'<table style="border-collapse:collapse">{"".join(lines)}</table>'


def _metrics(result: Json) -> str:
    names = {"adapted": str(result.get("method")), "zero_shot": "zero-shot"}
    parts = [""] if "harmonic_mean" not in result else ["base", "new"]
    rows, several_labels = [], "map" in result
    for part in parts:
        of = result[part] if part else result
        for key, name in names.items():
            if key == "zero_shot" and result.get("method") == "zeroshot":
                continue
            rows.append([f"{part} {name}".strip(), *_cells(of[key], several_labels)])
    if several_labels:
        return _table(["", "mAP", "micro-AP", "macro-F1", "micro-F1"], rows)
    table = _table(["", "accuracy", "95 % interval", "macro-F1", "NLL", "ECE"], rows)
    if "harmonic_mean" in result:
        mean = result["harmonic_mean"]
        table += _text(f"harmonic mean of base and new: {_percent(mean['adapted'])}")
    return table


def _cells(row: Json, several_labels: bool) -> list[str]:
    if several_labels:
        return [_percent(row.get(name)) for name in ("map", "micro_ap", "macro_f1", "micro_f1")]
    low, high = row["interval95"]
    scores = ["–" if row.get(name) is None else f"{row[name]:.4f}" for name in ("nll", "ece")]
    interval = f"{100 * low:.1f} – {100 * high:.1f} %"
    return [_percent(row["accuracy"]), interval, _percent(row["macro_f1"]), *scores]


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f} %"


def _matrix(counts: Tensor, names: Sequence[str]) -> str:
    """Counts [K, K], each shaded by its share of the row; row = true class."""
    head = "".join(f'<th style="{RULE}">{_text(name)}</th>' for name in names)
    lines = [f'<tr><th style="{RULE};text-align:left">true \\ predicted</th>{head}</tr>']
    for k, row in enumerate(counts.tolist()):
        total = max(1, sum(row))
        cells = "".join(
            f'<td style="{RULE};text-align:right;background:rgba({SHADES[j == k]},'
            f'{0.6 * count / total:.2f})">{count}</td>'
            for j, count in enumerate(row)
        )
        name = f'<th style="{RULE};text-align:left">{_text(names[k])}</th>'
        lines.append(f"<tr>{name}{cells}</tr>")
    table = "".join(lines)
    return f'<table style="border-collapse:collapse;font-size:90%">{table}</table>'


def _pairs(counts: Tensor, names: Sequence[str]) -> str:
    pairs = confused_pairs(counts, MOST_ROWS)
    rows = [(names[true], names[other], str(count)) for true, other, count in pairs]
    return _table(["true class", "taken for", "images"], rows) if rows else ""


def _worst(folder: Path, result: Json) -> str:
    """The wrong test images whose wrong class is the most probable; nothing without the file."""
    try:
        rows = rows_of(folder)
    except (OSError, ValueError) as error:
        logger.warning("%s", printable(str(error)))
        return ""
    wrong = [row for row in rows if row["role"] == "test" and row["label"] != row["predicted"]]
    wrong.sort(key=lambda row: -row["probability"])
    lines = [
        (row["file"], row["label"], f"{row['predicted']} {_percent(row['probability'])}")
        for row in wrong[:MOST_ROWS]
    ]
    if not lines:
        return ""
    of = f"{min(MOST_ROWS, len(wrong))} of {several(len(wrong), 'wrong image')}"
    pictures = _pictures(folder, result, [row["file"] for row in wrong[:MOST_ROWS]])
    shown = [
        f'<figure style="margin:0 6px 6px 0"><img alt="{_text(file)}" src="{_embedded(picture)}">'
        f'<figcaption style="font-size:80%;max-width:{SIDE}px">{_text(said)}</figcaption></figure>'
        for (file, _, said), picture in zip(lines, pictures, strict=True)
        if picture is not None
    ]
    table = _table([of, "true class", "predicted"], lines)
    return f'{table}<div style="display:flex;flex-wrap:wrap;margin-top:6px">{"".join(shown)}</div>'


def _pictures(folder: Path, result: Json, names: Sequence[str]) -> list[Image.Image | None]:
    """Test images by name; None where a file is gone or is not that of the fit."""
    try:
        seen, places = Seen.read(folder, result["seen"]), places_in(result)
    except (
        KeyError,
        TypeError,
        OSError,
        ValueError,
    ):  # an earlier version's, or the list is another run's
        return [None] * len(names)
    rows = zip(seen.names, seen.digests, seen.roles, strict=True)
    digests = {name: digest for name, digest, role in rows if role == "test"}
    kept = [digests.get(name, "") for name in names]
    images = KeptImages(list(names), kept, places, result["config"].get("data"))
    return [images.open(row) for row in range(len(names))]


def _embedded(picture: Image.Image) -> str:
    """A small PNG as an address that holds it."""
    picture.thumbnail((SIDE, SIDE))
    picture.info.clear()  # the pixels alone
    data = io.BytesIO()
    picture.save(data, format="png")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode('ascii')}"
