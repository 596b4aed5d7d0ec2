# SPDX-License-Identifier: Apache-2.0
"""`vtclip.evaluate`: the metrics of a finished run, and those that a new run writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from vtclip.data.records import Records
from vtclip.data.sets import SetSource, as_source, source_name
from vtclip.data.splits import Split
from vtclip.files import Json, write_atomic
from vtclip.heads import Head
from vtclip.machine import choose_device, set_threads
from vtclip.names import option
from vtclip.runs import multi_label
from vtclip.runs.adapter import Adapter, load_adapter
from vtclip.runs.base_to_new import evaluate_base_to_new
from vtclip.runs.predictions import TABLE_SIGN, Part, confusion_of, predictions_csv
from vtclip.runs.result import Run, named_classes
from vtclip.runs.sources import RunSources, SourceRows, evaluate_sources, test_report
from vtclip.runs.targets import check_target
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
    model: str | Path | None = None,
    follow_links: bool = False,
    encoder_batch_size: int = 64,
    device: str | torch.device | None = None,
    threads: int | None = None,
    cache_dir: str | Path | None = None,
    ttt: TTT | None = None,
    predictions: str | Path | None = None,
    progress: bool = False,
) -> Json:
    """The metrics of a run's adapter: on its own test images, or on those of another source.

    Images are known by content. Without `source` the run's test images that are still there count,
    so that the numbers compare with the run's; a run fitted with `final` has none. Of any `source`
    all images count that the run neither trained nor validated on, whatever came to it or went
    since; of one that says itself which images test, only those. "left_out" of the result says how
    many do not count, and why (vtclip.runs.counted). The test list of a data set is counted whole.

    data: the folder of the field's data sets, where `source` is the name of one: its test list is
        counted, over its own classes where the run has more.
    model: another place of the encoder's weights (see vtclip.clip).
    follow_links: enter folders that are links, too, as the run itself may have done.
    ttt: train on each unlabelled image first (vtclip.train.ttt), which needs a folder of images;
        "ttt" of the result then holds the metrics with it and those of averaged views without it.
    predictions: write a line for each counted image there (vtclip.runs.predictions), replacing an
        earlier such table, but no file of a run and nothing else.

    "confusion" of the result counts these images by true class and prediction.
    """
    if predictions is not None:
        check_target("predictions", Path(predictions).expanduser(), TABLE_SIGN)
    run = run if isinstance(run, Run) else Run.load(run)
    _check_final(run, source, data)
    where = choose_device(device)
    set_threads(threads)
    adapter = load_adapter(run.folder, device=where, result=run.result)
    sources = RunSources(
        run, adapter, where, model, cache_dir, progress, follow_links, encoder_batch_size
    )
    config = run.result["config"]
    if predictions is not None:
        _check_kind(run.result, ttt)
    if "sources" in run.result:
        if ttt is not None:
            raise ValueError(f"{option('ttt')}: an extended run is evaluated without it")
        return evaluate_sources(sources, source, data)
    target = sources.own_source(data) if source is None else as_source(source, data)
    if run.result.get("multi_label"):
        refused = {"ttt": ttt, "predictions": predictions}
        chosen = None if source is None else target
        return multi_label.evaluate_run(run, sources, chosen, data, where, refused)
    if ttt is not None:
        check_ttt(adapter, target, base_to_new=bool(config.get("base_to_new")))
    rows = sources.rows(data)[0] if source is None else sources.other(target)
    test = test_report([rows], str(target))
    if config.get("base_to_new"):
        counted = rows.records.select(rows.test)
        found = evaluate_base_to_new(adapter, run.result, counted, target, device=where)
        return {**found, **test}
    report = {
        "method": run.result["method"],
        "source": source_name(target),
        **_metrics(adapter, rows, where, not isinstance(target, SetSource), predictions),
        **test,
    }
    if ttt is None or isinstance(target, SetSource):
        return report
    names = [rows.records.names[row] for row in rows.test.tolist()]
    label = rows.to_run[rows.records.label[rows.test]]
    clip, files = sources.clip(), sources.files(target)[0]
    return {
        **report,
        "ttt": ttt_report(adapter, clip, files, names, label, ttt, progress=progress),
    }


def _check_final(run: Run, source: object, data: str | Path | None) -> None:
    """Refuse the own test images, or the own data set, of a run that trained on them at last."""
    config = run.result["config"]
    if not config.get("final"):
        return
    own = source is None
    if not own and data is not None:
        target = as_source(source, data)
        own = isinstance(target, SetSource) and target.name == config["source"]
    if own:
        raise ValueError(
            f"evaluate: {run.folder} was fitted with {option('final')}, so that its adapter has "
            f"trained on its test images too; give other images as {option('source')}"
        )


def _check_kind(result: Json, ttt: TTT | None) -> None:
    """Refuse a table of predictions for what is not one list of images under one head."""
    kinds = {
        "an extended run": "sources" in result,
        "a base-to-new run": bool(result["config"].get("base_to_new")),
        "test-time training": ttt is not None,
    }
    for kind, is_so in kinds.items():
        if is_so:
            raise ValueError(f"{option('predictions')}: {kind} has no table of predictions")


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
    decisions: Mapping[str, tuple[Head, Records]],
    split: Split,
    device: torch.device,
    *,
    first: Mapping[str, Head] | None = None,
) -> tuple[dict[str, Json], Judged]:
    """Each head on the test images of its records, at the temperature that validation gives it.

    With the metrics come the decisions of the last head, each of whose rows is read once.
    first: by name the heads that validation images are shown to, where those in `decisions` have
        trained on these images.
    """
    values: dict[str, Json] = {}
    kept: list[tuple[Tensor, Tensor]] = []
    val = None
    for name, (head, records) in decisions.items():
        if len(split.val):
            judge = (first or {}).get(name, head)
            val = decide(judge, TrainingRows(records, split.val), split.val, device)
        T = None if val is None else metrics.fit_temperature(val.logits, val.label)
        row = engine.head_metrics(
            head, records, split.test, device=device, temperature=T, keep=kept
        )
        values[name] = named_classes(row, records.class_names)
        del kept[:-1]
    logits, label = kept[-1]
    return values, Judged(val, Decisions(logits, logits, label))
