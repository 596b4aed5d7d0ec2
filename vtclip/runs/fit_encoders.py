# SPDX-License-Identifier: Apache-2.0
"""`vtclip.fit(train_encoders=True)`: both towers and RAda on an image folder, from source to run.

In several processes each loads the model and the same rows; only the first one extracts features,
writes, and evaluates. The zero-shot row is the untouched model on the same test images.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vtclip.clip import Clip, load_clip, resolve_templates
from vtclip.data.extract import cached_features
from vtclip.data.featureset import FeatureSet
from vtclip.data.records import Records
from vtclip.data.splits import Split
from vtclip.distributed import World, device_of_rank, is_first, joined, num_processes
from vtclip.files import Json, json_digest, only_writer
from vtclip.heads import HEADS, Head
from vtclip.machine import Stopwatch
from vtclip.runs import result
from vtclip.runs.adapter import Adapter, features_of, save_adapter
from vtclip.runs.encoders import ENCODERS, saved_encoders, with_weights
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
from vtclip.train import finetune
from vtclip.train.checkpoint import Checkpoint
from vtclip.train.finetune_config import TEMPLATES, FinetuneConfig
from vtclip.train.rows import split_rows, usual_shots


def fit_encoders(request: FitRequest) -> Run:
    """Train the encoders of the request's model with RAda on a folder, and evaluate once."""
    templates = request.templates
    lines = default_templates(request.model) if templates is None else list(templates)
    request = dataclasses.replace(
        request,
        templates=resolve_templates(lines),
        device=device_of_rank(request.device, request.device.index is not None),
        progress=request.progress and is_first(),
    )
    with joined(request.device) as world, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # metadata that nobody uses
        return _fit(request, world)


def default_templates(model: str) -> str | None:
    """80 templates; the bundled model knows few words, and its own one is better for it."""
    return None if model == "demo" else TEMPLATES


def _fit(request: FitRequest, world: World) -> Run:
    watch = Stopwatch(request.device)
    if request.out is not None:
        world.by_first(lambda: check_run_folder(run_folder(request, 0), request))
    clip = world.by_each(lambda: load_clip(request.model, request.device))
    features = world.by_each(lambda: extract(request, clip, watch))
    images = draw_images(request, features)
    finetune.check_batch(images.settings, world)
    folder = run_folder(request, images.shots)
    config = request.as_config(images.shots, images.settings)
    identity = identity_of(request, images, config)
    world.check_same("settings and images", json_digest(identity))
    with ExitStack() as held:

        def enter() -> None:
            check_run_folder(folder, request)
            held.enter_context(removed_if_empty(folder))
            held.enter_context(only_writer(folder))

        world.by_first(enter)
        if can_return_finished(folder, request):
            return finished_run(folder, request, images.shots, config)
        checkpoint = Checkpoint(folder / CHECKPOINT, identity)
        module = train(request, images, clip, world, checkpoint, watch)
        run = world.by_first(
            lambda: evaluate_and_write(request, images, clip, module, config, folder, watch)
        )
    return run or Run.load(folder)


@dataclass(frozen=True)
class TrainingSet:
    """The images of one run: their features before training, their rows, and what follows."""

    features: FeatureSet
    records: Records
    split: Split
    shots: int
    settings: FinetuneConfig


def extract(request: FitRequest, clip: Clip, watch: Stopwatch) -> FeatureSet:
    """Global features of all images by `clip`, from the cache where it has them."""
    with watch.stage("features"):
        options = dataclasses.replace(
            request.features, model=clip, need_spatial=False, device=request.device
        )
        return cached_features(source_folder(request), options)[0]


def source_folder(request: FitRequest) -> Path:
    if not isinstance(request.source, Path):
        raise TypeError(f"train_encoders: source must be a folder, got {request.source!r}")
    return request.source


def draw_images(request: FitRequest, features: FeatureSet) -> TrainingSet:
    records = features.records()
    shots = request.known_shots
    if shots is None:
        shots = usual_shots(records, request.test_fraction)
    split = split_rows(records, True, shots, request.seed, request.test_fraction)
    settings = request.encoder_settings(len(split.train))
    return TrainingSet(features, records, split, shots, settings)


