# SPDX-License-Identifier: Apache-2.0
"""`vtclip.fit(train_encoders=True)`: both towers and RAda on an image folder, from source to run;
`vtclip.fit(lora=True)`: low-rank adapters of both towers.

In several processes each loads the model and the same rows; only the first one extracts features,
writes, and evaluates. The zero-shot row is the untouched model on the same test images.
"""

from __future__ import annotations

import dataclasses
import warnings
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from vtclip.clip import Clip, load_clip, resolve_templates
from vtclip.clip.texts import is_per_class
from vtclip.data.extract import cached_features
from vtclip.data.featureset import FeatureSet
from vtclip.data.image_files import ImageFiles
from vtclip.data.listed import list_images
from vtclip.data.records import Records
from vtclip.data.sets import SetSource
from vtclip.data.splits import UP_TO
from vtclip.distributed import World, device_of_rank, is_first, joined
from vtclip.environment import num_processes
from vtclip.files import Json, NewFiles, json_digest
from vtclip.heads import Head, RAda, ZeroShot
from vtclip.machine import Stopwatch
from vtclip.names import option
from vtclip.runs import folder as run_files
from vtclip.runs.adapter import Adapter, add_adapter, features_of
from vtclip.runs.checks import check_before_work
from vtclip.runs.class_counts import usual_count, warn_of_few
from vtclip.runs.duplicates import check_duplicates
from vtclip.runs.encoders import (
    add_encoders,
    tuned_features,
    with_low_rank,
    with_weights,
)
from vtclip.runs.evaluate import evaluate_both
from vtclip.runs.folder import RunRows
from vtclip.runs.proven import say_unless_proven
from vtclip.runs.request import FitRequest
from vtclip.runs.result import Run
from vtclip.train import finetune
from vtclip.train.calibration import calibration_of
from vtclip.train.checkpoint import Checkpoint
from vtclip.train.finetune_config import LORA_TEMPLATE, TEMPLATES, FinetuneConfig, LoraConfig
from vtclip.train.lora import CosineHead, LoRA
from vtclip.train.methods import zero_shot_head
from vtclip.train.rows import split_rows


def fit_encoders(request: FitRequest) -> Run:
    """Train the encoders of the request's model with RAda on a folder, and evaluate once."""
    templates = request.templates
    lines = default_templates(request) if templates is None else list(templates)
    resolved = resolve_templates(lines)
    if is_per_class(resolved[0]):
        raise ValueError(
            f"{option('train_encoders')}: {option('templates')} must hold {{}} for the class name, "
            "got sentences per class"
        )
    request = dataclasses.replace(
        request,
        templates=resolved,
        device=device_of_rank(request.device, request.device.index is not None),
        progress=request.progress and is_first(),
    )
    with joined(request.device) as world, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # metadata that nobody uses
        return _fit(request, world)


def default_templates(request: FitRequest) -> str | list[str] | None:
    """80 templates, or the one of adapters; the bundled model knows few words, and its own one is
    better for it.
    """
    if request.model == "demo":
        return None
    return [LORA_TEMPLATE] if request.lora else TEMPLATES


def _fit(request: FitRequest, world: World) -> Run:
    watch = Stopwatch(request.device, progress=request.progress and is_first())
    listed = world.by_each(lambda: check_before_work(request))
    clip = world.by_each(lambda: load_clip(request.model, request.device))
    files = listed.get("source") or source_images(request)
    features = world.by_each(lambda: extract(request, files, clip, watch))
    rows = draw_rows(request, features.records())
    settings = request.encoder_settings(len(rows.split.train))
    finetune.check_batch(settings, world)
    folder = run_files.run_folder(request)
    config = request.as_config(rows.recipe_shots, settings)
    identity = request.identity(rows.records, rows.split, config)
    world.check_same("settings and images", json_digest(identity))
    with ExitStack() as held:

        def enter() -> None:
            held.enter_context(run_files.claimed(folder))
            run_files.check_run_folder(folder, request)
            if request.overwrite:
                (folder / run_files.CHECKPOINT).unlink(missing_ok=True)

        world.by_first(enter)
        if run_files.can_return_finished(folder, request):
            return run_files.finished_run(folder, request)
        say_unless_proven(request.device)
        checkpoint = Checkpoint(folder / run_files.CHECKPOINT, identity)
        with watch.stage("train"):
            module = train(request, rows, features, settings, clip, world, checkpoint)
        run = world.by_first(
            lambda: evaluate_and_write(request, rows, clip, module, config, folder, watch)
        )
    return run or Run.load(folder)


