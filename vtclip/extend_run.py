# SPDX-License-Identifier: Apache-2.0
"""`vtclip.extend`: a run over its own classes and new ones, without training again.

The encoder, its templates, the head's parameters, its hyper-parameters and its temperature stay as
the run has them; what the new classes bring are their texts and, for heads that keep labelled
images, a few of those. vtclip/larger.py says which heads can and what their logits then are.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtclip.heads import Head, Support

from . import engine
from .adapter import Adapter, load_adapter, save_adapter
from .data.records import Records, check_class_names
from .data.sources import source_kind
from .data.splits import Split, few_shot_split
from .encoders import saved_encoders
from .files import json_digest, only_writer, to_json
from .heads.zeroshot import ZeroShot
from .larger import NewClasses, check_can, extended, is_exact, keeps_images, note_of
from .memory import peak_memory_mb
from .parts import Opener, Part, metrics_of, new_classes, sources_of
from .result import (
    RESULT,
    Run,
    Stopwatch,
    device_name,
    environment,
    revision,
    unreadable,
    versions,
)
from .runs import removed_if_empty
from .settings import choose_device, set_threads, usual_shots
from .support import support_of


def extend(
    run: str | Path | Run,
    folder: str | Path,
    *,
    out: str | Path,
    name: str | None = None,
    shots: int | None = None,
    model: str | Path | None = None,
    device: str | torch.device | None = None,
    threads: int | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = False,
) -> Run:
    """A new run in `out` over the classes of `run` and those of `folder`, evaluated once.

    folder: images of one class, called like the folder or `name`; a folder of class folders; or a
        features folder or .npz table of other classes, where the run was fitted on one.
    shots: images per new class for heads that keep images; None takes as many as the run had, or
        the next of 16, 8, 4, 2, 1 that every new class has. Other heads take none. Half of each new
        class is held out, by the run's own rule and share.
    model: another place of the encoder's weights (see vtclip.clip).

    The result has `before` (the run's own classes, told apart among themselves), `old_classes` and
    `new_classes` (test images of either, told apart among all), each zero-shot and adapted, and
    over all test images `zero_shot`, `adapted` and `accuracy`. Zero-shot is the run's encoder with
    the class texts alone, tuned where the run tuned it. `extended_from` names the run by its
    digests. Nothing is written where anything is refused.
    """
    run = run if isinstance(run, Run) else Run.load(run)
    path, target = Path(folder).expanduser(), Path(out).expanduser()
    where = choose_device(device)
    set_threads(threads)
    _check_out(target, run.folder, path)
    _check_run(run)
    if shots is not None and shots < 1:
        raise ValueError(f"shots must be at least 1, got {shots}")
    adapter = load_adapter(run.folder, device=where)
    check_can(adapter.head)
    _check_names(adapter.class_names, path, name)
    watch = Stopwatch(where)
    opener = Opener(run, adapter, where, model, cache_dir, progress)
    with watch.stage("features"):
        old = opener.parts()
        passes = opener.options["augment_passes"] if keeps_images(adapter.head) else 0
        added = opener.added(path, name, passes)
    names = check_class_names([*adapter.class_names, *added.class_names])
    split, shots = _split(run, adapter.head, added, shots)
    K = len(adapter.class_names)
    with watch.stage("extend"):
        support = _support(added, split, K, where)
        fresh = NewClasses(added.class_names, added.text, added.text_views, support, opener.clip)
        head = extended(adapter.head, fresh)
    new = Part(added, split.test, torch.arange(K, len(names)))
    with watch.stage("evaluate"):
        decisions = _Heads(adapter, head, added, run.result["zero_shot"]["temperature"])
        values = _evaluated(decisions, old, new, names, where)
    entry = {
        "source": str(path.resolve()),
        "name": name,
        "classes": added.class_names,
        "shots": shots,
        "learns": keeps_images(adapter.head),
        "images": added.info["digests"]["images"],
        "split": split.digest,
    }
    result = {
        **_kept(run),
        **values,
        "accuracy": values["adapted"]["accuracy"],
        "extension": {"exact": is_exact(adapter.head), "note": note_of(adapter.head)},
        "extended_from": {
            "run": str(run.folder.resolve()),
            "result": json_digest(run.result),
            **{key: run.result["digests"].get(key) for key in ("adapter", "split", "images")},
        },
        "sources": [*sources_of(run), entry],
        "classes": names,
        "images": _counts(run, split),
        "test": {
            "images": sum(len(part.test) for part in (*old, new)),
            "unreadable": [line for part in (*old, new) for line in unreadable(part.records)],
        },
        "seconds": {**watch.seconds, "total": sum(watch.seconds.values())},
        "peak_memory_mb": peak_memory_mb(where),
        "memory_mb": watch.memory_mb,
        "device": device_name(where),
        "environment": environment(where),
        "versions": versions(),
        "revision": revision(),
    }
    larger = Adapter(head, names, adapter.temperature, adapter.features)
    return _saved(target, opener, larger, result)


@dataclass(frozen=True)
class _Heads:
    """Each decision before (over the old classes) and after (over all), and its temperature."""

    adapter: Adapter
    head: Head
    added: Records
    zero_shot_temperature: float | None

    def pairs(self) -> dict[str, tuple[Head, Head, float | None]]:
        old: Any = self.adapter.head
        zero = ZeroShot(old.text, logit_scale=old.logit_scale)
        both = torch.cat([old.text, self.added.text.to(old.text)])
        return {
            "zero_shot": (zero, zero.with_text(both), self.zero_shot_temperature),
            "adapted": (old, self.head, self.adapter.temperature),
        }


def _evaluated(
    heads: _Heads, old: Sequence[Part], new: Part, names: list[str], device: torch.device
) -> dict[str, Any]:
    places = {"before": old, "old_classes": old, "new_classes": [new], "all": [*old, new]}
    found: dict[str, Any] = {place: {} for place in places}
    for which, (before, after, T) in heads.pairs().items():
        for place, parts in places.items():
            head = before if place == "before" else after
            shown = heads.adapter.class_names if place == "before" else names
            found[place][which] = metrics_of(head, parts, shown, T, device)
    return {**found, **found.pop("all")}


def _split(run: Run, head: Head, added: Records, shots: int | None) -> tuple[Split, int]:
    """Held-out and support rows of the new classes, and the shots, 0 for heads that keep none."""
    fraction = run.result["config"]["test_fraction"]
    if not keeps_images(head):
        shots = 0
    elif shots is None:
        shots = _usual(run.result["shots"], added, fraction)
    split = few_shot_split(
        added.label,
        added.names,
        shots=shots,
        seed=run.result["seed"],
        test_fraction=fraction,
        class_names=added.class_names,
    )
    counts = torch.bincount(added.label[split.test], minlength=len(added.class_names))
    if int(counts.min()) == 0:
        k = int(counts.argmin())
        total = int((added.label == k).sum())
        raise ValueError(
            f"extend: class {added.class_names[k]!r} has {total} images, too few to hold out "
            f"{fraction:g} of them"
        )
    return split, shots


def _usual(wanted: int, added: Records, fraction: float) -> int:
    """The run's shots where every new class has them beside its test share, else fewer."""
    counts = torch.bincount(added.label, minlength=len(added.class_names)).tolist()
    enough = min(count - int(count * fraction) for count in counts) >= wanted
    return wanted if enough else min(wanted, usual_shots(added, fraction))


def _support(added: Records, split: Split, K: int, device: torch.device) -> Support | None:
    if len(split.train) == 0:
        return None
    rows = engine.TrainingRows(added, split.train)
    support = support_of(rows, split.train, device)
    return support._replace(label=support.label + K)


def _counts(run: Run, split: Split) -> dict[str, int]:
    parts: dict[str, Tensor] = {role: getattr(split, role) for role in ("train", "val", "test")}
    parts["val"] = parts["val"][:0]  # nothing is chosen again
    return {role: run.result["images"][role] + len(rows) for role, rows in parts.items()}


def _kept(run: Run) -> dict[str, Any]:
    """What an extended run has in common with the run it comes from."""
    names = "method", "source", "shots", "seed", "config", "digests", "split"
    return {name: run.result[name] for name in names}


def _check_run(run: Run) -> None:
    if "config" not in run.result or "split" not in run.result:
        raise ValueError(f"not a vtclip run: {run.folder / RESULT} lacks its config or its split")
    if run.result["config"].get("base_to_new"):
        raise ValueError(
            f"extend: {run.folder} is a base-to-new run, whose other half of the classes is new "
            "already; fit one without base_to_new"
        )


def _check_out(out: Path, run: Path, folder: Path) -> None:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"out {out} exists; give a new folder")
    for what, place in ("run", run), ("folder of new classes", folder):
        if place.is_dir() and out.resolve().is_relative_to(place.resolve()):
            raise ValueError(f"out {out} lies inside the {what} {place}")


def _check_names(known: list[str], path: Path, name: str | None) -> None:
    """Refuse names that the run has already before any image is read."""
    if source_kind(path) == "folder":
        check_class_names([*known, *new_classes(path, name).class_names])


def _saved(out: Path, opener: Opener, adapter: Adapter, result: dict[str, Any]) -> Run:
    with ExitStack() as held:
        held.enter_context(removed_if_empty(out))
        held.enter_context(only_writer(out))
        if adapter.features.get("encoders") is not None:
            held.enter_context(saved_encoders(out, opener.clip()))
        digest = save_adapter(out, adapter)
        result["digests"] = {**result["digests"], "adapter": digest}
    run = Run(out, json.loads(to_json(result)))
    run.save()
    return run
