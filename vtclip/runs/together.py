# SPDX-License-Identifier: Apache-2.0
"""Images without labels decided together by a fitted head (vtclip.train.transduction).

Of a fit with `unlabelled`: its test images and, where a source of others is named, these too, all
with the validation images. The labels of the latter, of which the head says what it would had it
not chosen by them, fit the share and the temperature that the adapter keeps. Labels of the others
are counted afterwards and nothing else; names, folders and the order of files change nothing, since
rows go by the digests of their features.

Of `vtclip predict --together`: all images of one call, at the share and temperature of the adapter.

`together.csv` in the run has one line per test image and other image:

    file,role,predicted,label1,prob1,...,label5,prob5

role is "test" or "unlabelled"; names are written as in predictions.csv (vtclip.runs.predictions).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtclip.data.image_files import ImageFiles, InMemory
from vtclip.data.options import FeatureOptions
from vtclip.data.records import Records, row_digests
from vtclip.data.sets import AnySource, SetSource, as_source
from vtclip.data.splits import Split
from vtclip.data.unlabelled import ROLE, list_unlabelled, open_unlabelled
from vtclip.files import Json, NewFiles, csv_lines, printable, several
from vtclip.heads import Head
from vtclip.names import option
from vtclip.runs.predictions import TOPK
from vtclip.runs.result import named_classes
from vtclip.train import metrics
from vtclip.train.calibration import Decisions, Judged, decide
from vtclip.train.neighbours import search_of
from vtclip.train.transduction import Weights, fitted_weights, mixed, transduce

if TYPE_CHECKING:
    from vtclip.runs.adapter import Adapter

logger = logging.getLogger(__name__)
TEST = "test"  # in place of a source: the test images alone
FILE = "together.csv"
ROWS = 4096  # of features that are read at once
EXCLUDES = ("base_to_new", "train_encoders", "pseudo_labels")


def as_unlabelled(value: object) -> AnySource | str | None:
    """What the option `unlabelled` names: TEST, or a source of images; None where it is not set."""
    if value is None or value == TEST:
        return None if value is None else TEST
    source = as_source(value, None)
    if isinstance(source, SetSource):
        raise ValueError(f"{option(ROLE)}: must be {TEST!r} or a source of images, got {value}")
    return source


def place_of(unlabelled: AnySource | str | None) -> AnySource | None:
    """The source of images that the option names, if it names one."""
    return None if unlabelled is None or isinstance(unlabelled, str) else unlabelled


def as_recorded(unlabelled: AnySource | str | None) -> str | None:
    """The option as a record holds it."""
    if unlabelled is None or unlabelled == TEST:
        return None if unlabelled is None else TEST
    return str(Path(unlabelled).resolve() if isinstance(unlabelled, str) else unlabelled.resolve())


def check_unlabelled(request: object) -> None:
    """Refuse `unlabelled` where it has no meaning."""
    if getattr(request, ROLE) is None:
        return
    for other in EXCLUDES:
        if getattr(request, other):
            raise ValueError(f"{option(ROLE)} cannot be combined with {option(other)}")


def list_of(unlabelled: AnySource | str | None, follow_links: bool) -> ImageFiles | None:
    """The files of the source that the option names, before any work; None where none are read."""
    place = place_of(unlabelled)
    if not isinstance(place, (Path, InMemory)):
        return None
    try:
        return list_unlabelled(place, follow_links=follow_links)
    except ValueError as error:
        words = str(error).removeprefix("source: ")
        prefix = "" if words.startswith(option(ROLE)) else f"{option(ROLE)}: "
        raise ValueError(prefix + words) from None


@dataclass(frozen=True)
class Others:
    """Images that join the test images, and how many of their source were left out for copies."""

    records: Records
    copies: int


def open_others(
    unlabelled: AnySource | str | None,
    options: FeatureOptions,
    records: Records,
    split: Split,
    images: ImageFiles | None = None,
) -> Others | None:
    """The images of the source that the option names, without copies of the run's own."""
    if unlabelled is not None and records.targets is not None:
        raise ValueError(
            f"{option(ROLE)}: the source has several labels per image, and it takes one only"
        )
    place = place_of(unlabelled)
    if not isinstance(place, (Path, InMemory)):
        return None
    part = open_unlabelled(place, options, records, images)
    own = torch.cat([split.train, split.val, split.test])
    mine, others = _contents(records.select(own), part)
    seen, kept = set(mine), []
    for row, content in enumerate(others):
        if content not in seen:
            kept.append(row)
            seen.add(content)
    copies = len(part) - len(kept)
    logger.warning(
        "%s: %s of %s, whose labels, if it has any, are not read%s",
        option(ROLE), several(len(kept), "image"), printable(str(place)),
        f"; {copies} more have the content of another of them or of the run" if copies else "",
    )  # fmt: skip
    return Others(part.select(torch.tensor(kept, dtype=torch.long)), copies)


def _contents(*tables: Records) -> list[list[str]]:
    """What identifies each row: digests of files where all tables have them, else of features."""
    digests = [table.digests for table in tables]
    if all(column is not None for column in digests):
        return [list(column or ()) for column in digests]
    return [row_digests(features_of_rows(table, torch.arange(len(table)))) for table in tables]


def features_of_rows(records: Records, index: Tensor) -> Tensor:
    """The image features [n, C] of rows; their spatial features are not read."""
    plain = records.without_spatial()
    parts = [plain.batch(rows).image for rows in torch.split(index, ROWS)] if len(index) else []
    return torch.cat(parts) if parts else torch.zeros(0, records.width)


