# SPDX-License-Identifier: Apache-2.0
"""`vtclip.fit` and `vtclip.evaluate`: from labelled images to a run folder with numbers.

The command line calls these two with the same names and defaults.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vtclip.heads.config import check_seed
from vtclip.methods import build_head, check_text_encoder, recipe_config, takes_images

from . import engine, metrics
from .adapter import Adapter, check_features, features_of, load_adapter, save_adapter
from .auto import fit_auto
from .base_to_new import check_method, evaluate_again, halves, with_new
from .checkpoint import Checkpoint
from .data.records import Records
from .data.sets import SetSource, as_source
from .data.sources import open_source
from .distributed import device_of_rank, joined
from .encoders import load_encoders
from .files import only_writer, to_json
from .fitting import calibrate, fit_head
from .heads import HEADS
from .memory import peak_memory_mb
from .names import SHOTS, index_of, pick
from .parts import Opener, evaluate_parts
from .pseudo_labels import check_pseudo_labels, pseudo_labelled, pseudo_report, unlabelled_split
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
from .settings import (
    choose_device,
    set_threads,
    split_rows,
    test_rows,
    usual_shots,
)
from .ttt import TTT
from .ttt_report import check_ttt, ttt_report

__all__ = ["Run", "evaluate", "fit", "write_features"]


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
        (vtclip.auto); with train_encoders or base_to_new, which that cannot do, it is "rada".
    shots: training images per class; None takes 16, or the next of 8, 4, 2, 1 that every class has
        beside the test share. A named number is never lowered.
    train_encoders: train both towers together with the head (method "rada", an image folder; see
        vtclip.finetune). The run then also holds encoders.safetensors.
    base_to_new: train on the first half of the classes, test on either half (vtclip.base_to_new).
    pseudo_labels: train on `shots` images per class that zero-shot names surest, not on labelled
        ones (vtclip.pseudo_labels); without validation images, and so without a temperature.
    overrides: fields of `FitConfig` that replace the recipe's (epochs, lr, optimizer, ...; `head`:
        options of the head, such as {"adapters": True}, which are added to the recipe's), with
        train_encoders of `FinetuneConfig` (vtclip/finetune_config.py).
    out: the run's folder; by default runs/SOURCE-METHOD-SHOTSshot-seedSEED. It ends up with
        adapter.safetensors, adapter_config.json, result.json and log.jsonl.

    The zero-shot decision is evaluated on the same test images in the same run.
    """
    if method is None:
        method = "rada" if train_encoders or base_to_new else "auto"
    pick("method", method, HEADS)
    if shots is not None and shots < 0:
        raise ValueError(f"shots must be at least 0, got {shots}")
    check_seed(seed)
    where = choose_device(device)
    set_threads(threads)
    if pseudo_labels:
        check_pseudo_labels(method, shots, base_to_new=base_to_new, train_encoders=train_encoders)
        shots = max(SHOTS) if shots is None else shots
    source = as_source(source, data)
    if isinstance(source, SetSource):
        fraction = test_fraction if test_fraction != 0.5 else None
        source.refuse(train_encoders=train_encoders, prompt=prompt, test_fraction=fraction)
        if shots is None:
            shots = 0 if source.spec.test_only else max(SHOTS)
    elif train_encoders:
        from .finetune_run import fit_encoders, refuse

        refuse(
            {
                "records": records,
                "spatial": spatial,
                "prompt": prompt,
                "augment_passes": augment_passes,
                "base_to_new": base_to_new,
            }
        )
        return fit_encoders(
            source,
            method=method,
            shots=shots,
            seed=seed,
            model=model,
            templates=templates,
            test_fraction=test_fraction,
            overrides=overrides or {},
            out=out,
            overwrite=overwrite,
            resume=resume,
            device=device,
            cache_dir=cache_dir,
            progress=progress,
        )
    if base_to_new:
        check_method(method, overrides)
    watch = Stopwatch(where)

    def opened() -> Records:
        with watch.stage("features"):
            if given is not None:
                return given
            return open_source(
                source,
                model=model,
                spatial=spatial,
                prompt=prompt,
                templates=None if templates is None else list(templates),
                augment_passes=augment_passes,
                need_spatial=HEADS[method].needs_spatial,
                shots=shots or 0,
                seed=seed,
                pool=pseudo_labels,
                cache_dir=cache_dir,
                device=str(where),
                progress=progress,
            )

    given, records = records, None
    if given is not None and not given.has_spatial and HEADS[method].needs_spatial:
        raise ValueError(f"method {method} needs spatial features, which records do not have")
    if shots is None:
        recipe_config(method, max(SHOTS), overrides)  # what is wrong there is said before the work
        if out is not None:
            check_out(Path(out).expanduser(), source, overwrite=overwrite, resume=resume)
        records = opened()
        base = halves(records)[0] if base_to_new else records
        shots = usual_shots(base, test_fraction)
    config, learns = recipe_config(method, shots, overrides), takes_images(method)
    name = f"{method}-base-to-new" if base_to_new else method
    folder = run_folder(out, source, name, shots, seed)
    check_out(folder, source, overwrite=overwrite, resume=resume)
    options = {
        "source": str(source.resolve()),
        "data": str(source.root.resolve()) if isinstance(source, SetSource) else None,
        "shots": shots,
        "model": str(model),
        "spatial": spatial,
        "prompt": prompt,
        "templates": None if templates is None else list(templates),
        "augment_passes": augment_passes,
        "test_fraction": test_fraction,
        "base_to_new": base_to_new,
        "pseudo_labels": pseudo_labels,
        "fit": dataclasses.asdict(config),
    }
    with removed_if_empty(folder), only_writer(folder):
        if resume and (folder / RESULT).is_file() and not (folder / CHECKPOINT).is_file():
            return finished_run(folder, {"method": method, "shots": shots, "seed": seed}, options)
        if records is None:
            records = opened()
        new_records = None
        if base_to_new:
            records, new_records = halves(records)
        check_text_encoder(method, records)
        if pseudo_labels:
            split = unlabelled_split(records, seed, test_fraction)
            training, split = pseudo_labelled(records, split, shots, where)
        else:
            split = split_rows(records, learns, shots, seed, test_fraction)
            training = records
        zero_shot = build_head("zeroshot", records, HEADS["zeroshot"].recipe(0), where)
        rows = engine.TrainingRows(records, split.train, split.val)
        identity = {
            "method": method,
            "shots": shots,
            "seed": seed,
            "config": options["fit"],
            "split": split.digest,
            "pseudo_labels": pseudo_labels,
            "digests": records.info.get("digests", {}),
            "classes": records.class_names,
        }
        checkpoint = Checkpoint(folder / CHECKPOINT, identity)
        go_on = resume and checkpoint.path.is_file()
        with watch.stage("train"), line_log(folder / LOG, append=go_on) as log:
            common: dict[str, Any] = {"device": where, "seed": seed, "log": log}
            common["progress"] = progress
            compared: dict[str, Any] = {}
            head: nn.Module
            if method == "auto":
                head, compared["candidates"] = fit_auto(training, split, shots, **common)
            else:
                common |= {"checkpoint": checkpoint, "resume": go_on}
                head = fit_head(method, training, split, config, **common)
        with watch.stage("evaluate"):
            values = {}
            for name, one in ("zero_shot", zero_shot), ("adapted", head):
                temperature = calibrate(one, rows, split.val, where)
                found = engine.evaluate(
                    one, records, split.test, device=where, temperature=temperature
                )
                values[name] = named_classes(dict(found), records.class_names)
            both = {}
            if new_records is not None:
                heads = {"zero_shot": zero_shot, "adapted": head}
                both = with_new(values, heads, new_records, seed, test_fraction, where)
        adapter = Adapter(
            head, records.class_names, values["adapted"]["temperature"], features_of(records, model)
        )
        digest = save_adapter(folder, adapter)
        result = {
            "method": method,
            "source": source.name,
            "shots": shots if learns or len(split.val) else 0,
            "seed": seed,
            **values,
            "accuracy": values["adapted"]["accuracy"],
            "seconds": {**watch.seconds, "total": sum(watch.seconds.values())},
            "peak_memory_mb": peak_memory_mb(where),
            "memory_mb": watch.memory_mb,
            "device": device_name(where),
            "environment": environment(where),
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
            **both,
            **compared,
            **(pseudo_report(training, records, split) if pseudo_labels else {}),
        }
        run = Run(folder, json.loads(to_json(result)))
        run.save()
        (folder / CHECKPOINT).unlink(missing_ok=True)
    return run


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
) -> dict[str, Any]:
    """The metrics of a run's adapter: on its own test images, or on all images of another source.

    Where `source` holds the images the run was fitted on, only its test images are counted.
    data: the folder of the field's data sets, where `source` is the name of one: its test list is
        counted, over its own classes where the run has more.
    ttt: train on each unlabelled image first (vtclip.ttt), which needs a folder of images; the
        answer's "ttt" then holds the metrics with it and those of averaged views without it.
    """
    run = run if isinstance(run, Run) else Run.load(run)
    where = choose_device(device)
    set_threads(threads)
    adapter = load_adapter(run.folder, device=where)
    options = run.result["config"]
    if "sources" in run.result:
        if ttt is not None:
            raise ValueError("ttt: an extended run is evaluated without it")
        opener = Opener(run, adapter, where, cache_dir=cache_dir, progress=progress)
        return evaluate_parts(opener, source, data)
    if adapter.features.get("encoders") is not None:
        options = {**options, "model": load_encoders(run.folder, adapter, None, where)}
    if source is None:
        opened = as_source(options["source"], data or options.get("data"))
    else:
        opened = as_source(source, data)
    own = options.get("data") is not None and opened.name == options["source"]
    if ttt is not None:
        if isinstance(opened, SetSource):
            raise ValueError(f"ttt: source must be a folder of images, got data set {opened}")
        check_ttt(adapter, opened)
        if options.get("base_to_new"):
            raise ValueError("ttt: a base-to-new run is evaluated without it")
    records = open_source(
        opened,
        **{name: options[name] for name in ("model", "spatial", "prompt", "templates")},
        augment_passes=0,
        need_spatial=bool(adapter.head.needs_spatial),
        shots=run.result["shots"] if own else 0,
        seed=run.result["seed"],
        pool=own and bool(options.get("pseudo_labels")),
        cache_dir=cache_dir,
        device=str(where),
        progress=progress,
    )
    check_features(adapter, records)
    if options.get("base_to_new"):
        return evaluate_again(adapter, run.result, records, opened, device=where)
    if records.info.get("digests", {}).get("images") == run.result["digests"].get("images"):
        learns, fraction = takes_images(run.result["method"]), options["test_fraction"]
        count = run.result["shots"]
        if options.get("pseudo_labels"):
            learns, count = False, 0
        split = split_rows(records, learns, count, run.result["seed"], fraction)
        if split.digest != run.result["split"]:
            raise ValueError(f"{opened}: its split differs from the one the run was fitted with")
        index = split.test
    elif source is None:
        raise ValueError(f"{opened}: its images have changed since the run was fitted")
    else:
        index = test_rows(records)
    to_run = torch.tensor([index_of(name, adapter.class_names) for name in records.class_names])
    logits, label = engine.all_logits(adapter.head, records, index, device=where)
    names = adapter.class_names
    if isinstance(opened, SetSource):  # told apart among its own classes
        logits, names = logits[:, to_run], records.class_names
    else:
        label = to_run[label]
    values = metrics.report(logits, label, adapter.temperature)
    found = {
        "method": run.result["method"],
        "source": opened.name,
        **named_classes(values, names),
        "test": {"images": len(index), "unreadable": unreadable(records)},
    }
    if ttt is None or isinstance(opened, SetSource):
        return found
    files = [records.names[row] for row in index.tolist()]
    rows = ttt_report(
        adapter, options["model"], opened, files, label, ttt, device=where, progress=progress
    )
    return {**found, "ttt": rows}


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
    """Features of an image folder in the folder `out`, which `fit` then takes as its source.

    Processes that torchrun started share the work, and each answers the same.
    """
    from .data.extract import extract_features

    set_threads(threads)
    where = choose_device(device)
    named = device is not None and torch.device(device).index is not None
    where = device_of_rank(where, named)
    with joined(where) as world:
        found, _ = extract_features(
            source,
            out,
            model=model,
            spatial=spatial,
            templates=None if templates is None else list(templates),
            augment_passes=augment_passes,
            device=where,
            progress=progress and world.first,
            world=world,
        )
    return found.records()
