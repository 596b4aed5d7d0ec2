# SPDX-License-Identifier: Apache-2.0
"""`vtclip.fit`: from labelled images to a run folder with numbers.

The request is checked; the records are opened; rows of them are drawn; the head is trained; both
decisions are evaluated; the run is written. Each step takes what the one before returned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vtclip.data.records import Records
from vtclip.data.sets import SetSource, as_source
from vtclip.data.sources import open_records
from vtclip.data.splits import Split
from vtclip.files import Json, only_writer
from vtclip.heads import Head
from vtclip.heads.config import FitConfig
from vtclip.machine import Stopwatch, choose_device, set_threads
from vtclip.runs import result
from vtclip.runs.adapter import Adapter, features_of, save_adapter
from vtclip.runs.base_to_new import base_and_new, with_new
from vtclip.runs.evaluate import evaluate_both, zero_shot_head
from vtclip.runs.folder import (
    CHECKPOINT,
    LOG,
    can_return_finished,
    check_run_folder,
    finished_run,
    line_log,
    removed_if_empty,
    run_folder,
)
from vtclip.runs.request import FitRequest
from vtclip.runs.result import Run
from vtclip.train.auto import fit_auto
from vtclip.train.checkpoint import Checkpoint
from vtclip.train.fit_head import fit_head
from vtclip.train.methods import check_text_encoder, takes_images
from vtclip.train.pseudo_labels import pseudo_labelled, pseudo_report, unlabelled_split
from vtclip.train.rows import split_rows, usual_shots


def fit(
    source: str | Path | SetSource,
    *,
    data: str | Path | None = None,
    records: Records | None = None,
    method: str | None = None,
    shots: int | None = None,
    seed: int = 1,
    model: str = "demo",
    spatial: str | None = None,
    prompt: str | None = None,
    templates: Sequence[str] | None = None,
    test_fraction: float = 0.5,
    augment_passes: int = 0,
    train_encoders: bool = False,
    base_to_new: bool = False,
    pseudo_labels: bool = False,
    overrides: Mapping[str, Any] | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    device: str | torch.device | None = None,
    threads: int | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = False,
) -> Run:
    """Adapt a frozen CLIP to `source` with `shots` images per class, and evaluate it once.

    source: a folder of `class_name/*.jpg`, a FeatureSet folder, an .npz table of features, or,
        with `data`, the name of a data set.
    data: the folder of the field's data sets (vtclip.data.sets): the official lists split them, and
        shots are drawn as published. Nothing is written below it.
    records: the rows of `source`, where they are open already (`vtclip.open_source` with the same
        options; of a data set with the same shots and seed). `source` is then only their name, and
        where `evaluate` looks for them.
    method: a name of vtclip.heads.HEADS. None fits several and keeps what validation images prefer
        (vtclip.train.auto); with train_encoders or base_to_new, which that cannot do, it is "rada".
    shots: training images per class; None takes 16, or the next of 8, 4, 2, 1 that every class has
        besides the test share. A named number is never lowered.
    train_encoders: train both towers together with the head (method "rada", an image folder; see
        vtclip.train.finetune). The run then also holds encoders.safetensors.
    base_to_new: train on the first half of the classes, test on either half
        (vtclip.runs.base_to_new).
    pseudo_labels: train on `shots` images per class that zero-shot names surest, not on labelled
        ones (vtclip.train.pseudo_labels); without validation images, and so without a temperature.
    overrides: fields of `FitConfig` that replace the recipe's (epochs, lr, optimizer, ...; `head`:
        options of the head, such as {"adapters": True}, which are added to the recipe's), with
        train_encoders of `FinetuneConfig`.
    out: the run's folder; by default runs/SOURCE-METHOD-SHOTSshot-seedSEED. It ends up with
        adapter.safetensors, adapter_config.json, result.json and log.jsonl.

    The zero-shot decision is evaluated on the same test images in the same run.
    """
    if method is None:
        method = "rada" if train_encoders or base_to_new else "auto"
    request = FitRequest(
        source=as_source(source, data), method=method, shots=shots, seed=seed, model=model,
        spatial=spatial, prompt=prompt, templates=templates, test_fraction=test_fraction,
        augment_passes=augment_passes, train_encoders=train_encoders, base_to_new=base_to_new,
        pseudo_labels=pseudo_labels, overrides=overrides or {}, out=out, overwrite=overwrite,
        resume=resume, device=choose_device(device), threads=threads, cache_dir=cache_dir,
        progress=progress,
    )  # fmt: skip
    return fit_request(request, records)


def fit_request(request: FitRequest, records: Records | None = None) -> Run:
    """The run of a request; see `fit` for `records`."""
    set_threads(request.threads)
    if request.train_encoders:
        from vtclip.runs.fit_encoders import fit_encoders

        if records is not None:
            raise ValueError(f"train_encoders: records must be left out, got {records!r}")
        return fit_encoders(request)
    if records is not None and not records.has_spatial and request.features.need_spatial:
        raise ValueError(
            f"method {request.method} needs spatial features, which records do not have"
        )
    watch, shots = Stopwatch(request.device), request.known_shots
    if shots is None:  # the images decide it, and it names the run
        if request.out is not None:
            check_run_folder(run_folder(request, 0), request)
        records = opened(request, records, watch)
        base = base_and_new(records)[0] if request.base_to_new else records
        shots = usual_shots(base, request.test_fraction)
    folder, settings = run_folder(request, shots), request.settings(shots)
    check_run_folder(folder, request)
    config = request.as_config(shots, settings)
    with removed_if_empty(folder), only_writer(folder):
        if can_return_finished(folder, request):
            return finished_run(folder, request, shots, config)
        rows = draw_rows(request, opened(request, records, watch), shots)
        head, candidates = train(request, rows, settings, folder, watch)
        values = evaluate_all(request, rows, head, watch)
        return write_run(request, rows, config, head, {**values, **candidates}, folder, watch)


@dataclass(frozen=True)
class RunRows:
    """What one run trains and tests on.

    training: the records with the labels that training sees, which pseudo-labels replace.
    new: records of the classes that are never trained on, of a base-to-new run.
    """

    records: Records
    training: Records
    split: Split
    shots: int
    new: Records | None = None


def opened(request: FitRequest, records: Records | None, watch: Stopwatch) -> Records:
    """The records of the request's source, unless they are open already."""
    with watch.stage("features"):
        if records is not None:
            return records
        return open_records(request.source, request.features, request.draw)


