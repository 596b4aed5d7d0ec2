# SPDX-License-Identifier: Apache-2.0
"""The sources of a run whose classes came one after another: opened, checked, evaluated together.

`result.json` of an extended run lists them as `sources`, the one it was first fitted on before the
added ones. Each has its classes, its own images and its own split; all have the run's encoder and
templates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import engine, metrics
from .adapter import Adapter, check_features
from .choices import index_of
from .data.images import EXTENSIONS, Folder, is_ignored, scan_folder, walk_images
from .data.options import FeatureOptions
from .data.records import Records, check_class_names
from .data.sets import SetSource, as_source
from .data.sources import open_source, source_kind
from .encoders import load_encoders
from .result import Run, named_classes, unreadable
from .settings import split_rows, takes_images, test_rows

if TYPE_CHECKING:
    from .clip import Clip


@dataclass(frozen=True)
class Part:
    """The rows of one source, those that count, and the run's label of each of its classes."""

    records: Records
    test: Tensor
    to_run: Tensor


@dataclass
class Opener:
    """What every source of one run is opened with. The encoder is loaded when it is first used."""

    run: Run
    adapter: Adapter
    device: torch.device
    model: str | Path | None = None
    cache_dir: str | Path | None = None
    progress: bool = False
    loaded: Clip | None = None

    @property
    def options(self) -> dict[str, Any]:
        found: dict[str, Any] = self.run.result["config"]
        return found

    @property
    def needs_spatial(self) -> bool:
        return bool(self.adapter.head.needs_spatial)

    def clip(self) -> Clip:
        if self.loaded is None:
            self.loaded = load_encoders(self.run.folder, self.adapter, self.model, self.device)
        return self.loaded

    def parts(self, data: str | Path | None = None) -> list[Part]:
        """All sources of the run; an error where one has changed since."""
        found: list[Part] = []
        for number, entry in enumerate(sources_of(self.run)):
            if number == 0:
                records = self.first_source(entry, data)
            else:
                records = self.added(Path(entry["source"]), entry["name"])
            index = self.test_rows(entry, records)
            found.append(Part(records, index, self.labels(records.class_names)))
        return found

    def first_source(self, entry: Mapping[str, Any], data: str | Path | None) -> Records:
        source = as_source(entry["source"], data or self.options.get("data"))
        pool = bool(self.options.get("pseudo_labels"))
        return self.opened(source, shots=self.run.result["shots"], pool=pool)

    def opened(self, source: Path | SetSource, *, shots: int = 0, pool: bool = False) -> Records:
        """Plain rows of any source, of features that the adapter takes."""
        folder = not isinstance(source, SetSource) and source_kind(source) == "folder"
        images = isinstance(source, SetSource) or folder
        if images and self.adapter.features.get("model") is None:
            raise ValueError(
                f"{source}: the run was fitted on a table of features and has no image encoder; "
                "give an .npz table of the same width"
            )
        records = open_source(
            source,
            model=self.clip() if images else "demo",
            **{name: self.options[name] for name in ("spatial", "prompt", "templates")},
            need_spatial=self.needs_spatial,
            shots=shots if isinstance(source, SetSource) else 0,
            pool=pool and isinstance(source, SetSource),
            seed=self.run.result["seed"],
            cache_dir=self.cache_dir,
            device=str(self.device),
            progress=self.progress,
        )
        check_features(self.adapter, records)
        return records

    def added(self, path: Path, name: str | None, augment_passes: int = 0) -> Records:
        """The rows of new classes: a folder of one class, of class folders, or a table."""
        kind = source_kind(path)
        if kind != "folder":
            if name is not None:
                raise ValueError(f"extend: name is for a folder of images, got {path}")
            return self.opened(path)
        features = self.adapter.features
        if features.get("model") is None:
            raise ValueError(
                f"extend: the run was fitted on a table of features and has no image encoder; the "
                f"new classes must come from an .npz table of width {features['width']}, "
                f"got {path}"
            )
        from .data.extract import cached_features

        options = FeatureOptions(
            model=self.clip(),
            spatial=features["spatial"] if self.needs_spatial else None,
            templates=features["templates"],
            augment_passes=augment_passes,
            cache_dir=self.cache_dir,
            device=self.device,
            progress=self.progress,
        )
        made, _ = cached_features(new_classes(path, name), options)
        records = made.records()
        check_features(self.adapter, records)
        return records

    def other(self, source: Path | SetSource, data: str | Path | None) -> Part:
        """Any source with classes of the run; of one of its own only the test rows count."""
        entries = sources_of(self.run)
        own = isinstance(source, SetSource) and source.name == entries[0]["source"]
        records = self.first_source(entries[0], data) if own else self.opened(source)
        known = [e for e in entries if e["images"] == records.info["digests"]["images"]]
        index = self.test_rows(known[0], records) if known else test_rows(records)
        return Part(records, index, self.labels(records.class_names))

    def labels(self, class_names: Sequence[str]) -> Tensor:
        return torch.tensor([index_of(name, self.adapter.class_names) for name in class_names])

    def test_rows(self, entry: Mapping[str, Any], records: Records) -> Tensor:
        """The test rows of one source, which must be what it was."""
        if records.info["digests"]["images"] != entry["images"]:
            raise ValueError(f"{entry['source']}: its images have changed since the run was made")
        seed, fraction = self.run.result["seed"], self.options["test_fraction"]
        split = split_rows(records, entry["learns"], entry["shots"], seed, fraction)
        if split.digest != entry["split"]:
            raise ValueError(f"{entry['source']}: its split differs from the one of the run")
        return split.test