def extract(
    request: FitRequest, files: ImageFiles, clip: Clip, watch: Stopwatch, say: bool = True
) -> FeatureSet:
    """Global features of all images by `clip`, from the cache where it has them."""
    with watch.stage("features"):
        options = dataclasses.replace(
            request.features, model=clip, need_spatial=False, device=request.device
        )
        return cached_features(files, options, say)[0]


def source_images(request: FitRequest) -> ImageFiles:
    if isinstance(request.source, SetSource):
        raise TypeError(f"train_encoders: source must be images, got {request.source!r}")
    return list_images(
        request.source, follow_links=request.follow_links, class_names=request.class_names
    )


def draw_rows(request: FitRequest, records: Records) -> RunRows:
    shots, seed, fraction = request.known_shots, request.seed, request.test_fraction
    split = split_rows(records, True, shots, seed, fraction, request.rule)
    split, left_out = check_duplicates(records, split, request.strict)
    if request.rule == UP_TO and is_first():
        warn_of_few(records, split, request.shots)
    return RunRows(records, split, usual_count(records, split), records, left_out=left_out)


def train(
    request: FitRequest,
    rows: RunRows,
    features: FeatureSet,
    settings: FinetuneConfig,
    clip: Clip,
    world: World,
    checkpoint: Checkpoint,
) -> finetune.Encoders:
    """Both towers of `clip`, which are changed in place, and the head, trained."""
    split, names = rows.split, rows.records.class_names
    lines, device = list(request.templates or ()), request.device
    torch.manual_seed(request.seed)
    if isinstance(settings, LoraConfig):
        module = finetune.Encoders(clip, CosineHead(), world, LoRA(clip, settings))
    else:
        head = RAda(rows.records.text, logit_scale=clip.logit_scale, **settings.head)
        module = finetune.Encoders(clip, head.to(device), world)
    tokens = clip.tokens(names, lines)
    finetune.make_trainable(module, clip.preprocess_cfg["size"], tokens[0], device)
    if settings.grad_checkpointing:
        switch_checkpointing(clip, True)
    images = finetune.TrainingImages(
        source_images(request),
        features.manifest,
        clip,
        split.train,
        split.val,
        seed=request.seed,
        least_area=settings.least_area,
    )

    def validate() -> dict[str, float]:
        texts = partial(clip.encode_text, names, lines)
        return finetune.validation(module, clip, images, split.val, texts)

    run = run_files.training_run(request, checkpoint, logs=world.first)
    finetune.train_encoders(module, images, tokens, split.train, settings, run, validate)
    if settings.grad_checkpointing:
        switch_checkpointing(clip, False)
    return module


def evaluate_and_write(
    request: FitRequest,
    rows: RunRows,
    clip: Clip,
    module: finetune.Encoders,
    config: Json,
    folder: Path,
    watch: Stopwatch,
) -> Run:
    """Evaluate both decisions on the test images, and write the run."""
    base_weights = clip.weights_digest
    lora = module.lora
    tuned = with_weights(clip) if lora is None else with_low_rank(clip, lora.close())
    after = extract(request, source_images(request), tuned, watch, say=False).records()
    head = head_over(after.text, module.head, tuned.logit_scale).to(request.device).eval()
    zero_shot = zero_shot_head(rows.records, request.device)
    with watch.stage("evaluate"):
        decisions = {"zero_shot": (zero_shot, rows.records), "adapted": (head, after)}
        values, judged = evaluate_both(decisions, rows.split, request.device)
    with NewFiles(folder) as new:
        encoders = add_encoders(new, tuned)
        features = features_of(after, request.model)
        features["encoders"] = tuned_features(tuned, encoders, base_weights)
        temperature = values["adapted"]["temperature"]
        calibration = calibration_of(judged.val, temperature, after.label, rows.split.test)
        adapter = Adapter(head, after.class_names, temperature, features, calibration)
        digests = {"adapter": add_adapter(new, adapter), "encoders": encoders}
        return run_files.write_run(
            folder, new, request, rows, config, values, watch, digests, judged,
            processes=num_processes(),
        )  # fmt: skip


def head_over(text: Tensor, trained: RAda | CosineHead, logit_scale: float) -> Head:
    """The trained head over the class texts [K, C] of the trained text tower."""
    if isinstance(trained, CosineHead):
        return ZeroShot(text, logit_scale=logit_scale)
    head = RAda(text, **{**trained.options(), "logit_scale": logit_scale})
    head.load_state_dict({**trained.state_dict(), "text": head.text})
    return head


def switch_checkpointing(clip: Clip, on: bool) -> None:
    """open_clip's own switch; a model without one is refused by name."""
    switch = getattr(clip.model, "set_grad_checkpointing", None)
    if switch is None:
        raise ValueError(f"{option('grad_checkpointing')}: {clip.name!r} offers none")
    switch(on)
