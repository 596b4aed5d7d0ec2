# SPDX-License-Identifier: Apache-2.0
"""What `vtclip.fit` was asked for: one value, checked before any work, written to the result.

A run's `config` in result.json is the record of its request, and `vtclip.repeat` reads the request
back from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vtclip.clip import ClipNotFound
from vtclip.clip.names import resolve
from vtclip.clip.texts import read_templates
from vtclip.data.options import Draw, FeatureOptions
from vtclip.data.records import Records
from vtclip.data.sets import AnySource, SetSource, as_source
from vtclip.data.sources import source_kind
from vtclip.data.splits import ALL, EXACT, UP_TO, Split
from vtclip.files import Json
from vtclip.heads import HEADS
from vtclip.heads.config import FitConfig, check_seed
from vtclip.machine import check_threads
from vtclip.names import SHOTS, option, pick
from vtclip.runs.base_to_new import check_any_classes
from vtclip.runs.opening import check_others
from vtclip.runs.together import as_recorded, as_unlabelled, check_unlabelled
from vtclip.train.auto import RULE, check_budget
from vtclip.train.finetune_config import FinetuneConfig, LoraConfig, get_config, get_lora_config
from vtclip.train.methods import fits_images, recipe_config
from vtclip.train.pseudo_labels import check_pseudo_labels

TRAINS_ENCODERS, LORA_METHOD = "rada", "zeroshot"
# options that a record holds under their own names
RECORDED = (
    *("model", "spatial", "prompt", "templates", "augment_passes", "test_fraction"),
    *("train_encoders", "base_to_new", "pseudo_labels", "class_names", "follow_links"),
    *("val", "test", "final", "budget", "lora", "unlabelled"),
)


@dataclass(frozen=True, kw_only=True)
class FitRequest:
    """The options of `vtclip.fit`, where each is explained; a wrong one is a ValueError at once."""

    source: AnySource
    val: AnySource | None = None
    test: AnySource | None = None
    method: str
    shots: int | str | None = None
    exact_shots: bool = False
    seed: int = 1
    model: str = "demo"
    spatial: str | None = None
    prompt: str | None = None
    templates: Sequence[Any] | None = None
    class_names: Mapping[str, str] | None = None
    follow_links: bool = False
    test_fraction: float = 0.5
    augment_passes: int = 0
    encoder_batch_size: int = 64
    train_encoders: bool = False
    lora: bool = False
    base_to_new: bool = False
    pseudo_labels: bool = False
    refit: bool | None = None
    final: bool = False
    unlabelled: AnySource | str | None = None
    budget: float | None = None
    strict: bool = False
    overrides: Mapping[str, object] = field(default_factory=dict)
    out: str | Path | None = None
    overwrite: bool = False
    resume: bool = False
    device: torch.device = torch.device("cpu")
    threads: int | None = None
    cache_dir: str | Path | None = None
    progress: bool = False
    on_metrics: Callable[[Json], None] | None = None

    def __post_init__(self) -> None:
        told: object = self.on_metrics
        if told is not None and not callable(told):
            got = type(told).__name__
            raise TypeError(f"{option('on_metrics')} must be callable, got {got}")
        pick("method", self.method, HEADS)
        self._check_shots()
        check_seed(self.seed)
        check_threads(self.threads)
        check_budget(self.budget, self.method)
        if self.overwrite and self.resume:
            raise ValueError(f"{option('overwrite')} and {option('resume')} exclude each other")
        if self.pseudo_labels:
            check_pseudo_labels(
                self.method,
                self.shots,
                base_to_new=self.base_to_new,
                train_encoders=self.train_encoders,
            )
        if isinstance(self.source, SetSource):
            self.source.refuse(
                train_encoders=self.train_encoders,
                prompt=self.prompt,
                test_fraction=None if self.test_fraction == 0.5 else self.test_fraction,
            )
        self._check_combinations()
        check_unlabelled(self)
        check_others(self.source, self.val, self.test)
        if self.lora and not self.train_encoders:
            raise ValueError(f"{option('lora')} trains encoders: train_encoders must be True")
        if self.train_encoders:
            self._check_encoders(self.source)
            return
        if self.base_to_new:
            check_any_classes(self.method, self.overrides)
        self.settings(max(SHOTS) if self.known_shots == ALL else int(self.known_shots))

    def _check_shots(self) -> None:
        """Refuse shots that are neither a number nor "all", or "all" where a number is needed."""
        shots, name = self.shots, option("shots")
        if isinstance(shots, str):
            if shots != ALL:
                raise ValueError(f"{name} must be a number or {ALL!r}, got {shots!r}")
            needs = {"exact_shots": self.exact_shots, "pseudo_labels": self.pseudo_labels}
            for other, given in needs.items():
                if given:
                    raise ValueError(f"{name} must be a number with {option(other)}, got {ALL!r}")
            if isinstance(self.source, SetSource):
                raise ValueError(f"{name} must be a number with a data set, got {ALL!r}")
        elif shots is not None:
            if isinstance(shots, bool) or not isinstance(shots, int):
                raise TypeError(f"{name} must be an int or {ALL!r}, got {type(shots).__name__}")
            if shots < 0:
                raise ValueError(f"{name} must be at least 0, got {shots}")
        elif self.exact_shots and not isinstance(self.source, SetSource):
            raise ValueError(f"{name} must be named with {option('exact_shots')}, got none")

    def _check_combinations(self) -> None:
        """Refuse sources of other images, and the last fits, where they have no meaning."""
        last = {"refit": self.refit, "final": self.final}
        given = {"val": self.val, "test": self.test, **last}
        for other in ("base_to_new", "train_encoders", "pseudo_labels"):
            # images without labels may well be tested on others that have some
            names = ("val", *last) if other == "pseudo_labels" else tuple(given)
            for name in names:
                if given[name] and getattr(self, other):
                    raise ValueError(f"{option(name)} cannot be combined with {option(other)}")
        for name, asked in last.items():
            if asked and not fits_images(self.method):
                raise ValueError(
                    f"method {self.method} learns nothing from images: {option(name)} changes "
                    "nothing"
                )

    def _check_encoders(self, source: AnySource) -> None:
        """Refuse options of frozen features, which mean nothing where the encoders change."""
        for name in ("spatial", "prompt", "augment_passes", "base_to_new"):
            if getattr(self, name):
                raise ValueError(
                    f"{self._tuning}: {option(name)} must be left out, got {getattr(self, name)!r}"
                )
        wanted = LORA_METHOD if self.lora else TRAINS_ENCODERS
        if self.method != wanted:
            raise ValueError(
                f"{self._tuning}: {option('method')} must be {wanted}, got {self.method!r}"
            )
        kind = "set" if isinstance(source, SetSource) else source_kind(source)
        if kind != "folder":
            what = "an .npz table" if kind == "npz" else "a features folder"
            raise ValueError(
                f"{self._tuning}: {option('source')} must be an image folder, got {what}: {source}"
            )
        if self.shots == 0:
            raise ValueError(f"{option('shots')} must be at least 1 to train, got 0")
        self.encoder_settings(1)

    @property
    def _tuning(self) -> str:
        """The option that has the encoders trained."""
        return option("lora" if self.lora else "train_encoders")

    @property
    def learns(self) -> bool:
        """Whether labelled images change anything."""
        return self.train_encoders or HEADS[self.method].learns

    @property
    def known_shots(self) -> int | str:
        """The shots that are asked for, or 16; a set of test images has none."""
        if self.shots is not None:
            return self.shots
        test_only = isinstance(self.source, SetSource) and self.source.spec.test_only
        return 0 if test_only else max(SHOTS)

    @property
    def rule(self) -> str:
        """How shots are drawn (vtclip.data.splits); data sets keep the draw of their papers."""
        return EXACT if self.exact_shots or isinstance(self.source, SetSource) else UP_TO

    def settings(self, shots: int) -> FitConfig:
        """The recipe of the method for `shots`, with the overrides in place of some."""
        return recipe_config(self.method, shots, self.overrides)

    def encoder_settings(self, images: int) -> FinetuneConfig:
        """How the encoders are trained on so many images, with the overrides in place of some."""
        overrides = {name: value for name, value in self.overrides.items() if value is not None}
        if overrides.pop("optimizer", "adamw") != "adamw":
            raise ValueError(f"{option('optimizer')}: encoders are trained with adamw, got 'sgd'")
        kind = LoraConfig if self.lora else FinetuneConfig
        names = [field.name for field in dataclasses.fields(kind)]
        for name in overrides:
            if name not in names and name in FitConfig.__dataclass_fields__:
                raise ValueError(f"{option(name)} cannot be combined with {self._tuning}")
            pick("override", name, [name for name in names if name != "recipe"])
        if self.lora:
            shots = max(SHOTS) if self.known_shots == ALL else int(self.known_shots)
            return get_lora_config(images, shots, model=self.model, overrides=overrides)
        return get_config(images, model=self.model, overrides=overrides)

    @property
    def features(self) -> FeatureOptions:
        return FeatureOptions(
            model=self.model,
            spatial=self.spatial,
            need_spatial=HEADS[self.method].needs_spatial,
            prompt=self.prompt,
            templates=None if self.templates is None else list(self.templates),
            class_names=self.class_names,
            follow_links=self.follow_links,
            augment_passes=self.augment_passes,
            batch_size=self.encoder_batch_size,
            cache_dir=self.cache_dir,
            device=str(self.device),
            progress=self.progress,
        )

    @property
    def draw(self) -> Draw:
        shots = self.known_shots
        return Draw(0 if isinstance(shots, str) else shots, self.seed, pool=self.pseudo_labels)

    def as_config(
        self, recipe_shots: int, settings: FitConfig | FinetuneConfig, *, refit: bool = False
    ) -> Json:
        """The record of the request, with the settings that it came to.

        recipe_shots: images per class that the method's recipe was taken for.
        refit: whether the head is fitted once more on the validation images, see
            `vtclip.runs.refit`.
        """
        source = self.source
        record = {
            "source": str(source.resolve()),
            "data": str(source.root.resolve()) if isinstance(source, SetSource) else None,
            "shots": self.known_shots,
            "draw": self.rule,
            "recipe_shots": recipe_shots,
            **{name: getattr(self, name) for name in RECORDED},
            "val": None if self.val is None else str(self.val.resolve()),
            "test": None if self.test is None else str(self.test.resolve()),
            "refit": refit,
            "unlabelled": as_recorded(self.unlabelled),
            "model": lasting_model(self.model),
            "templates": read_templates(self.templates),
            "fit": dataclasses.asdict(settings),
            **({"pool": RULE} if self.method == "auto" else {}),
        }
        absent = ["train_encoders", "lora"]
        if self.train_encoders:
            absent = [] if self.lora else ["lora"]
            absent += ["data", "recipe_shots", "base_to_new", "pseudo_labels", "refit"]
        return {name: value for name, value in record.items() if name not in absent}

    def identity(self, records: Records, split: Split, config: Json) -> Json:
        """What a checkpoint must agree in to be resumed, and all processes with each other."""
        kind = {"pseudo_labels": self.pseudo_labels}
        return {
            "method": self.method,
            "shots": self.known_shots,
            "seed": self.seed,
            "config": config["fit"],
            "split": split.digest,
            "digests": records.info.get("digests", {}),
            "classes": records.class_names,
            **({"train_encoders": True, "templates": self.templates}
               if self.train_encoders else kind),
        }  # fmt: skip

    @classmethod
    def from_config(
        cls, config: Json, *, method: str, shots: int | str, **others: Any
    ) -> FitRequest:
        """The request behind a record; older ones lack `shots` and options that came later.

        others: what a record does not hold (seed, device, threads, out, ...).
        """
        shots = config.get("shots", shots)
        recorded = {name: config[name] for name in RECORDED if name in config}
        for name in ("val", "test"):
            if recorded.get(name) is not None:
                recorded[name] = as_source(recorded[name], None)
        recorded["unlabelled"] = as_unlabelled(recorded.get("unlabelled"))
        return cls(
            refit=bool(config.get("refit")),  # what a run did, not what the default is today
            source=as_source(config["source"], config.get("data")),
            method=method,
            shots=shots,
            exact_shots=config.get("draw", EXACT) == EXACT,
            overrides=_overrides(config, method, config.get("recipe_shots", shots)),
            **recorded,
            **others,
        )


def lasting_model(model: str | Path) -> str:
    """The name of a model for a record, which holds in any working directory."""
    try:
        return resolve(str(model)).name
    except ClipNotFound:  # of features that exist already no model is loaded
        return str(model)


def _overrides(config: Json, method: str, recipe_shots: int) -> Json:
    """The settings of a run that its recipe does not give today; of trained encoders, all."""
    settings = config["fit"]
    if config.get("train_encoders"):
        return {name: value for name, value in settings.items() if name != "recipe"}
    recipe = dataclasses.asdict(HEADS[method].recipe(recipe_shots))
    # a setting that was added after the run has the value that means what was done then
    settings = {**dataclasses.asdict(FitConfig(settings["epochs"])), **settings}
    changed = {name: value for name, value in settings.items() if recipe.get(name) != value}
    if "head" in changed:
        usual = recipe["head"]
        changed["head"] = {
            k: value for k, value in changed["head"].items() if usual.get(k) != value
        }
    return changed
