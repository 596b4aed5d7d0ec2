# SPDX-License-Identifier: Apache-2.0
"""`vtclip.fit`: from labelled images to a run folder with numbers.

The request is checked; the records are opened; rows of them are drawn; the head is trained; both
decisions are evaluated; the run is written. Each step takes what the one before returned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtclip.clip.texts import by_class_name, read_templates
from vtclip.data.class_names import as_class_names
from vtclip.data.image_files import ImageFiles
from vtclip.data.records import Records
from vtclip.data.sets import as_source
from vtclip.data.splits import UP_TO
from vtclip.distributed import Interrupted
from vtclip.files import Json, NewFiles
from vtclip.heads import HEADS, Head
from vtclip.heads.auto import Auto
from vtclip.heads.config import FitConfig
from vtclip.machine import Stopwatch, choose_device, set_threads
from vtclip.runs import folder as run_files
from vtclip.runs import multi_label
from vtclip.runs.adapter import Adapter, add_adapter, features_of
from vtclip.runs.base_to_new import base_and_new, new_class_metrics, new_test_split
from vtclip.runs.checks import check_before_work
from vtclip.runs.class_counts import usual_count, warn_of_few
from vtclip.runs.duplicates import check_duplicates
from vtclip.runs.evaluate import evaluate_both
from vtclip.runs.folder import RunRows
from vtclip.runs.opening import open_all
from vtclip.runs.proven import say_unless_proven
from vtclip.runs.refit import logged_as, refits
from vtclip.runs.request import LORA_METHOD, FitRequest
from vtclip.runs.result import Run
from vtclip.runs.together import Joint, as_unlabelled, decide_together, open_others
from vtclip.train.auto import fit_auto, refit_auto
from vtclip.train.calibration import Decisions, Judged, calibration_of, unseen
from vtclip.train.checkpoint import Checkpoint
from vtclip.train.fit_head import choose_by, fit_head, refit_head, refit_rows
from vtclip.train.methods import check_text_encoder, zero_shot_head
from vtclip.train.pseudo_labels import pseudo_labelled, pseudo_report, unlabelled_split
from vtclip.train.rows import split_rows


def fit(
    source: object, *, data: str | Path | None = None, records: Records | None = None,
    method: str | None = None, shots: int | str | None = None, exact_shots: bool = False,
    val: object = None, test: object = None, seed: int = 1,
    model: str = "demo", spatial: str | None = None, prompt: str | None = None,
    templates: Sequence[Any] | None = None,
    class_names: Mapping[str, str] | str | Path | None = None,
    follow_links: bool = False, test_fraction: float = 0.5, augment_passes: int = 0,
    encoder_batch_size: int = 64, train_encoders: bool = False, lora: bool = False,
    base_to_new: bool = False, pseudo_labels: bool = False, refit: bool | None = None,
    final: bool = False, unlabelled: object = None, budget: float | None = None,
    strict: bool = False, overrides: Mapping[str, object] | None = None,
    out: str | Path | None = None, overwrite: bool = False, resume: bool = False,
    device: str | torch.device | None = None, threads: int | None = None,
    cache_dir: str | Path | None = None, progress: bool = False,
    on_metrics: Callable[[Json], None] | None = None,
) -> Run:  # fmt: skip
    """Adapt a frozen CLIP to `source`, and evaluate it and zero-shot once on the same test images.

    source: a folder of `class_name/*.jpg`, a list of files (.csv, .jsonl, .parquet, ...), a saved
        or an open data set (vtclip.data.image_datasets), a FeatureSet folder, an .npz table of
        features, or, with `data`, the name of a data set.
    data: the folder of the field's data sets (vtclip.data.sets): the official lists split them, and
        shots are drawn as published. Nothing is written below it.
    records: the rows of `source`, if open already (`vtclip.open_source` with the same options; of a
        data set shots and seed, too). `source` then names them, and is where `evaluate` looks.
    method: a name of vtclip.heads.HEADS. None fits several and keeps what validation images prefer
        (vtclip.train.auto); with train_encoders or base_to_new, which that cannot do, it is "rada".
    seed: draws the shots and orders the training; 0..2^32 - 1.
    model: the CLIP that makes features of images; vtclip.clip lists how models are named.
    spatial: the kind of spatial features (vtclip.clip); None: what the method needs.
    prompt: one prompt of an .npz table with several, by name; None: their mean.
    templates: prompts with {} for the class name, or sentences per class; a name, a file, or these.
    class_names: from the ids that the source gives its classes to their names, or the file that
        holds them (vtclip.data.class_names). The run keeps the names.
    follow_links: enter folders that are links, too.
    shots: training images per class at most, 16 by default; "all" takes all that there are. A class
        that has fewer trains on those, and is shown as often as the others. Data sets are drawn as
        published, with the same number of every class.
    exact_shots: exactly `shots` of every class, as published numbers have, or a ValueError.
    val, test: sources of validation and of test images (of the kind of `source`, which then is all
        for training), opened with the same options. Their classes must be classes of `source`.
        Without `test`, `test_fraction` (0..1) of each class is set apart; without `val`, up to 4
        images of each validate (vtclip.data.splits). A folder or list with a split needs neither.
    augment_passes: random crops of every training image to train on as well.
    encoder_batch_size: images at a time through the image encoder.
    train_encoders: train both towers with the head (method "rada", an image folder), and keep them.
    lora: train low-rank adapters of both towers, below zero-shot (vtclip.train.lora; vtclip[lora]).
    base_to_new: train on the first half of the classes, test on either (vtclip.runs.base_to_new).
    pseudo_labels: train on `shots` images per class that zero-shot names surest, not on labelled
        ones (vtclip.train.pseudo_labels); without validation images, and so without a temperature.
    refit: once validation images have chosen, fit again, on them and the training images, and test
        and save that; None decides by the source (vtclip.runs.refit, which says what else changes).
    final: after the evaluation fit once more, with the chosen settings, on all images, the test's
        too, and save that; the metrics stay those of the fit before.
    budget: method auto fits what these seconds of one processor are expected to do (train.cost).
    unlabelled: decide test images together, too: "test", or others that join (runs.together).
    strict: refuse images that are in training and test at once, which are otherwise counted.
    overrides: fields of `FitConfig` that replace the recipe's (epochs, lr, optimizer, ...; `head`:
        options of the head, added); train_encoders: of `FinetuneConfig`; lora: of `LoraConfig`.
    out: the run's folder; by default runs/SOURCE-METHOD-SHOTSshot-seedSEED below the working
        folder, which must not lie in a source. It ends up with adapter.safetensors,
        adapter_config.json, result.json, log.jsonl, predictions.csv and confusion.png.
    overwrite, resume: replace the run in `out`; go on with its training, if it was stopped.
    device: "cpu", "cuda", ...; None: a GPU where there is one. threads: of the CPU, None: torch's.
    cache_dir: where features of images are kept; None: $VTCLIP_CACHE, else ~/.cache/vtclip.
    progress: bars on stderr, where it is a terminal.
    on_metrics: called with each row of log.jsonl once it is written (vtclip.runs.tell has the keys
        and examples). What it raises stops the run as a kill would: `resume` goes on.
    """
    options = dict(locals())  # the arguments, before there is anything else
    return fit_request(_request(**options), options["records"])


def _request(
    source: object,
    *,
    data: str | Path | None,
    val: object,
    test: object,
    method: str | None,
    overrides: Mapping[str, object] | None,
    class_names: Mapping[str, str] | str | Path | None,
    templates: Any,
    unlabelled: object,
    device: str | torch.device | None,
    records: Records | None,
    **others: Any,
) -> FitRequest:
    """The request of the options of `fit`; `records` are no part of it."""
    if others["lora"]:
        others["train_encoders"] = True
        method = LORA_METHOD if method is None else method
    if method is None:
        joint = others["train_encoders"] or others["base_to_new"]
        method = "rada" if joint else "auto"
    names = as_class_names(class_names)
    return FitRequest(
        source=as_source(source, data),
        val=None if val is None else as_source(val, None),
        test=None if test is None else as_source(test, None),
        method=method,
        class_names=names,
        templates=by_class_name(read_templates(templates), names),
        overrides=overrides or {},
        unlabelled=as_unlabelled(unlabelled),
        device=choose_device(device),
        **others,
    )


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
    watch = Stopwatch(request.device, progress=request.progress)
    folder = run_files.run_folder(request)
    listed = check_before_work(request, records)
    with run_files.claimed(folder):
        run_files.check_run_folder(folder, request)  # again: now nobody else writes it
        if run_files.can_return_finished(folder, request):
            return run_files.finished_run(folder, request)
        say_unless_proven(request.device)
        if request.overwrite:
            (folder / run_files.CHECKPOINT).unlink(missing_ok=True)
        rows = draw_rows(request, open_or_take(request, records, listed, watch))
        with watch.stage("features"):
            others = open_others(
                request.unlabelled, request.features, rows.records, rows.split,
                listed.get("unlabelled"),
            )  # fmt: skip
        settings = request.settings(rows.recipe_shots)
        again = refits(request, rows.records, rows.split)
        config = request.as_config(rows.recipe_shots, settings, refit=again)
        first, candidates, judged_val = train(request, rows, settings, folder, watch)
        if rows.records.targets is not None:
            return fit_several(request, rows, first, config, folder, watch)
        head, values = first, candidates
        if again:
            index = refit_rows(rows.split)
            head = fit_again(request, rows, first, settings, folder, watch, "refit", index)
            values = {**values, "refit": {"images": len(index)}}
        found, judged = evaluate_all(request, rows, head, first, watch)
        values |= found
        joint: Joint | None = None
        if request.unlabelled is not None:
            with watch.stage("together"):
                joint = decide_together(
                    rows.records, rows.split, head, judged, judged_val, others,
                    values["adapted"]["temperature"], request.device,
                )  # fmt: skip
            values["together"] = joint.values
        if request.pseudo_labels:
            values |= pseudo_report(rows.training, rows.records, rows.split)
        if request.final:
            index = torch.arange(len(rows.records))
            head = fit_again(request, rows, first, settings, folder, watch, "final", index)
            values["final"] = {"images": len(index)}
        names, temperature = rows.records.class_names, values["adapted"]["temperature"]
        features = features_of(rows.records, request.model)
        calibration = None  # the scores of the evaluated head are not those of one fitted on all
        if not request.final:
            calibration = calibration_of(
                judged_val or judged.val, temperature, rows.records.label, rows.split.test
            )
        weights = None if joint is None else joint.weights
        adapter = Adapter(head, names, temperature, features, calibration, request.final, weights)
        with NewFiles(folder) as new:
            digests = {"adapter": add_adapter(new, adapter)}
            if joint is not None:
                joint.write(new)
                digests |= joint.digests
            return run_files.write_run(
                folder, new, request, rows, config, values, watch, digests, judged
            )


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
    with NewFiles(folder) as new:
        digests = {"adapter": add_adapter(new, adapter)}
        return run_files.write_run(
            folder, new, request, rows, config, values, watch, digests, None, multi_label=True
        )


def open_or_take(
    request: FitRequest,
    records: Records | None,
    listed: Mapping[str, ImageFiles],
    watch: Stopwatch,
) -> Records:
    """The records of the request's sources, unless they are open already."""
    with watch.stage("features"):
        if records is not None:
            return records
        return open_all(
            request.source,
            request.features,
            request.draw,
            val=request.val,
            test=request.test,
            listed=listed,
        )


