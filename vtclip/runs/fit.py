# SPDX-License-Identifier: Apache-2.0
"""`vtclip.fit`: from labelled images to a run folder with numbers.

The request is checked; the records are opened; rows of them are drawn; the head is trained; both
decisions are evaluated; the run is written. Each step takes what the one before returned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vtclip.clip.texts import by_class_name, read_templates
from vtclip.data.class_names import as_class_names
from vtclip.data.records import Records
from vtclip.data.sets import as_source
from vtclip.data.sources import open_records
from vtclip.files import Json
from vtclip.heads import HEADS, Head
from vtclip.heads.config import FitConfig
from vtclip.machine import Stopwatch, choose_device, set_threads
from vtclip.runs import folder as run_files
from vtclip.runs import multi_label
from vtclip.runs.adapter import Adapter, features_of, save_adapter
from vtclip.runs.base_to_new import base_and_new, new_class_metrics
from vtclip.runs.duplicates import check_duplicates
from vtclip.runs.evaluate import evaluate_both
from vtclip.runs.folder import RunRows
from vtclip.runs.request import FitRequest
from vtclip.runs.result import Run
from vtclip.train.auto import fit_auto
from vtclip.train.calibration import Decisions, Judged, calibration_of, unseen
from vtclip.train.checkpoint import Checkpoint
from vtclip.train.fit_head import choose_by, fit_head
from vtclip.train.methods import check_text_encoder, zero_shot_head
from vtclip.train.pseudo_labels import pseudo_labelled, pseudo_report, unlabelled_split
from vtclip.train.rows import split_rows, usual_shots


def fit(
    source: object,
    *,
    data: str | Path | None = None,
    records: Records | None = None,
    method: str | None = None,
    shots: int | None = None,
    seed: int = 1,
    model: str = "demo",
    spatial: str | None = None,
    prompt: str | None = None,
    templates: Sequence[Any] | None = None,
    class_names: Mapping[str, str] | str | Path | None = None,
    follow_links: bool = False,
    test_fraction: float = 0.5,
    augment_passes: int = 0,
    encoder_batch_size: int = 64,
    train_encoders: bool = False,
    base_to_new: bool = False,
    pseudo_labels: bool = False,
    overrides: Mapping[str, object] | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    device: str | torch.device | None = None,
    threads: int | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = False,
) -> Run:
    """Adapt a frozen CLIP to `source` with `shots` images per class, and evaluate it once.

    source: a folder of `class_name/*.jpg`, a list of files (.csv, .jsonl, .parquet, ...), a saved
        or an open data set (vtclip.data.image_datasets), a FeatureSet folder, an .npz table of
        features, or, with `data`, the name of a data set.
    data: the folder of the field's data sets (vtclip.data.sets): the official lists split them, and
        shots are drawn as published. Nothing is written below it.
    records: the rows of `source`, where they are open already (`vtclip.open_source` with the same
        options; of a data set with the same shots and seed). `source` is then only their name, and
        where `evaluate` looks for them.
    method: a name of vtclip.heads.HEADS. None fits several and keeps what validation images prefer
        (vtclip.train.auto); with train_encoders or base_to_new, which that cannot do, it is "rada".
    templates: prompts with {} for the class name, or sentences per class; a name, a file, or their
        content (vtclip.clip.texts). The run keeps the content.
    class_names: from the ids that the source gives its classes to their names, or the file that
        holds them (vtclip.data.class_names). The run keeps the names.
    shots: training images per class; None takes 16, or the next of 8, 4, 2, 1 that every class has
        beyond its test share. A named number is never lowered.
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
        adapter.safetensors, adapter_config.json, result.json, log.jsonl, predictions.csv and
        confusion.png (vtclip.runs.predictions).

    The zero-shot decision is evaluated on the same test images in the same run.
    """
    if method is None:
        method = "rada" if train_encoders or base_to_new else "auto"
    names = as_class_names(class_names)
    request = FitRequest(
        source=as_source(source, data), method=method, shots=shots, seed=seed, model=model,
        spatial=spatial, prompt=prompt, templates=by_class_name(read_templates(templates), names),
        class_names=names, follow_links=follow_links,
        test_fraction=test_fraction, augment_passes=augment_passes,
        encoder_batch_size=encoder_batch_size,
        train_encoders=train_encoders, base_to_new=base_to_new,
        pseudo_labels=pseudo_labels, overrides=overrides or {}, out=out, overwrite=overwrite,
        resume=resume, device=choose_device(device), threads=threads, cache_dir=cache_dir,
        progress=progress,
    )  # fmt: skip
    return fit_request(request, records)


def fit_request(request: FitRequest, records: Records | None = None) -> Run:
    """The run of a request; see `fit` for `records`."""
    set_threads(request.threads)
    if records is None:
        multi_label.check_request(request)
    elif records.targets is not None:
        multi_label.check_method(request.method, str(request.source))
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
            run_files.check_run_folder(run_files.run_folder(request, 0), request)
        records = open_or_take(request, records, watch)
        base = base_and_new(records)[0] if request.base_to_new else records
        shots = usual_shots(base, request.test_fraction)
    folder, settings = run_files.run_folder(request, shots), request.settings(shots)
    run_files.check_run_folder(folder, request)
    config = request.as_config(shots, settings)
    with run_files.claimed(folder):
        if run_files.can_return_finished(folder, request):
            return run_files.finished_run(folder, request, shots, config)
        rows = draw_rows(request, open_or_take(request, records, watch), shots)
        head, candidates, judged_val = train(request, rows, settings, folder, watch)
        if rows.records.targets is not None:
            return fit_several(request, rows, head, config, folder, watch)
        values, judged = evaluate_all(request, rows, head, watch)
        values |= candidates
        if request.pseudo_labels:
            values |= pseudo_report(rows.training, rows.records, rows.split)
        names, temperature = rows.records.class_names, values["adapted"]["temperature"]
        features = features_of(rows.records, request.model)
        calibration = calibration_of(
            judged_val or judged.val, temperature, rows.records.label, rows.split.test
        )
        digest = save_adapter(folder, Adapter(head, names, temperature, features, calibration))
        digests = {"adapter": digest}
        return run_files.write_run(folder, request, rows, config, values, watch, digests, judged)


def fit_several(
    request: FitRequest,
    rows: RunRows,
    head: Head,
    config: Json,
    folder: Path,
    watch: Stopwatch,
) -> Run:
    """Evaluate and write the run of a fitted head over images of more than one class."""
    with watch.stage("evaluate"):
        values, kept = multi_label.evaluate_heads(request, rows, head)
    adapter = multi_label.adapter_of(request, rows.records, head, kept)
    digests = {"adapter": save_adapter(folder, adapter)}
    return run_files.write_run(
        folder, request, rows, config, values, watch, digests, None, multi_label=True
    )


def open_or_take(request: FitRequest, records: Records | None, watch: Stopwatch) -> Records:
    """The records of the request's source, unless they are open already."""
    with watch.stage("features"):
        if records is not None:
            return records
        return open_records(request.source, request.features, request.draw)


