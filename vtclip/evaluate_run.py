# SPDX-License-Identifier: Apache-2.0
"""`vtclip.evaluate`: the metrics of a finished run, and those that a new run writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from vtclip import engine, metrics
from vtclip.adapter import Adapter, check_features, load_adapter
from vtclip.base_to_new import evaluate_again
from vtclip.data.options import Draw
from vtclip.data.records import Records
from vtclip.data.sets import SetSource, as_source
from vtclip.data.sources import open_records
from vtclip.data.splits import Split
from vtclip.encoders import load_encoders
from vtclip.files import Json
from vtclip.parts import (
    RunSources,
    evaluate_sources,
    recorded_options,
    recorded_test_rows,
    run_labels,
    sources_of,
)
from vtclip.recipes import RECIPES
from vtclip.result import Run, named_classes, unreadable
from vtclip.settings import (
    build_head,
    calibrate,
    choose_device,
    set_threads,
    test_rows,
)
from vtclip.ttt import TTT
from vtclip.ttt_report import check_ttt, ttt_report


def evaluate(
    run: str | Path | Run,
    source: str | Path | SetSource | None = None,
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
    ttt: train on each unlabelled image first (vtclip.ttt), which needs a folder of images; "ttt" of
        the result then holds the metrics with it and those of averaged views without it.
    """
    run = run if isinstance(run, Run) else Run.load(run)
    where = choose_device(device)
    set_threads(threads)
    adapter = load_adapter(run.folder, device=where)
    if "sources" in run.result:
        if ttt is not None:
            raise ValueError("ttt: an extended run is evaluated without it")
        sources = RunSources(run, adapter, where, cache_dir=cache_dir, progress=progress)
        return evaluate_sources(sources, source, data)
    config = run.result["config"]
    if source is None:
        target = as_source(config["source"], data or config.get("data"))
    else:
        target = as_source(source, data)
    if ttt is not None:
        _check_ttt(run, adapter, target)
    tuned = adapter.features.get("encoders") is not None
    options = recorded_options(
        config,
        model=load_encoders(run.folder, adapter, None, where) if tuned else config["model"],
        need_spatial=bool(adapter.head.needs_spatial),
        cache_dir=cache_dir,
        device=str(where),
        progress=progress,
    )
    records = open_records(target, options, _draw_of(run, target))
    check_features(adapter, records)
    if config.get("base_to_new"):
        return evaluate_again(adapter, run.result, records, target, device=where)
    index = _rows_to_count(run, records, target, named=source is not None)
    report = {
        "method": run.result["method"],
        "source": target.name,
        **_metrics(adapter, records, index, where, all_classes=not isinstance(target, SetSource)),
        "test": {"images": len(index), "unreadable": unreadable(records)},
    }
    if ttt is None or isinstance(target, SetSource):
        return report
    names, label = [records.names[row] for row in index.tolist()], records.label[index]
    label = run_labels(adapter, records)[label]
    rows = ttt_report(
        adapter, options.model, target, names, label, ttt, device=where, progress=progress
    )
    return {**report, "ttt": rows}


def _check_ttt(run: Run, adapter: Adapter, target: Path | SetSource) -> None:
    if isinstance(target, SetSource):
        raise ValueError(f"ttt: source must be a folder of images, got data set {target}")
    check_ttt(adapter, target)
    if run.result["config"].get("base_to_new"):
        raise ValueError("ttt: a base-to-new run is evaluated without it")


def _draw_of(run: Run, target: Path | SetSource) -> Draw:
    """The run's own draw where `target` is its data set; of another set, the test list alone."""
    result, config = run.result, run.result["config"]
    if config.get("data") is None or target.name != config["source"]:
        return Draw(0, result["seed"])
    return Draw(result["shots"], result["seed"], pool=bool(config.get("pseudo_labels")))


def _rows_to_count(run: Run, records: Records, target: Path | SetSource, *, named: bool) -> Tensor:
    """The run's test rows where these are its images, else all of a source that was named."""
    entry = sources_of(run)[0]
    if records.info.get("digests", {}).get("images") == entry["images"]:
        return recorded_test_rows(run, entry, records)
    if not named:
        raise ValueError(f"{target}: its images have changed since the run was fitted")
    return test_rows(records)


def _metrics(
    adapter: Adapter, records: Records, index: Tensor, device: torch.device, *, all_classes: bool
) -> Json:
    """Metrics over all classes of the run, or among the classes of the records alone."""
    to_run, names = run_labels(adapter, records), adapter.class_names
    logits, label = engine.all_logits(adapter.head, records, index, device=device)
    if all_classes:
        label = to_run[label]
    else:
        logits, names = logits[:, to_run], records.class_names
    return named_classes(metrics.report(logits, label, adapter.temperature), names)


def zero_shot_head(records: Records, device: torch.device) -> nn.Module:
    return build_head("zeroshot", records, RECIPES["zeroshot"](0), device)


def evaluate_both(
    decisions: Mapping[str, tuple[nn.Module, Records]], split: Split, device: torch.device
) -> dict[str, Json]:
    """Each head on the test images of its records, at the temperature that validation gives it."""
    values = {}
    for name, (head, records) in decisions.items():
        rows = engine.TrainingRows(records, split.train, split.val)
        temperature = calibrate(head, rows, split.val, device)
        found = engine.evaluate(head, records, split.test, device=device, temperature=temperature)
        values[name] = named_classes(dict(found), records.class_names)
    return values
