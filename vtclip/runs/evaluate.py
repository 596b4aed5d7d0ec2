# SPDX-License-Identifier: Apache-2.0
"""`vtclip.evaluate`: the metrics of a finished run, and those that a new run writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from vtclip.data.records import Records
from vtclip.data.sets import SetSource, as_source
from vtclip.data.splits import Split
from vtclip.files import Json, write_atomic
from vtclip.heads import Head
from vtclip.machine import choose_device, set_threads
from vtclip.runs import multi_label
from vtclip.runs.adapter import Adapter, load_adapter
from vtclip.runs.base_to_new import evaluate_base_to_new
from vtclip.runs.predictions import Part, check_table, confusion_of, predictions_csv
from vtclip.runs.result import Run, named_classes, unreadable
from vtclip.runs.sources import RunSources, SourceRows, evaluate_sources
from vtclip.runs.ttt_report import check_ttt, ttt_report
from vtclip.train import engine, metrics
from vtclip.train.calibration import Decisions, Judged, decide
from vtclip.train.rows import TrainingRows
from vtclip.train.ttt import TTT


def evaluate(
    run: str | Path | Run,
    source: object = None,
    *,
    data: str | Path | None = None,
    device: str | torch.device | None = None,
    threads: int | None = None,
    cache_dir: str | Path | None = None,
    ttt: TTT | None = None,
    predictions: str | Path | None = None,
    progress: bool = False,
) -> Json:
    """The metrics of a run's adapter: on its own test images, or on all images of another source.

    Where `source` holds the images the run was fitted on, only its test images are counted.
    data: the folder of the field's data sets, where `source` is the name of one: its test list is
        counted, over its own classes where the run has more.
    ttt: train on each unlabelled image first (vtclip.train.ttt), which needs a folder of images;
        "ttt" of the result then holds the metrics with it and those of averaged views without it.
    predictions: write a line for each counted image there (vtclip.runs.predictions), replacing a
        file of that name.

    "confusion" of the result counts these images by true class and prediction.
    """
    if predictions is not None:
        check_table(predictions)
    run = run if isinstance(run, Run) else Run.load(run)
    where = choose_device(device)
    set_threads(threads)
    adapter = load_adapter(run.folder, device=where)
    sources = RunSources(run, adapter, where, cache_dir=cache_dir, progress=progress)
    config = run.result["config"]
    if predictions is not None:
        _check_kind(run.result, ttt)
    if "sources" in run.result:
        if ttt is not None:
            raise ValueError("ttt: an extended run is evaluated without it")
        return evaluate_sources(sources, source, data)
    if source is None:
        target = as_source(config["source"], data or config.get("data"))
    else:
        target = as_source(source, data)
    if run.result.get("multi_label"):
        refused = {"ttt": ttt, "predictions": predictions}
        chosen = None if source is None else target
        return multi_label.evaluate_run(run, sources, chosen, data, where, refused)
    if ttt is not None:
        check_ttt(adapter, target, base_to_new=bool(config.get("base_to_new")))
    if config.get("base_to_new"):
        records = sources.opened(target)
        return evaluate_base_to_new(adapter, run.result, records, target, device=where)
    rows = sources.rows(data)[0] if source is None else sources.other(target)
    report = {
        "method": run.result["method"],
        "source": target.name,
        **_metrics(adapter, rows, where, not isinstance(target, SetSource), predictions),
        "test": {"images": len(rows.test), "unreadable": unreadable(rows.records)},
    }
    if ttt is None or isinstance(target, SetSource):
        return report
    names = [rows.records.names[row] for row in rows.test.tolist()]
    label = rows.to_run[rows.records.label[rows.test]]
    clip = sources.clip()
    return {
        **report,
        "ttt": ttt_report(adapter, clip, target, names, label, ttt, progress=progress),
    }


def _check_kind(result: Json, ttt: TTT | None) -> None:
    """Refuse a table of predictions for what is not one list of images under one head."""
    kinds = {
        "an extended run": "sources" in result,
        "a base-to-new run": bool(result["config"].get("base_to_new")),
        "test-time training": ttt is not None,
    }
    for kind, is_so in kinds.items():
        if is_so:
            raise ValueError(f"predictions: {kind} has no table of predictions")


def _metrics(
    adapter: Adapter,
    rows: SourceRows,
    device: torch.device,
    all_classes: bool,
    predictions: str | Path | None,
) -> Json:
    """Metrics over all classes of the run, or among the classes of the records alone.

    The predictions, if asked for, are written to that file.
    """
    decisions = decide(adapter.head, rows.records, rows.test, device)
    names = adapter.class_names if all_classes else rows.records.class_names
    if all_classes:
        logits, label = decisions.logits, rows.to_run[decisions.label]
    else:
        logits, label = decisions.logits[:, rows.to_run], decisions.label
    values = metrics.all_metrics(logits, label, adapter.temperature)
    confusion = confusion_of(metrics.confusion(logits, label), names)
    if predictions is not None:
        files = [rows.records.names[row] for row in rows.test.tolist()]
        part = Part("test", files, Decisions(logits, logits, label))
        table = predictions_csv([part], names, adapter.temperature)
        write_atomic(Path(predictions).expanduser(), table)
    return {**named_classes(values, names), "confusion": confusion}


def evaluate_both(
    decisions: Mapping[str, tuple[Head, Records]], split: Split, device: torch.device
) -> tuple[dict[str, Json], Judged]:
    """Each head on the test images of its records, at the temperature that validation gives it.

    With the metrics come the decisions of the last head, each of whose rows is read once.
    """
    values = {}
    for name, (head, records) in decisions.items():
        val = None
        if len(split.val):
            val = decide(head, TrainingRows(records, split.val), split.val, device)
        T = None if val is None else metrics.fit_temperature(val.logits, val.label)
        test = decide(head, records, engine.each_once(split.test), device)
        row = metrics.all_metrics(test.logits, test.label, T)
        values[name] = named_classes(row, records.class_names)
    return values, Judged(val, test)
