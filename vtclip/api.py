# SPDX-License-Identifier: Apache-2.0
"""`vtclip.fit` and `vtclip.evaluate`: from labelled images to a run folder with numbers.

The command line calls these two with the same names and defaults.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import engine, metrics
from .adapter import CONFIG, TENSORS, Adapter, load_adapter, save_adapter
from .checkpoint import Checkpoint
from .choices import pick
from .config import FitConfig, check_seed
from .data.records import Records
from .data.sources import open_source
from .data.splits import Split, few_shot_split
from .files import json_digest, only_writer, to_json
from .heads import HEADS
from .recipes import RECIPES
from .result import RESULT, Run, Stopwatch, device_name, peak_memory_mb, revision, versions

__all__ = ["Run", "evaluate", "fit", "write_features"]

logger = logging.getLogger(__name__)
CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"
RUN_FILES = {TENSORS, CONFIG, RESULT, CHECKPOINT, LOG}
# what decides the features and the rows of a run, in the words of `fit`
SHOTS = (16, 8, 4, 2, 1)
DATA_OPTIONS = ("model", "spatial", "prompt", "templates", "augment_passes", "test_fraction")


def fit(
    source: str | Path,
    *,
    method: str = "vtclip",
    shots: int | None = None,
    seed: int = 1,
    model: str = "demo",
    spatial: str | None = None,
    prompt: str | None = None,
    templates: Sequence[str] | None = None,
    test_fraction: float = 0.5,
    augment_passes: int = 0,
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

    source: a folder of `class_name/*.jpg`, a FeatureSet folder, or an .npz table of features.
    shots: training images per class; None takes 16, or the next of 8, 4, 2, 1 that every class has
        beside the test share. A named number is never lowered.
    overrides: fields of `FitConfig` that replace the recipe's (epochs, lr, optimizer, ...).
    out: the run's folder; by default runs/SOURCE-METHOD-SHOTSshot-seedSEED. It ends up with
        adapter.safetensors, adapter_config.json, result.json and log.jsonl.

    The zero-shot decision is evaluated on the same test images in the same run.
    """
    pick("method", method, HEADS)
    if shots is not None and shots < 0:
        raise ValueError(f"shots must be at least 0, got {shots}")
    check_seed(seed)
    where = choose_device(device)
    set_threads(threads)
    source = Path(source).expanduser()
    watch = Stopwatch()

    def opened() -> Records:
        with watch.stage("features"):
            return open_source(
                source,
                model=model,
                spatial=spatial,
                prompt=prompt,
                templates=None if templates is None else list(templates),
                augment_passes=augment_passes,
                need_spatial=bool(HEADS[method].needs_spatial),  # type: ignore[attr-defined]
                cache_dir=cache_dir,
                device=str(where),
                progress=progress,
            )

    records: Records | None = None
    if shots is None:
        recipe_config(method, max(SHOTS), overrides)  # what is wrong there is said before the work
        if out is not None:
            check_out(Path(out).expanduser(), source, overwrite=overwrite, resume=resume)
        records = opened()
        shots = usual_shots(records, test_fraction)
    config = recipe_config(method, shots, overrides)
    folder = run_folder(out, source, method, shots, seed)
    check_out(folder, source, overwrite=overwrite, resume=resume)
    options = {
        "source": str(source.resolve()),
        "model": str(model),
        "spatial": spatial,
        "prompt": prompt,
        "templates": None if templates is None else list(templates),
        "augment_passes": augment_passes,
        "test_fraction": test_fraction,
        "fit": dataclasses.asdict(config),
    }
    with removed_if_empty(folder), only_writer(folder):
        if resume and (folder / RESULT).is_file() and not (folder / CHECKPOINT).is_file():
            return finished_run(folder, {"method": method, "shots": shots, "seed": seed}, options)
        if records is None:
            records = opened()
        split = split_rows(records, config, shots, seed, test_fraction)
        torch.manual_seed(seed)
        head = build_head(method, records, config, where)
        zero_shot = build_head("zeroshot", records, RECIPES["zeroshot"](0), where)
        rows = engine.TrainingRows(records, split.train, split.val)
        if config.epochs:
            identity = {
                "method": method,
                "shots": shots,
                "seed": seed,
                "config": options["fit"],
                "head": head.options(),  # type: ignore[operator]
                "split": split.digest,
                "digests": records.info.get("digests", {}),
                "classes": records.class_names,
            }
            checkpoint = Checkpoint(folder / CHECKPOINT, identity)
            go_on = resume and checkpoint.path.is_file()
            with watch.stage("train"), line_log(folder / LOG, append=go_on) as log:
                engine.fit(
                    head,
                    rows,
                    split.train,
                    split.val,
                    config,
                    device=where,
                    seed=seed,
                    log=log,
                    checkpoint=checkpoint,
                    resume=go_on,
                    progress=progress,
                )
        with watch.stage("evaluate"):
            values = {}
            for name, one in ("zero_shot", zero_shot), ("adapted", head):
                temperature = calibrate(one, rows, split.val, where)
                found = engine.evaluate(
                    one, records, split.test, device=where, temperature=temperature
                )
                values[name] = named_classes(dict(found), records.class_names)
        adapter = Adapter(
            head, records.class_names, values["adapted"]["temperature"], features_of(records, model)
        )
        digest = save_adapter(folder, adapter)
        result = {
            "method": method,
            "source": source.name,
            "shots": shots if config.epochs or len(split.val) else 0,
            "seed": seed,
            **values,
            "accuracy": values["adapted"]["accuracy"],
            "seconds": {**watch.seconds, "total": sum(watch.seconds.values())},
            "peak_memory_mb": peak_memory_mb(where),
            "device": device_name(where),
            "versions": versions(),
            "revision": revision(),
            "config": options,
            "digests": {
                **records.info.get("digests", {}),
                "split": split.digest,
                "adapter": digest,
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


def evaluate(
    run: str | Path | Run,
    source: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    threads: int | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """The metrics of a run's adapter: on its own test images, or on all images of another source.

    Where `source` holds the images the run was fitted on, only its test images are counted.
    """
    run = run if isinstance(run, Run) else Run.load(run)
    where = choose_device(device)
    set_threads(threads)
    adapter = load_adapter(run.folder, device=where)
    options = run.result["config"]
    opened = Path(options["source"] if source is None else source).expanduser()
    records = open_source(
        opened,
        **{name: options[name] for name in ("model", "spatial", "prompt", "templates")},
        augment_passes=0,
        need_spatial=bool(adapter.head.needs_spatial),
        cache_dir=cache_dir,
        device=str(where),
        progress=progress,
    )
    check_features(adapter, records)
    if records.info.get("digests", {}).get("images") == run.result["digests"].get("images"):
        config = RECIPES[run.result["method"]](run.result["shots"])
        fraction = options["test_fraction"]
        split = split_rows(records, config, run.result["shots"], run.result["seed"], fraction)
        if split.digest != run.result["split"]:
            raise ValueError(f"{opened}: its split differs from the one the run was fitted with")
        index = split.test
    elif source is None:
        raise ValueError(f"{opened}: its images have changed since the run was fitted")
    else:
        index = torch.arange(len(records))
    to_run = torch.tensor([index_of(name, adapter.class_names) for name in records.class_names])
    seen = engine.all_logits(adapter.head, records, index, device=where)
    values = metrics.report(seen[0], to_run[seen[1]], adapter.temperature)
    return {
        "method": run.result["method"],
        "source": opened.name,
        **named_classes(values, adapter.class_names),
        "test": {"images": len(index), "unreadable": unreadable(records)},
    }


def write_features(
    source: str | Path,
    out: str | Path,
    *,
    model: str = "demo",
    spatial: str | None = "default",
    templates: Sequence[str] | None = None,
    augment_passes: int = 0,
    device: str | torch.device | None = None,
    threads: int | None = None,
    progress: bool = False,
) -> Records:
    """Features of an image folder in the folder `out`, which `fit` then takes as its source."""
    from .data.extract import extract_features

    set_threads(threads)
    found, _ = extract_features(
        source,
        out,
        model=model,
        spatial=spatial,
        templates=None if templates is None else list(templates),
        augment_passes=augment_passes,
        device=choose_device(device),
        progress=progress,
    )
    return found.records()


def set_threads(threads: int | None) -> None:
    if threads is not None:
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        torch.set_num_threads(threads)


def recipe_config(method: str, shots: int, overrides: Mapping[str, Any] | None) -> FitConfig:
    """The recipe's settings with `overrides` in place of some."""
    config = RECIPES[method](shots)
    given = {name: value for name, value in (overrides or {}).items() if value is not None}
    if given and not config.epochs:
        raise ValueError(f"method {method} has no training, so {', '.join(given)} cannot be set")
    for name in given:
        pick("override", name, [field.name for field in dataclasses.fields(FitConfig)])
    if given.get("epochs", 1) < 1:
        raise ValueError(f"epochs must be at least 1, got {given['epochs']}")
    return dataclasses.replace(config, **given)


def choose_device(device: str | torch.device | None) -> torch.device:
    """The named device, or the first GPU where there is one, else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {str(device)!r}") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {chosen}: this torch sees {torch.cuda.device_count()} GPUs")
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {str(device)!r}")
    return chosen


def usual_shots(records: Records, test_fraction: float) -> int:
    """16, or the largest of 8, 4, 2, 1 that every class has beside its test share."""
    counts = torch.bincount(records.label, minlength=len(records.class_names)).tolist()
    smallest = min((count - int(count * test_fraction) for count in counts), default=0)
    shots = next((known for known in SHOTS if known <= smallest), min(SHOTS))
    if shots < max(SHOTS) and test_fraction < 1:
        logger.warning(
            "shots %d: the smallest class has %d images beside the test share", shots, smallest
        )
    return shots


def run_folder(out: str | Path | None, source: Path, method: str, shots: int, seed: int) -> Path:
    if out is not None:
        return Path(out).expanduser()
    name = source.resolve().stem if source.suffix == ".npz" else source.resolve().name
    return Path("runs") / f"{name}-{method}-{shots}shot-seed{seed}"


def check_out(folder: Path, source: Path, *, overwrite: bool, resume: bool) -> None:
    """Refuse an output that would touch the images, a file, or a run nobody asked to replace."""
    if overwrite and resume:
        raise ValueError("overwrite and resume exclude each other")
    if source.is_dir() and folder.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"out {folder} lies inside the source {source}")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"out {folder} exists and is not a folder")
    held = {path.name.removesuffix(".new") for path in folder.iterdir()}
    if held - RUN_FILES and not held & RUN_FILES:
        raise FileExistsError(f"out {folder} exists and is not a run (it holds {min(held)!r})")
    if held and not overwrite and not resume:
        raise FileExistsError(f"out {folder} holds a run already; say overwrite or resume")
    if overwrite:
        (folder / CHECKPOINT).unlink(missing_ok=True)


def finished_run(folder: Path, named: dict[str, Any], options: dict[str, Any]) -> Run:
    """The run that lies in `folder`, if it is the one asked for."""
    run = Run.load(folder)
    wanted = json.loads(to_json({**named, **options}))
    have = {**run.result, **run.result["config"]}
    for name, value in wanted.items():
        if have.get(name) != value and not (name == "shots" and not have["fit"]["epochs"]):
            raise ValueError(f"out {folder} holds a finished run with another {name}")
    logger.info("%s is finished, nothing to resume", folder)
    return run


def split_rows(
    records: Records, config: FitConfig, shots: int, seed: int, test_fraction: float
) -> Split:
    """Train, validation and test rows; a method without training may use every row for the test."""
    if not config.epochs and test_fraction == 1:
        shots = 0
    elif config.epochs and shots < 1:
        raise ValueError(f"shots must be at least 1 to train, got {shots}")
    split = few_shot_split(
        records.label,
        records.names,
        shots=shots,
        seed=seed,
        test_fraction=test_fraction,
        class_names=records.class_names,
    )
    if len(split.test) == 0:
        raise ValueError(f"test_fraction {test_fraction} leaves no test images")
    return split


def build_head(method: str, records: Records, config: FitConfig, device: torch.device) -> nn.Module:
    """The head of `method` over the records' class texts, with the recipe's options."""
    options: dict[str, Any] = {"logit_scale": records.logit_scale, **config.head}
    if HEADS[method].needs_spatial:  # type: ignore[attr-defined]
        options.setdefault("spatial_dim", records.spatial_width)
    return HEADS[method](records.text, **options).to(device)


def calibrate(
    head: nn.Module, rows: engine.TrainingRows, val: Tensor, device: torch.device
) -> float | None:
    """The temperature fitted on the validation images; None where there are none."""
    if len(val) == 0:
        return None
    return metrics.fit_temperature(*engine.all_logits(head, rows, val, device=device))


def named_classes(values: dict[str, Any], class_names: list[str]) -> dict[str, Any]:
    per_class = dict(zip(class_names, values["per_class"], strict=True))
    return {**values, "per_class": per_class}


def features_of(records: Records, model: str) -> dict[str, Any]:
    """What an adapter must know of its features: where they come from and what they look like."""
    info = records.info
    return {
        "model": info.get("model_name", model) if info.get("model") else None,
        "model_config": info.get("model"),
        "weights_digest": info.get("digests", {}).get("weights"),
        "spatial": info.get("spatial"),
        "templates": info.get("templates"),
        "width": records.width,
        "spatial_width": records.spatial_width,
        "logit_scale": records.logit_scale,
        "source": info.get("kind"),
    }


def check_features(adapter: Adapter, records: Records) -> None:
    """Refuse features that are not of the kind the adapter was fitted on, naming what differs."""
    model = adapter.features.get("model") or "unused"
    have = features_of(records, model)
    names = ["weights_digest", "model_config", "spatial", "width", "spatial_width"]
    if not adapter.head.needs_spatial:
        names = [name for name in names if not name.startswith("spatial")]
    for name in names:
        if adapter.features.get(name) != have[name]:
            raise ValueError(
                f"the source has {name} {_brief(have[name])}, the adapter was fitted on "
                f"{_brief(adapter.features.get(name))}"
            )


def _brief(value: Any) -> str:
    text = json_digest(value) if isinstance(value, dict) else str(value)
    return text[:16]


def index_of(name: str, class_names: Sequence[str]) -> int:
    return list(class_names).index(pick("class", name, class_names))


def unreadable(records: Records) -> list[str]:
    """Files of the source that could not be read, as "name: reason"; no number counts them."""
    return [f"{name}: {reason}" for name, reason in records.info.get("skipped", [])]


@contextlib.contextmanager
def removed_if_empty(folder: Path) -> Iterator[None]:
    """Do not leave an empty run folder behind where the work fails before its first file."""
    existed = folder.exists()
    try:
        yield
    except BaseException:
        if not existed:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


class _LineLog:
    """Appends JSON lines; a full disk costs the log, not the run."""

    def __init__(self, path: Path, append: bool) -> None:
        self.path, self.broken = path, False
        if not append:
            path.unlink(missing_ok=True)

    def __call__(self, row: dict[str, Any]) -> None:
        if self.broken:
            return
        line = json.dumps(json.loads(to_json({**row, "time": time.time()}))) + "\n"
        try:
            with open(self.path, "a", encoding="ascii") as file:
                file.write(line)
        except OSError as error:
            self.broken = True
            logger.warning("cannot write %s (%s); the run goes on without it", self.path, error)


@contextlib.contextmanager
def line_log(path: Path, *, append: bool) -> Iterator[_LineLog]:
    yield _LineLog(path, append)