def draw_rows(request: FitRequest, records: Records, shots: int) -> RunRows:
    seed, fraction, new = request.seed, request.test_fraction, None
    if request.base_to_new:
        records, new = base_and_new(records)
    check_text_encoder(request.method, records)
    if request.pseudo_labels:
        pool = unlabelled_split(records, seed, fraction)
        training, split = pseudo_labelled(records, pool, shots, request.device)
        return RunRows(records, training, split, shots)
    split = split_rows(records, takes_images(request.method), shots, seed, fraction)
    return RunRows(records, records, split, shots, new)


def train(
    request: FitRequest, rows: RunRows, settings: FitConfig, folder: Path, watch: Stopwatch
) -> tuple[Head, Json]:
    """The fitted head and, where several methods were fitted, what was said of each."""
    identity = {
        "method": request.method,
        "shots": rows.shots,
        "seed": request.seed,
        "config": request.as_config(rows.shots, settings)["fit"],
        "split": rows.split.digest,
        "pseudo_labels": request.pseudo_labels,
        "digests": rows.records.info.get("digests", {}),
        "classes": rows.records.class_names,
    }
    checkpoint = Checkpoint(folder / CHECKPOINT, identity)
    resume = request.resume and checkpoint.path.is_file()
    with watch.stage("train"), line_log(folder / LOG, append=resume) as log:
        common: Json = {"device": request.device, "seed": request.seed, "log": log}
        common["progress"] = request.progress
        if request.method == "auto":
            head, candidates = fit_auto(rows.training, rows.split, rows.shots, **common)
            return head, {"candidates": candidates}
        return fit_head(
            request.method,
            rows.training,
            rows.split,
            settings,
            checkpoint=checkpoint,
            resume=resume,
            **common,
        ), {}


def evaluate_all(request: FitRequest, rows: RunRows, head: Head, watch: Stopwatch) -> Json:
    """Metrics of zero-shot and of the head; of a base-to-new run for both halves of the classes."""
    device = request.device
    heads = {"zero_shot": zero_shot_head(rows.records, device), "adapted": head}
    with watch.stage("evaluate"):
        tables = {name: (one, rows.records) for name, one in heads.items()}
        values: Json = evaluate_both(tables, rows.split, device)
        if rows.new is not None:
            fraction = request.test_fraction
            values |= with_new(values, heads, rows.new, request.seed, fraction, device)
    return values


def write_run(
    request: FitRequest,
    rows: RunRows,
    config: Json,
    head: Head,
    values: Json,
    folder: Path,
    watch: Stopwatch,
) -> Run:
    records, split = rows.records, rows.split
    temperature = values["adapted"]["temperature"]
    features = features_of(records, request.model)
    digest = save_adapter(folder, Adapter(head, records.class_names, temperature, features))
    pseudo = pseudo_report(rows.training, records, split) if request.pseudo_labels else {}
    learns = takes_images(request.method)
    contents = result.make(
        {**values, **pseudo},
        watch,
        method=request.method,
        source=request.source.name,
        shots=rows.shots if learns or len(split.val) else 0,
        seed=request.seed,
        config=config,
        digests={**records.info.get("digests", {}), "split": split.digest, "adapter": digest},
        split=split.digest,
        classes=records.class_names,
        images=split.counts(),
        unreadable=result.unreadable(records),
    )
    run = Run.write(folder, contents)
    (folder / CHECKPOINT).unlink(missing_ok=True)
    return run