def draw_rows(request: FitRequest, records: Records, shots: int) -> RunRows:
    seed, fraction, new = request.seed, request.test_fraction, None
    strict = bool(getattr(request, "strict", False))
    if request.base_to_new:
        records, new = base_and_new(records)
    check_text_encoder(request.method, records)
    if request.pseudo_labels:
        pool = unlabelled_split(records, seed, fraction)
        training, split = pseudo_labelled(records, pool, shots, request.device)
        split, left_out = check_duplicates(records, split, strict)
        return RunRows(records, split, shots, training, left_out=left_out)
    learns = HEADS[request.method].learns
    split = split_rows(records, learns, shots, seed, fraction)
    split, left_out = check_duplicates(records, split, strict, learns=learns)
    return RunRows(records, split, shots, records, new, left_out)


def train(
    request: FitRequest, rows: RunRows, settings: FitConfig, folder: Path, watch: Stopwatch
) -> tuple[Head, Json, Decisions | None]:
    """The fitted head; where several methods were fitted, what was said of each; and, of a
    head that chose by validation images, its decisions on them as if it had not seen them."""
    config = request.as_config(rows.shots, settings)
    identity = request.identity(rows.records, rows.split, rows.shots, config)
    with watch.stage("train"):
        run = run_files.training_run(request, Checkpoint(folder / run_files.CHECKPOINT, identity))
        if request.method == "auto":
            auto, candidates, judged = fit_auto(rows.training, rows.split, rows.shots, run)
            return auto, {"candidates": candidates}, judged
        records, val = rows.training, rows.split.val
        head = fit_head(request.method, records, rows.split, settings, run, choose=False)
        judged = unseen(head, records, val, request.device)
        choose_by(head, records, val, request.device)
        return head, {}, judged


def evaluate_all(
    request: FitRequest, rows: RunRows, head: Head, watch: Stopwatch
) -> tuple[Json, Judged]:
    """Metrics of zero-shot and of the head; of a base-to-new run for both halves of the classes.

    With them the head's decisions on the images of its own classes.
    """
    device = request.device
    heads = {"zero_shot": zero_shot_head(rows.records, device), "adapted": head}
    with watch.stage("evaluate"):
        decisions = {name: (decision, rows.records) for name, decision in heads.items()}
        values, judged = evaluate_both(decisions, rows.split, device)
        if rows.new is None:
            return values, judged
        seed, fraction = request.seed, request.test_fraction
        new = new_class_metrics(values, heads, rows.new, seed, fraction, device)
        return values | new, judged