def identity_of(request: FitRequest, images: TrainingSet, config: Json) -> Json:
    """What a checkpoint must agree in to be resumed, and all processes with each other."""
    return {
        "method": request.method,
        "train_encoders": True,
        "shots": images.shots,
        "seed": request.seed,
        "config": config["fit"],
        "templates": request.templates,
        "split": images.split.digest,
        "digests": images.records.info["digests"],
        "classes": images.records.class_names,
    }


def train(
    request: FitRequest,
    images: TrainingSet,
    clip: Clip,
    world: World,
    checkpoint: Checkpoint,
    watch: Stopwatch,
) -> finetune.Encoders:
    """Both towers of `clip`, which are changed in place, and the head, trained."""
    settings, split, names = images.settings, images.split, images.records.class_names
    lines, device = list(request.templates or ()), request.device
    torch.manual_seed(request.seed)
    head = HEADS[request.method](images.records.text, logit_scale=clip.logit_scale, **settings.head)
    module = finetune.Encoders(clip, head.to(device), world)
    tokens = clip.tokens(names, lines)
    finetune.make_trainable(module, clip.preprocess_cfg["size"], tokens[0], device)
    if settings.grad_checkpointing:
        switch_checkpointing(clip, True)
    files = finetune.TrainingImages(
        source_folder(request),
        images.features.manifest,
        clip,
        split.train,
        split.val,
        seed=request.seed,
        least_area=settings.least_area,
    )
    resume = request.resume and checkpoint.path.is_file()
    with watch.stage("train"), ExitStack() as held:
        log: Callable[[Json], None] | None = None
        if world.first:
            log = held.enter_context(line_log(checkpoint.path.parent / LOG, append=resume))
        finetune.fit(
            module,
            files,
            tokens,
            split.train,
            settings,
            world=world,
            device=device,
            seed=request.seed,
            validate=lambda: finetune.validation(
                module, clip, files, split.val, lambda: clip.encode_text(names, lines)
            ),
            log=log,
            checkpoint=checkpoint,
            resume=resume,
            progress=request.progress,
        )
    if settings.grad_checkpointing:
        switch_checkpointing(clip, False)
    return module


def evaluate_and_write(
    request: FitRequest,
    images: TrainingSet,
    clip: Clip,
    module: finetune.Encoders,
    config: Json,
    folder: Path,
    watch: Stopwatch,
) -> Run:
    """Evaluate both decisions on the test images, and write the run."""
    records, split = images.records, images.split
    base_weights = clip.weights_digest
    tuned = with_weights(clip)
    after = extract(request, tuned, watch).records()
    head = trained_head(request, module, after, tuned)
    zero_shot = zero_shot_head(records, request.device)
    with watch.stage("evaluate"):
        decisions = {"zero_shot": (zero_shot, records), "adapted": (head, after)}
        values = evaluate_both(decisions, split, request.device)
    with saved_encoders(folder, tuned) as encoders:
        features = features_of(after, request.model)
        features["encoders"] = {"file": ENCODERS, "digest": encoders, "base_weights": base_weights}
        temperature = values["adapted"]["temperature"]
        digest = save_adapter(folder, Adapter(head, after.class_names, temperature, features))
    digests = {"split": split.digest, "adapter": digest, "encoders": encoders}
    contents = result.make(
        values,
        watch,
        method=request.method,
        source=request.source.name,
        shots=images.shots,
        seed=request.seed,
        config=config,
        digests={**records.info["digests"], **digests},
        split=split.digest,
        classes=records.class_names,
        images=split.counts(),
        unreadable=result.unreadable(records),
        processes=num_processes(),
    )
    run = Run.write(folder, contents)
    (folder / CHECKPOINT).unlink(missing_ok=True)
    return run


def trained_head(
    request: FitRequest, module: finetune.Encoders, records: Records, clip: Clip
) -> Head:
    """The trained head over the class texts of the trained text tower."""
    trained = module.head
    options = {**trained.options(), "logit_scale": clip.logit_scale}
    head = HEADS[request.method](records.text, **options)
    head.load_state_dict({**trained.state_dict(), "text": head.text})
    return head.to(request.device).eval()


def switch_checkpointing(clip: Clip, on: bool) -> None:
    """open_clip's own switch; a model without one is refused by name."""
    switch: Any = getattr(clip.model, "set_grad_checkpointing", None)
    if switch is None:
        raise ValueError(f"grad_checkpointing: {clip.name!r} offers none")
    switch(on)