def sources_of(run: Run) -> list[dict[str, Any]]:
    """Where the classes of a run came from, first to last."""
    result = run.result
    if "sources" in result:
        return list(result["sources"])
    digests, labelled = result["digests"], not result["config"].get("pseudo_labels")
    return [
        {
            "source": result["config"]["source"],
            "name": None,
            "classes": result["classes"],
            "shots": result["shots"] if labelled else 0,
            "learns": labelled and takes_images(result["method"]),
            "images": digests.get("images"),
            "split": result["split"],
        }
    ]


def new_classes(path: Path, name: str | None) -> Folder:
    """One class where `path` holds images or `name` is given, else one class per folder in it.

    Image names start with the folder's own name, as they would in a folder of both: which of them
    are test images does not depend on how they came.
    """
    path = path.resolve()
    entries = [entry for entry in path.iterdir() if not is_ignored(entry.name)]
    loose = any(entry.suffix.lower() in EXTENSIONS for entry in entries)
    folders = any(entry.is_dir() for entry in entries)
    if name is None and loose and folders:
        raise ValueError(
            f"extend: {path} holds images and folders; name makes all of them one class"
        )
    if name is None and not loose:
        return scan_folder(path)
    names, skipped = walk_images(path)
    if not names:
        raise ValueError(f"extend: {path} holds no images")
    root = path.parent
    below = [file.relative_to(root).as_posix() for file in names]
    passed = [(Path(file).relative_to(root).as_posix(), why) for file, why in skipped]
    classes = check_class_names([path.name if name is None else name])
    return Folder(root, classes, below, [0] * len(below), passed)


def metrics_of(
    head: nn.Module,
    parts: Sequence[Part],
    class_names: Sequence[str],
    temperature: float | None,
    device: torch.device,
) -> dict[str, Any]:
    """Metrics of one head over the test rows of all `parts` together."""
    logits, label = [], []
    for part in parts:
        seen, own = engine.all_logits(head, part.records, part.test, device=device)
        logits.append(seen)
        label.append(part.to_run[own])
    values = metrics.report(torch.cat(logits), torch.cat(label), temperature)
    return named_classes(values, list(class_names))


def evaluate_parts(
    opener: Opener, source: str | Path | SetSource | None, data: str | Path | None
) -> dict[str, Any]:
    """Metrics of an extended run: all its test images, or those of `source`.

    Of a source that the run was made with only the test rows count. Without `source` the answer
    also holds `old_classes`, those of the first source, and `new_classes`.
    """
    adapter = opener.adapter

    def report(parts: Sequence[Part]) -> dict[str, Any]:
        names, T = adapter.class_names, adapter.temperature
        return metrics_of(adapter.head, parts, names, T, opener.device)

    if source is None:
        parts = opener.parts(data)
        name = Path(opener.run.result["source"]).name
        found = {
            **report(parts),
            "old_classes": report(parts[:1]),
            "new_classes": report(parts[1:]),
        }
    else:
        opened = as_source(source, data)
        name, parts = opened.name, [opener.other(opened, data)]
        found = report(parts)
    broken = [line for part in parts for line in unreadable(part.records)]
    images = sum(len(part.test) for part in parts)
    return {
        "method": opener.run.result["method"],
        "source": name,
        **found,
        "test": {"images": images, "unreadable": broken},
    }