def draw_rows(request: FitRequest, records: Records) -> RunRows:
    """Which rows of the records train, validate and test, and what training sees of them."""
    seed, fraction, new = request.seed, request.test_fraction, None
    if request.base_to_new:
        records, new = base_and_new(records)
    check_text_encoder(request.method, records)
    shots = request.known_shots
    if request.pseudo_labels and not isinstance(shots, str):
        pool = unlabelled_split(records, seed, fraction)
        training, split = pseudo_labelled(records, pool, shots, request.device)
        split, left_out = check_duplicates(records, split, request.strict)
        return RunRows(records, split, shots, training, left_out=left_out)
    learns = HEADS[request.method].learns
    split = split_rows(records, learns, shots, seed, fraction, request.rule)
    split, left_out = check_duplicates(records, split, request.strict, learns=learns)
    if request.rule == UP_TO:
        warn_of_few(records, split, request.shots if learns else None)
        shots = usual_count(records, split)
    if new is None:
        return RunRows(records, split, int(shots), records, left_out=left_out)
    new_split, copies = new_test_split(
        records, split, new, seed, fraction, learns=learns, strict=request.strict
    )
    left_out = {why: left_out[why] + copies[why] for why in copies}
    return RunRows(records, split, int(shots), records, new, left_out, new_split)


