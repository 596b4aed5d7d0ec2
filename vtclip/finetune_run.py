# SPDX-License-Identifier: Apache-2.0
"""`vtclip.fit(train_encoders=True)`: both towers and RAda on an image folder, from source to run.

In several processes each loads the model and the same rows; only the first one extracts features,
writes, and evaluates. The zero-shot row is the untouched model on the same test images.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from . import engine, finetune
from .adapter import Adapter, features_of, save_adapter
from .checkpoint import Checkpoint
from .choices import pick
from .clip import Clip, load_clip, resolve_templates
from .data.extract import cached_features
from .data.featureset import FeatureSet
from .data.options import FeatureOptions
from .data.records import Records
from .data.sources import source_kind
from .data.splits import Split
from .distributed import World, device_of_rank, is_first, joined, num_processes
from .encoders import ENCODERS, saved_encoders, with_weights
from .files import json_digest, only_writer, to_json
from .heads import HEADS
from .memory import peak_memory_mb
from .recipes import RECIPES
from .recipes.rada_finetune import TEMPLATES, FinetuneConfig, get_config
from .result import (
    RESULT,
    Run,
    Stopwatch,
    device_name,
    environment,
    named_classes,
    revision,
    unreadable,
    versions,
)
from .runs import CHECKPOINT, LOG, check_out, finished_run, line_log, removed_if_empty, run_folder
from .settings import build_head, calibrate, choose_device, split_rows, usual_shots

METHOD = "rada"


def fit_encoders(
    source: Path,
    *,
    method: str,
    shots: int | None,
    seed: int,
    model: str,
    templates: Sequence[str] | None,
    test_fraction: float,
    overrides: Mapping[str, Any],
    out: str | Path | None,
    overwrite: bool,
    resume: bool,
    device: str | torch.device | None,
    cache_dir: str | Path | None,
    progress: bool,
) -> Run:
    """Train the encoders of `model` with RAda on the images of `source`, and evaluate once."""
    if method != METHOD:
        raise ValueError(f"train_encoders: method must be {METHOD}, got {method!r}")
    kind = source_kind(source)
    if kind != "folder":
        found = "an .npz table" if kind == "npz" else "a features folder"
        raise ValueError(f"train_encoders: source must be an image folder, got {found}: {source}")
    if shots == 0:
        raise ValueError("shots must be at least 1 to train, got 0")
    given = checked_overrides(overrides)
    get_config(1, model=model, overrides=given)
    lines = resolve_templates(default_templates(model) if templates is None else list(templates))
    named = device is not None and torch.device(device).index is not None
    where = device_of_rank(choose_device(device), named)
    request = _Request(
        source, shots, seed, str(model), lines, test_fraction, given, out, overwrite, resume,
        where, cache_dir, progress and is_first(),
    )  # fmt: skip
    with joined(where) as world, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # metadata that nobody uses
        return _Work(request, world).run()


def refuse(options: Mapping[str, Any]) -> None:
    """Options of frozen features, which have no meaning where the encoders change."""
    for name, value in options.items():
        if value:
            raise ValueError(f"train_encoders: {name} must be left out, got {value!r}")


def default_templates(model: str) -> str | None:
    """80 templates; the bundled model knows few words, and its own one is better for it."""
    return None if model == "demo" else TEMPLATES


def checked_overrides(overrides: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in overrides.items() if value is not None}
    if given.pop("optimizer", "adamw") != "adamw":
        raise ValueError("optimizer: encoders are trained with adamw, got 'sgd'")
    for name in given:
        fields = [field.name for field in dataclasses.fields(FinetuneConfig)]
        pick("override", name, [name for name in fields if name != "recipe"])
    return given


@dataclasses.dataclass(frozen=True)
class _Request:
    source: Path
    shots: int | None
    seed: int
    model: str
    lines: list[str]
    test_fraction: float
    overrides: dict[str, Any]
    out: str | Path | None
    overwrite: bool
    resume: bool
    device: torch.device
    cache_dir: str | Path | None
    progress: bool


class _Work:
    def __init__(self, request: _Request, world: World) -> None:
        self.request, self.world, self.watch = request, world, Stopwatch(request.device)

    def run(self) -> Run:
        r, world = self.request, self.world
        if r.out is not None:
            world.by_first(lambda: self.check_out(Path(str(r.out)).expanduser()))
        clip = world.by_each(lambda: load_clip(r.model, r.device))
        base = world.by_each(lambda: self.features(clip))
        records = base.records()
        shots = usual_shots(records, r.test_fraction) if r.shots is None else r.shots
        folder = run_folder(r.out, r.source, METHOD + "-encoders", shots, r.seed)
        split = split_rows(records, True, shots, r.seed, r.test_fraction)
        config = get_config(len(split.train), model=r.model, overrides=r.overrides)
        finetune.check_batch(config, world)
        options = {
            "source": str(r.source.resolve()),
            "model": r.model,
            "spatial": None,
            "prompt": None,
            "templates": r.lines,
            "augment_passes": 0,
            "test_fraction": r.test_fraction,
            "train_encoders": True,
            "fit": dataclasses.asdict(config),
        }
        identity = {
            "method": METHOD,
            "train_encoders": True,
            "shots": shots,
            "seed": r.seed,
            "config": options["fit"],
            "templates": r.lines,
            "split": split.digest,
            "digests": records.info["digests"],
            "classes": records.class_names,
        }
        world.check_same("settings and images", json_digest(identity))
        with ExitStack() as held:

            def enter() -> None:
                self.check_out(folder)
                held.enter_context(removed_if_empty(folder))
                held.enter_context(only_writer(folder))

            world.by_first(enter)
            if r.resume and (folder / RESULT).is_file() and not (folder / CHECKPOINT).is_file():
                wanted = {"method": METHOD, "shots": shots, "seed": r.seed}
                return finished_run(folder, wanted, options)
            checkpoint = Checkpoint(folder / CHECKPOINT, identity)
            module = self.train(clip, base, records, split, config, folder, checkpoint)
            made = world.by_first(
                lambda: self.finish(clip, module, records, split, shots, options, folder)
            )
        return made or Run.load(folder)

    def check_out(self, folder: Path) -> None:
        r = self.request
        check_out(folder, r.source, overwrite=r.overwrite, resume=r.resume)

    def features(self, clip: Clip) -> FeatureSet:
        """Global features of all images by `clip`, from the cache where it has them."""
        r = self.request
        with self.watch.stage("features"):
            options = FeatureOptions(
                model=clip,
                templates=r.lines,
                cache_dir=r.cache_dir,
                device=r.device,
                progress=r.progress,
            )
            found, _ = cached_features(r.source, options)
        return found

    def train(
        self,
        clip: Clip,
        base: FeatureSet,
        records: Records,
        split: Split,
        config: FinetuneConfig,
        folder: Path,
        checkpoint: Checkpoint,
    ) -> finetune.Encoders:
        r, world, names = self.request, self.world, records.class_names
        torch.manual_seed(r.seed)
        head = HEADS[METHOD](records.text, logit_scale=clip.logit_scale, **config.head)
        module = finetune.Encoders(clip, head.to(r.device), world)
        tokens = clip.tokens(names, r.lines)
        finetune.make_trainable(module, clip.preprocess_cfg["size"], tokens[0], r.device)
        if config.grad_checkpointing:
            switch_checkpointing(clip, True)
        images = finetune.TrainingImages(
            r.source,
            base.manifest,
            clip,
            split.train,
            split.val,
            seed=r.seed,
            least_area=config.least_area,
        )

        def validate() -> dict[str, float]:
            return finetune.validation(
                module, clip, images, split.val, lambda: clip.encode_text(names, r.lines)
            )

        go_on = r.resume and checkpoint.path.is_file()
        with self.watch.stage("train"), ExitStack() as held:
            log: Any = None
            if world.first:
                log = held.enter_context(line_log(folder / LOG, append=go_on))
            finetune.fit(
                module,
                images,
                tokens,
                split.train,
                config,
                world=world,
                device=r.device,
                seed=r.seed,
                validate=validate,
                log=log,
                checkpoint=checkpoint,
                resume=go_on,
                progress=r.progress,
            )
        if config.grad_checkpointing:
            switch_checkpointing(clip, False)
        return module

    def finish(
        self,
        clip: Clip,
        module: finetune.Encoders,
        records: Records,
        split: Split,
        shots: int,
        options: dict[str, Any],
        folder: Path,
    ) -> Run:
        """Evaluate both decisions on the test images, and write the run."""
        r, watch = self.request, self.watch
        base_weights = clip.weights_digest
        tuned = with_weights(clip)
        after = self.features(tuned).records()
        trained: Any = module.head
        head = HEADS[METHOD](after.text, **{**trained.options(), "logit_scale": tuned.logit_scale})
        head.load_state_dict({**trained.state_dict(), "text": head.text})
        head.to(r.device).eval()
        zero_shot = build_head("zeroshot", records, RECIPES["zeroshot"](0), r.device)
        values = {}
        with watch.stage("evaluate"):
            for name, one, table in (
                ("zero_shot", zero_shot, records),
                ("adapted", head, after),
            ):
                rows = engine.TrainingRows(table, split.train, split.val)
                temperature = calibrate(one, rows, split.val, r.device)
                seen = engine.evaluate(
                    one, table, split.test, device=r.device, temperature=temperature
                )
                values[name] = named_classes(dict(seen), table.class_names)
        with saved_encoders(folder, tuned) as encoders:
            features = features_of(after, r.model)
            features["encoders"] = {
                "file": ENCODERS,
                "digest": encoders,
                "base_weights": base_weights,
            }
            temperature = values["adapted"]["temperature"]
            adapter = Adapter(head, after.class_names, temperature, features)
            digest = save_adapter(folder, adapter)
        result = {
            "method": METHOD,
            "source": r.source.name,
            "shots": shots,
            "seed": r.seed,
            **values,
            "accuracy": values["adapted"]["accuracy"],
            "seconds": {**watch.seconds, "total": sum(watch.seconds.values())},
            "peak_memory_mb": peak_memory_mb(r.device),
            "memory_mb": watch.memory_mb,
            "device": device_name(r.device),
            "environment": environment(r.device),
            "processes": num_processes(),
            "versions": versions(),
            "revision": revision(),
            "config": options,
            "digests": {
                **records.info["digests"],
                "split": split.digest,
                "adapter": digest,
                "encoders": encoders,
            },
            "split": split.digest,
            "classes": records.class_names,
            "images": {role: len(getattr(split, role)) for role in ("train", "val", "test")},
            "test": {"images": len(split.test), "unreadable": unreadable(records)},
        }
        run = Run(folder, json.loads(to_json(result)))
        run.save()
        (folder / CHECKPOINT).unlink(missing_ok=True)
        return run


def switch_checkpointing(clip: Clip, on: bool) -> None:
    """open_clip's own switch; a model without one is refused by name."""
    switch: Any = getattr(clip.model, "set_grad_checkpointing", None)
    if switch is None:
        raise ValueError(f"grad_checkpointing: {clip.name!r} offers none")
    switch(on)
