# SPDX-License-Identifier: Apache-2.0
"""Runs on images of more than one class: what is refused, what is written, what is evaluated.

docs/multi_label.md says which method does what. The run's adapter keeps the scale and offsets of
its probabilities (vtclip.train.sigmoid) and its threshold in `features["multi_label"]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtclip.data.featureset import FeatureSet
from vtclip.data.image_datasets import is_saved_dataset
from vtclip.data.image_files import InMemory
from vtclip.data.listed import list_images, said_later
from vtclip.data.records import Records
from vtclip.data.sets import SetSource, source_name
from vtclip.data.sources import source_kind
from vtclip.files import Json
from vtclip.heads import HEADS, Head
from vtclip.names import in_order, option
from vtclip.runs.adapter import Adapter, features_of
from vtclip.runs.opening import named_as
from vtclip.runs.result import Run, named_classes
from vtclip.runs.sources import RunSources, SourceRows, test_report
from vtclip.train import multi_label
from vtclip.train.methods import zero_shot_head
from vtclip.train.multi_label import Said, say
from vtclip.train.sigmoid import Sigmoid, fit_sigmoid

if TYPE_CHECKING:
    from vtclip.data.sets import AnySource
    from vtclip.runs.folder import RunRows
    from vtclip.runs.request import FitRequest

SEVERAL = "several labels per image"


def has_several(source: AnySource) -> bool:
    """Whether images of `source` may have more than one class; no image is opened.

    Folders and the field's data sets are not looked into: theirs have one.
    """
    if isinstance(source, SetSource):
        return False
    if isinstance(source, InMemory):
        return source.images.labels is not None
    kind = source_kind(source)
    if kind == "features":
        return "labels" in FeatureSet.open(source).manifest
    if kind != "folder" or not (source.is_file() or is_saved_dataset(source)):
        return False
    with said_later():
        return list_images(source).labels is not None


def check_request(request: FitRequest) -> None:
    """Refuse a source with several labels per image for what takes one only, before any work."""
    places = {name: getattr(request, name, None) for name in ("val", "test")}
    for name, place in places.items():
        if place is not None:
            with named_as(name):
                check_single(place, option(name))
    if not has_several(request.source):
        return
    names = ("train_encoders", "base_to_new", "pseudo_labels", "refit", "final", "unlabelled")
    for name in (*names, *places):
        if getattr(request, name, None):
            hint = "; a column split says which images test" if name in places else ""
            raise ValueError(
                f"{option(name)}: {request.source} has {SEVERAL}, and it takes one only{hint}"
            )
    for name in ("loss", "gce_q", "label_smoothing"):
        value = request.overrides.get(name)
        if value not in (None, 0, "ce"):
            raise ValueError(
                f"{name} {value}: {request.source} has {SEVERAL}, which are trained with a sigmoid "
                "per class"
            )
    check_method(request.method, str(request.source))


def check_method(method: str, source: str) -> None:
    """Refuse a method that cannot be fitted to several labels per image; names those that can."""
    if not HEADS[method].multi_label:
        able = ", ".join(in_order(n for n, kind in HEADS.items() if kind.multi_label))
        raise ValueError(
            f"method {method} takes one label per image, and {source} has {SEVERAL}; "
            f"methods for it: {able}"
        )


def check_single(source: AnySource, what: str) -> None:
    """Refuse a source with several labels per image for `what`, which takes one only."""
    if has_several(source):
        raise ValueError(f"{what}: {source} has {SEVERAL}, and it takes one only")


def check_single_run(result: Json, what: str) -> None:
    """Refuse a run on several labels per image for `what`, which takes one only."""
    if result.get("multi_label"):
        raise ValueError(f"{what}: the run has {SEVERAL}, and it takes one only")


def evaluate_heads(request: FitRequest, rows: RunRows, head: Head) -> tuple[dict[str, Json], Json]:
    """Metrics of zero-shot and of the head on the test rows, and what the adapter keeps.

    Scale, offsets and threshold come from the validation rows, and from the training rows where
    there are none.
    """
    records, split, device = rows.records, rows.split, request.device
    if not len(split.test):
        raise ValueError("evaluate: there are no test images to count")
    values: dict[str, Json] = {}
    for name, decision in (("zero_shot", zero_shot_head(records, device)), ("adapted", head)):
        fitting = split.val if len(split.val) else split.train
        if not len(fitting):
            raise ValueError(
                f"fit: {SEVERAL} need validation or training images, which set the level from "
                "which a class counts as there; got none"
            )
        said = say(decision, records, fitting, device)
        sigmoid = fit_sigmoid(*said)
        threshold = multi_label.threshold_of(said if len(split.val) else None, sigmoid)
        test = say(decision, records, split.test, device)
        row = multi_label.all_metrics(test, sigmoid, threshold)
        values[name] = {**named(row, records.class_names), "calibrated_on": len(fitting)}
    kept = {**sigmoid.to_json(), "threshold": threshold}
    return values, kept


def adapter_of(request: FitRequest, records: Records, head: Head, kept: Json) -> Adapter:
    """The adapter of a run, with the scale, offsets and threshold of `evaluate_heads`."""
    features = {**features_of(records, request.model), "multi_label": kept}
    return Adapter(head, records.class_names, None, features)


def evaluate_run(
    run: Run,
    sources: RunSources,
    source: AnySource | None,
    data: str | Path | None,
    device: torch.device,
    refused: Mapping[str, object],
) -> Json:
    """The metrics of a run on its own test images (source None), or on those of `source`.

    A source with one label per image counts too. refused: options by name that must not be set.
    """
    for name, value in refused.items():
        if value:
            raise ValueError(f"{option(name)}: the run has {SEVERAL}, and it takes one only")
    adapter = sources.adapter
    rows = sources.rows(data)[0] if source is None else sources.other(source)
    counted = test_report([rows], run.result["source"] if source is None else str(source))
    kept = adapter.features["multi_label"]
    said = say_as_run(adapter.head, rows, device)
    values = multi_label.all_metrics(said, Sigmoid.from_json(kept), kept["threshold"])
    name = Path(run.result["source"]).name if source is None else source_name(source)
    return {
        "method": run.result["method"],
        "source": name,
        "multi_label": True,
        **named(values, adapter.class_names),
        **counted,
    }


def say_as_run(head: Head, rows: SourceRows, device: torch.device) -> Said:
    """What the head says of the test rows of a source, with targets over the run's classes."""
    own = len(rows.records.class_names)
    logits, targets = [], []
    for part in torch.split(rows.test, 256):
        batch = rows.records.batch(part, 0)
        found = multi_label.targets_of(batch, own)
        wide = torch.zeros(len(part), head.num_classes, dtype=torch.bool)
        wide[:, rows.to_run] = found
        logits.append(say(head, rows.records, part, device).logits)
        targets.append(wide)
    return Said(torch.cat(logits), torch.cat(targets))


def named(values: Json, class_names: list[str]) -> Json:
    """Metrics with the classes by name."""
    f1: list[float] = values["per_class_f1"]
    return {
        **named_classes(values, class_names),
        "per_class_f1": dict(zip(class_names, f1, strict=True)),
    }


def probabilities(features: Json, logits: Tensor) -> Tensor | None:
    """Probabilities [B, K] of an adapter for several labels per image; None of another one."""
    kept = features.get("multi_label")
    if kept is None:
        return None
    return Sigmoid.from_json(kept)(logits.double()).sigmoid()