def train(
    request: FitRequest, rows: RunRows, settings: FitConfig, folder: Path, watch: Stopwatch
) -> tuple[Head, Json, Decisions | None]:
    """The fitted head; where several methods were fitted, what was said of each; and, of a
    head that chose by validation images, its decisions on them as if it had not seen them."""
    config = request.as_config(rows.recipe_shots, settings)
    identity = request.identity(rows.records, rows.split, config)
    with watch.stage("train"):
        run = run_files.training_run(request, Checkpoint(folder / run_files.CHECKPOINT, identity))
        if request.method == "auto":
            auto, candidates, judged = fit_auto(
                rows.training, rows.split, rows.recipe_shots, run, request.budget
            )
            return auto, {"candidates": candidates}, judged
        records, val = rows.training, rows.split.val
        head = fit_head(
            request.method, records, rows.split, settings, run, choose=False, solve=not len(val)
        )
        judged = unseen(head, records, val, request.device)
        choose_by(head, records, val, request.device)
        return head, {}, judged


def fit_again(
    request: FitRequest,
    rows: RunRows,
    head: Head,
    settings: FitConfig,
    folder: Path,
    watch: Stopwatch,
    stage: str,
    index: Tensor,
) -> Head:
    """A head with the hyper-parameters of `head`, fitted to the rows `index` in the stage `stage`.

    It has no checkpoint: a run that is killed here and resumed trains `head` no more, and this
    anew.
    """
    run = run_files.training_run(request, None, log_to=folder / run_files.LOG)
    run, kept = logged_as(run, stage), folder / run_files.CHECKPOINT
    with watch.stage(stage):
        try:
            if isinstance(head, Auto):
                return refit_auto(head, rows.records, index, rows.recipe_shots, run)
            return refit_head(head, rows.records, index, settings, run)
        except Interrupted as stopped:
            if not kept.is_file():
                raise
            raise Interrupted(stopped.signum, stopped.step, kept) from None  # of the fit before


def evaluate_all(
    request: FitRequest, rows: RunRows, head: Head, first: Head, watch: Stopwatch
) -> tuple[Json, Judged]:
    """Metrics of zero-shot and of the head; of a base-to-new run for both halves of the classes.

    With them the decisions on the images of its own classes: of validation images those of `first`,
    which has not trained on them.
    """
    device = request.device
    heads = {"zero_shot": zero_shot_head(rows.records, device), "adapted": head}
    with watch.stage("evaluate"):
        decisions = {name: (decision, rows.records) for name, decision in heads.items()}
        values, judged = evaluate_both(decisions, rows.split, device, first={"adapted": first})
        if rows.new is None or rows.new_split is None:
            return values, judged
        new = new_class_metrics(values, heads, rows.new, rows.new_split, device)
        return values | new, judged
