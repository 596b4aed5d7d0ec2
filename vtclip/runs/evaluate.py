# SPDX-License-Identifier: Apache-2.0
"""`vtclip.evaluate`: the metrics of a finished run, and those that a new run writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from vtclip.data.records import Records
from vtclip.data.sets import SetSource, as_source
from vtclip.data.splits import Split
from vtclip.files import Json
from vtclip.heads import Head
from vtclip.machine import choose_device, set_threads
from vtclip.runs.adapter import Adapter, load_adapter
from vtclip.runs.base_to_new import evaluate_base_to_new
from vtclip.runs.result import Run, named_classes, unreadable
from vtclip.runs.sources import RunSources, SourceRows, evaluate_sources, metrics_over
from vtclip.runs.ttt_report import check_ttt, ttt_report
from vtclip.train import engine, metrics
from vtclip.train.fit_head import calibrate
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
    progress: bool = False,
) -> Json:
    """The metrics of a run's adapter: on its own test images, or on all images of another source.

    Where `source` holds the images the run was fitted on, only its test images are counted.
    data: the folder of the field's data sets, where `source` is the name of one: its test list is
        counted, over its own classes where the run has more.
    ttt: train on each unlabelled image first (vtclip.train.ttt), which needs a folder of images;
        "ttt" of the result then holds the metrics with it and those of averaged views without it.
    """
    run = run if isinstance(run, Run) else Run.load(run)
    where = choose_device(device)
    set_threads(threads)
    adapter = load_adapter(run.folder, device=where)
    sources = RunSources(run, adapter, where, cache_dir=cache_dir, progress=progress)
    if "sources" in run.result:
        if ttt is not None:
            raise ValueError("ttt: an extended run is evaluated without it")
        return evaluate_sources(sources, source, data)
    config = run.result["config"]
    if source is None:
        target = as_source(config["source"], data or config.get("data"))
    else:
        target = as_source(source, data)
    if ttt is not None:
        check_ttt(adapter, target, base_to_new=bool(config.get("base_to_new")))
    if config.get("base_to_new"):
        records = sources.opened(target)
        return evaluate_base_to_new(adapter, run.result, records, target, device=where)
    rows = sources.rows(data)[0] if source is None else sources.other(target)
    report = {
        "method": run.result["method"],
        "source": target.name,
        **_metrics(adapter, rows, where, all_classes=not isinstance(target, SetSource)),
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


def _metrics(
    adapter: Adapter, rows: SourceRows, device: torch.device, *, all_classes: bool
) -> Json:
    """Metrics over all classes of the run, or among the classes of the records alone."""
    names = adapter.class_names
    if all_classes:
        return metrics_over(adapter.head, [rows], names, adapter.temperature, device)
    logits, label = engine.all_logits(adapter.head, rows.records, rows.test, device=device)
    values = metrics.all_metrics(logits[:, rows.to_run], label, adapter.temperature)
    return named_classes(values, rows.records.class_names)


def evaluate_both(
    decisions: Mapping[str, tuple[Head, Records]], split: Split, device: torch.device
) -> dict[str, Json]:
    """Each head on the test images of its records, at the temperature that validation gives it."""
    values = {}
    for name, (head, records) in decisions.items():
        T = calibrate(head, records, split.val, device)
        row = engine.head_metrics(head, records, split.test, device=device, temperature=T)
        values[name] = named_classes(row, records.class_names)
    return values