@dataclass(frozen=True)
class Joint:
    """What was decided together: what result.json says of it, the adapter's numbers, the table."""

    values: Json
    weights: Weights | None
    table: bytes
    digests: dict[str, str]

    def write(self, new: NewFiles) -> None:
        new.write(FILE, self.table)


def decide_together(
    records: Records,
    split: Split,
    head: Head,
    judged: Judged,
    unseen: Decisions | None,
    others: Others | None,
    temperature: float | None,
    device: torch.device,
) -> Joint:
    """The test images of a split and `others`, decided together with its validation images.

    judged: what the head says of validation and test images by itself; unseen: of the former as if
    it had not seen them, where that is something else. temperature: of the head.
    """
    val = unseen or judged.val
    logits, images = [judged.test.logits], [features_of_rows(records, split.test)]
    if others is not None:
        every = torch.arange(len(others.records))
        logits.append(decide(head, others.records, every, device).logits)
        images.append(features_of_rows(others.records, every))
    count = 0 if val is None else len(val.label)
    if val is not None:
        logits.append(val.logits)
        images.append(features_of_rows(records, split.val))
    log_p = log_probabilities(torch.cat(logits), temperature)
    image = torch.cat(images)
    log_z = decided(log_p, image)
    weights = None
    if val is not None and count:
        weights = fitted_weights(log_p[-count:], log_z[-count:], val.label)
    else:
        say_not_validated("the run has no validation images")
    joint = mixed(log_p, log_z, weights or Weights())[: len(log_p) - count]
    tested = len(split.test)
    table = joint_csv(
        [records.names[row] for row in split.test.tolist()],
        [] if others is None else others.records.names,
        joint,
        records.class_names,
    )
    used = weights or Weights()
    measured = metrics.all_metrics(joint[:tested], judged.test.label)
    return Joint(
        {
            **named_classes(measured, records.class_names),
            "unlabelled_images": len(joint),
            "images": {
                "test": tested,
                "others": len(joint) - tested,
                "validation": count,
                "left_out_copies": 0 if others is None else others.copies,
            },
            "share": used.share,
            "joint_temperature": used.temperature,
            "validated": weights is not None,
            "neighbours": search_of(len(log_p)),
            "file": FILE,
            "sha256": hashlib.sha256(table).hexdigest(),
        },
        weights,
        table,
        {} if others is None else {"unlabelled_images": others.records.info["digests"]["images"]},
    )


def decided(log_p: Tensor, image: Tensor) -> Tensor:
    """log z [N, K] of vtclip.train.transduction, to the last bit the same in any order of rows."""
    digests = row_digests(image)
    order = torch.tensor(sorted(range(len(image)), key=digests.__getitem__), dtype=torch.long)
    log_z = torch.empty_like(log_p)
    log_z[order] = transduce(log_p[order], image[order])
    return log_z


def log_probabilities(logits: Tensor, temperature: float | None) -> Tensor:
    """log p [N, K] in float64 at the head's temperature."""
    return (logits.double() / (temperature or 1.0)).log_softmax(dim=1)


def check_together(adapter: Adapter, asked: dict[str, float | None]) -> None:
    """Refuse `together` of adapters and with options that it has no meaning for."""
    if adapter.features.get("multi_label"):
        raise ValueError(
            f"{option('together')}: the run has several labels per image, and it takes one only"
        )
    for name, value in asked.items():
        if value is not None:
            raise ValueError(
                f"{option('together')} cannot be combined with {option(name)}, whose scores are of "
                "images decided one by one"
            )


def answer_together(adapter: Adapter, logits: Tensor, image: Tensor) -> Tensor:
    """Probabilities [N, K] in float64 of N images that are decided together.

    logits [N, K] and features image [N, C] of the adapter's head and encoder, on the CPU.
    """
    if adapter.together is None and len(logits) > 1:
        say_not_validated("no fit of this adapter with " + option(ROLE) + " did so")
    log_p = log_probabilities(logits, adapter.temperature)
    return mixed(log_p, decided(log_p, image), adapter.together or Weights()).exp()


def say_not_validated(why: str) -> None:
    logger.warning(
        "together: its share %g and temperature %g were not validated: %s", *Weights(), why
    )


def joint_csv(
    tested: Sequence[str], others: Sequence[str], log_p: Tensor, class_names: Sequence[str]
) -> bytes:
    """The table of the module's docstring; log_p [N, K] of test images and, after them, others."""
    best = log_p.exp().topk(min(TOPK, len(class_names)), dim=1)
    ranks = range(1, best.values.shape[1] + 1)
    head = ["file", "role", "predicted", *(f"{c}{r}" for r in ranks for c in ("label", "prob"))]
    table: list[list[object]] = [[*head]]
    roles = [TEST] * len(tested) + [ROLE] * len(others)
    rows = zip([*tested, *others], roles, best.indices.tolist(), best.values.tolist(), strict=True)
    for name, role, classes, values in rows:
        cells: list[object] = [name, role, class_names[classes[0]]]
        for k, value in zip(classes, values, strict=True):
            cells += [class_names[k], f"{value:.6g}"]
        table.append(cells)
    return csv_lines(table).encode("utf-8")


def together_line(values: Json) -> str:
    """What `vtclip fit` prints of the entry `together` of a result."""
    low, high = values["interval95"]
    count = values["unlabelled_images"]
    not_validated = "" if values["validated"] else ", share not validated"
    return (
        f"together: {100 * values['accuracy']:.2f} % ({100 * low:.1f}-{100 * high:.1f} %), "
        f"macro-F1 {100 * values['macro_f1']:.2f} %, NLL {values['nll']:.4f}, "
        f"ECE {values['ece']:.4f}{not_validated}: has seen {several(count, 'unlabelled image')}; "
        "not comparable with inductive numbers"
    )
