# SPDX-License-Identifier: Apache-2.0
"""The sources of a run: opened as the run recorded them, checked, evaluated together.

`result.json` of an extended run lists them as `sources`, the one it was first fitted on before the
added ones. Each has its classes, its own images and its own split; all have the run's encoder and
templates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtclip.data.folders import is_ignored, scan_folder, walk_images
from vtclip.data.formats import is_image_name
from vtclip.data.image_datasets import is_saved_dataset
from vtclip.data.image_files import ImageFiles
from vtclip.data.listed import list_images
from vtclip.data.options import Draw, FeatureOptions
from vtclip.data.records import Records, check_class_names
from vtclip.data.sets import AnySource, SetSource, as_source
from vtclip.data.sources import open_records, source_kind
from vtclip.files import Json
from vtclip.heads import HEADS, Head
from vtclip.names import index_of
from vtclip.runs.adapter import Adapter, check_features
from vtclip.runs.encoders import load_encoders
from vtclip.runs.result import Run, named_classes, unreadable
from vtclip.train import engine, metrics
from vtclip.train.rows import split_rows, test_rows

if TYPE_CHECKING:
    from vtclip.clip import Clip


@dataclass(frozen=True)
class SourceRows:
    """One source: its rows, which of them are test rows, the run's label of each of its classes."""

    records: Records
    test: Tensor
    to_run: Tensor


@dataclass
class RunSources:
    """What every source of one run is opened with. The encoder is loaded when it is first used."""

    run: Run
    adapter: Adapter
    device: torch.device
    model: str | Path | None = None
    cache_dir: str | Path | None = None
    progress: bool = False
    loaded: Clip | None = None

    @property
    def options(self) -> Json:
        return dict(self.run.result["config"])

    def clip(self) -> Clip:
        if self.loaded is None:
            self.loaded = load_encoders(self.run.folder, self.adapter, self.model, self.device)
        return self.loaded

    def rows(self, data: str | Path | None = None) -> list[SourceRows]:
        """All sources of the run; an error where one has changed since."""
        rows: list[SourceRows] = []
        for number, entry in enumerate(sources_of(self.run)):
            if number == 0:
                records = self.opened(as_source(entry["source"], data or self.options.get("data")))
            else:
                records = self.added(Path(entry["source"]), entry["name"])
            rows.append(SourceRows(records, self.test_rows(entry, records), self.labels(records)))
        return rows

    def opened(self, source: AnySource) -> Records:
        """Plain rows of any source, of features that the adapter takes; of its own set its draw."""
        folder = not isinstance(source, SetSource) and source_kind(source) == "folder"
        images = isinstance(source, SetSource) or folder
        if images and self.adapter.features.get("model") is None:
            raise ValueError(
                f"{source}: the run was fitted on a table of features and has no image encoder; "
                "give an .npz table of the same width"
            )
        result, draw = self.run.result, Draw(0, self.run.result["seed"])
        if isinstance(source, SetSource) and source.name == self.options["source"]:
            pool = bool(self.options.get("pseudo_labels"))
            draw = Draw(result["shots"], result["seed"], pool)
        options = FeatureOptions(
            model=self.clip() if images else "demo",
            **{name: self.options[name] for name in ("spatial", "prompt", "templates")},
            class_names=self.options.get("class_names") if images else None,
            need_spatial=self.adapter.head.needs_spatial,
            cache_dir=self.cache_dir,
            device=str(self.device),
            progress=self.progress,
        )
        records = open_records(source, options, draw)
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
        from vtclip.data.extract import cached_features

        options = FeatureOptions(
            model=self.clip(),
            spatial=features["spatial"] if self.adapter.head.needs_spatial else None,
            templates=features["templates"],
            augment_passes=augment_passes,
            cache_dir=self.cache_dir,
            device=self.device,
            progress=self.progress,
        )
        records = cached_features(new_classes(path, name), options)[0].records()
        check_features(self.adapter, records)
        return records

    def other(self, source: AnySource) -> SourceRows:
        """Any source with classes of the run; of one of its own only the test rows count."""
        records = self.opened(source)
        digest = records.info.get("digests", {}).get("images")
        known = [entry for entry in sources_of(self.run) if entry["images"] == digest]
        index = self.test_rows(known[0], records) if known else test_rows(records)
        return SourceRows(records, index, self.labels(records))

    def test_rows(self, entry: Json, records: Records) -> Tensor:
        """The test rows of one source, which must be what it was."""
        if records.info.get("digests", {}).get("images") != entry["images"]:
            raise ValueError(f"{entry['source']}: its images have changed since the run was fitted")
        seed, fraction = self.run.result["seed"], self.options["test_fraction"]
        split = split_rows(records, entry["learns"], entry["shots"], seed, fraction)
        if split.digest != entry["split"]:
            raise ValueError(
                f"{entry['source']}: its split differs from the one the run was fitted with"
            )
        return split.test

    def labels(self, records: Records) -> Tensor:
        """The run's label of each of the records' classes."""
        names = self.adapter.class_names
        return torch.tensor([index_of(name, names) for name in records.class_names])


def sources_of(run: Run) -> list[Json]:
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
            "learns": labelled and HEADS[result["method"]].learns,
            "images": digests.get("images"),
            "split": result["split"],
        }
    ]


def new_classes(path: Path, name: str | None) -> ImageFiles:
    """One class where `path` holds images or `name` is given, else one class per folder in it.

    A list or a saved dataset has the classes that it names.

    Image names start with the folder's own name, as they would in a folder of both: which of them
    are test images does not depend on how they came.
    """
    path = path.resolve()
    if path.is_file() or is_saved_dataset(path):
        if name is not None:
            raise ValueError(f"extend: name is for a folder of images, got {path}")
        return list_images(path)
    entries = [entry for entry in path.iterdir() if not is_ignored(entry.name)]
    loose = any(is_image_name(entry.name) for entry in entries)
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
    return ImageFiles(root, classes, below, [0] * len(below), passed)


def metrics_over(
    head: Head,
    sources: Sequence[SourceRows],
    class_names: Sequence[str],
    temperature: float | None,
    device: torch.device,
) -> Json:
    """Metrics of one head over the test rows of all `sources` together."""
    logits, label = [], []
    for rows in sources:
        row_logits, row_label = engine.all_logits(head, rows.records, rows.test, device=device)
        logits.append(row_logits)
        label.append(rows.to_run[row_label])
    values = metrics.all_metrics(torch.cat(logits), torch.cat(label), temperature)
    return named_classes(values, list(class_names))


def evaluate_sources(sources: RunSources, source: object, data: str | Path | None) -> Json:
    """Metrics of an extended run: all its test images, or those of `source`.

    Of a source that the run was made with only the test rows count. Without `source` there are
    also `old_classes`, the metrics of the first source, and `new_classes`.
    """
    adapter = sources.adapter

    def report(rows: Sequence[SourceRows]) -> Json:
        names, T = adapter.class_names, adapter.temperature
        return metrics_over(adapter.head, rows, names, T, sources.device)

    if source is None:
        rows = sources.rows(data)
        name = Path(sources.run.result["source"]).name
        values = {**report(rows), "old_classes": report(rows[:1]), "new_classes": report(rows[1:])}
    else:
        target = as_source(source, data)
        name, rows = target.name, [sources.other(target)]
        values = report(rows)
    return {
        "method": sources.run.result["method"],
        "source": name,
        **values,
        "test": {
            "images": sum(len(group.test) for group in rows),
            "unreadable": [line for group in rows for line in unreadable(group.records)],
        },
    }
