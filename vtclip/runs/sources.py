# SPDX-License-Identifier: Apache-2.0
"""The sources of a run: opened as the run recorded them, checked, evaluated together.

`result.json` of an extended run lists them as `sources`, the one it was first fitted on before the
added ones. Each has its classes, its own images and its own split; all have the run's encoder and
templates.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtclip.clip.texts import is_per_class
from vtclip.data.class_names import with_class_names
from vtclip.data.image_files import IN_MEMORY, ImageFiles, InMemory
from vtclip.data.listed import list_images
from vtclip.data.options import Draw, FeatureOptions
from vtclip.data.records import Records
from vtclip.data.sets import AnySource, SetSource, as_source, source_name
from vtclip.data.sources import open_records, source_kind
from vtclip.files import Json, printable
from vtclip.heads import HEADS, Head
from vtclip.names import as_known, index_of, nearest, option, pick
from vtclip.runs.adapter import Adapter, check_features
from vtclip.runs.counted import (
    Counted,
    LeftOut,
    check_some,
    count_other,
    count_own,
    near_copies,
    with_gone,
)
from vtclip.runs.encoders import load_encoders
from vtclip.runs.new_classes import NewSource, new_classes
from vtclip.runs.result import Run, named_classes, unreadable
from vtclip.runs.seen import Seen
from vtclip.runs.unlisted import seen_of_old
from vtclip.train import engine, metrics
from vtclip.train.rows import test_rows

if TYPE_CHECKING:
    from vtclip.clip import Clip

logger = logging.getLogger(__name__)
_UNKNOWN = (
    "{source}: its images have changed since the run was fitted, and the run is from before runs "
    "kept a list of theirs, so that it is not known which of them trained; fit it again"
)


@dataclass(frozen=True)
class SourceRows:
    """One source: its rows, which of them count, the run's label of each of its classes."""

    records: Records
    test: Tensor
    to_run: Tensor
    left_out: LeftOut = field(default_factory=LeftOut)


@dataclass(frozen=True)
class Opened:
    """Rows of classes that the run knows, and what was left out for others."""

    records: Records
    left_out: LeftOut


@dataclass
class RunSources:
    """What every source of one run is opened with. The encoder is loaded when it is first used."""

    run: Run
    adapter: Adapter
    device: torch.device
    model: str | Path | None = None
    cache_dir: str | Path | None = None
    progress: bool = False
    follow_links: bool = False
    batch_size: int = 64
    loaded: Clip | None = None

    @property
    def options(self) -> Json:
        return dict(self.run.result["config"])

    @cached_property
    def class_names(self) -> list[str]:
        """All classes that the run can name, those of the other half of a base-to-new run too."""
        new = self.run.result.get("new", {}) if self.options.get("base_to_new") else {}
        return [*self.adapter.class_names, *new.get("classes", [])]

    @cached_property
    def seen(self) -> Seen | None:
        """What the run saw; None for an older run where that cannot be known for certain."""
        entry = self.run.result.get("seen")
        if entry is not None:
            seen = Seen.read(self.run.folder, entry)
            if seen.knows_contents:
                return seen
        return seen_of_old(self.run, sources_of(self.run), self.cache_dir)

    def clip(self) -> Clip:
        if self.loaded is None:
            self.loaded = load_encoders(self.run.folder, self.adapter, self.model, self.device)
        return self.loaded

    def rows(self, data: str | Path | None = None) -> list[SourceRows]:
        """All sources of the run as they are now, with the run's own test images."""
        rows: list[SourceRows] = []
        entries = sources_of(self.run)
        left = {} if self.seen is None else dict(self.seen.tested())
        first = self.own_source(data)
        for number, entry in enumerate(entries):
            source: AnySource = Path(entry["source"]) if number else first
            if isinstance(source, Path) and not source.expanduser().exists():
                raise ValueError(
                    f"the test images of the run were in {printable(str(source))}, which is gone; "
                    f"bring them back, or evaluate what moved by naming it as {option('source')}"
                )
            if isinstance(source, SetSource):
                opened = self.opened(source)
                counted = self.listed(opened, source, entry)
            else:
                if self.seen is None:
                    raise ValueError(_UNKNOWN.format(source=source))
                if number:
                    opened = Opened(self.added(self.new_source(entry)), LeftOut())
                else:
                    opened = self.opened(source, own=True)
                counted = count_own(opened.records, self.seen, opened.left_out, left)
            rows.append(self.source_rows(opened.records, counted))
        if self.seen is not None and not isinstance(first, SetSource):
            found = sum(len(part.test) for part in rows)
            last = with_gone(rows[-1].left_out, self.seen, found)
            rows[-1] = replace(rows[-1], left_out=last)
        return rows

    def own_source(self, data: str | Path | None = None) -> AnySource:
        """Where the run's own test images were: the source of its fit, or what --test named."""
        role = "test" if self.options.get("test") else "source"
        place = self.options[role]
        way = f"evaluate takes them as {option('source')}, and extend needs a run on files"
        check_listable(self.run, role, way)
        return as_source(place, data or self.options.get("data"))

    def other(self, source: AnySource) -> SourceRows:
        """Any source with classes of the run, without what the run trained or validated on."""
        if isinstance(source, SetSource):
            opened = self.opened(source)
            return self.source_rows(opened.records, self.listed(opened, source, None))
        if self.seen is None:
            own = [Path(entry["source"]).expanduser() for entry in sources_of(self.run)]
            if source.resolve() in [place.resolve() for place in own]:
                raise ValueError(_UNKNOWN.format(source=source))
            logger.warning(
                "%s is from before runs kept a list of their images, and its source has changed: "
                "images of %s that it trained on cannot be told apart and are counted",
                printable(str(self.run.folder)), printable(str(source)),
            )  # fmt: skip
        opened = self.opened(source)
        counted = count_other(opened.records, self.seen, opened.left_out)
        if self.seen is not None:
            self._say_near(source, near_copies(opened.records, counted.rows, self.seen))
        rows = self.source_rows(opened.records, counted)
        here = set(rows.to_run[rows.records.label[rows.test]].tolist())
        absent = [name for k, name in enumerate(self.class_names) if k not in here]
        if absent and here:
            more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
            logger.warning(
                "%s: no counted image for %d of the run's %d classes: %s%s; the numbers are of the "
                "other classes", printable(str(source)), len(absent), len(self.class_names),
                ", ".join(printable(name) for name in absent[:5]), more,
            )  # fmt: skip
        return rows

    def _say_near(self, source: object, pairs: Sequence[tuple[str, str]]) -> None:
        if not pairs:
            return
        are = "images look" if len(pairs) > 1 else "image looks"
        logger.warning(
            "%d of the counted %s nearly like images that the run trained or validated on, e.g. %s "
            "like %s; remove them from %s if they are copies, which flatter the numbers",
            len(pairs), are, *map(printable, pairs[0]), printable(str(source)),
        )  # fmt: skip

    def source_rows(self, records: Records, counted: Counted) -> SourceRows:
        return SourceRows(records, counted.rows, self.labels(records), counted.left_out)

    def listed(self, opened: Opened, source: SetSource, entry: Json | None) -> Counted:
        """The official test list of a data set, whole; of the run's own it must be that of then."""
        records = opened.records
        if entry is not None and records.info.get("digests", {}).get("images") != entry["images"]:
            raise ValueError(f"{source}: its images have changed since the run was fitted")
        counted = Counted(test_rows(records), opened.left_out)
        if source.name != self.options["source"] and self.seen and records.digests:
            roles = self.seen.roles_of(records.digests, getattr(records, "pixels", None))
            fitted = sum(roles[row] in ("train", "val") for row in counted.rows.tolist())
            if fitted:
                logger.warning(
                    "%d test images of %s have the content of images that the run trained or "
                    "validated on; its official list is counted whole", fitted, source.name,
                )  # fmt: skip
        return counted

    def opened(self, source: AnySource, own: bool = False) -> Opened:
        """Plain rows of any source, of features that the adapter takes; of its own set its draw.

        Images of classes that the run does not know are left out before they are read.
        """
        images = isinstance(source, SetSource) or source_kind(source) not in ("npz", "features")
        if images and self.adapter.features.get("model") is None:
            raise ValueError(
                f"{source}: the run was fitted on a table of features and has no image encoder; "
                "give an .npz table of the same width"
            )
        if isinstance(source, SetSource):
            return Opened(self._of_set(source), LeftOut())
        if images:
            files, left_out = self.files(source, own)
            records = self._features(files)
        else:
            records = open_records(source, self._options(images))
            records.class_names = self._as_known(source, records.class_names)
            records, left_out = self._known(records)
        check_features(self.adapter, records)
        unread = len(records.info.get("skipped", []))
        return Opened(records, left_out + LeftOut({"unreadable": unread}))

    def files(self, source: Path | InMemory, own: bool = False) -> tuple[ImageFiles, LeftOut]:
        """The image files of a folder in classes of the run, and the others by class.

        own: images that a list names and that are gone are passed over; `rows` counts them.
        A class may differ from the run's in case, spaces, underscores and Unicode form.
        """
        files = list_images(
            source,
            follow_links=self.follow_links or bool(self.options.get("follow_links")),
            empty_classes=True,
            absent_ok=own,
        )
        files = self._named(files, source)
        files = replace(files, class_names=self._as_known(source, files.class_names))
        known = set(self.class_names)
        if not known & set(files.class_names):
            pick("class", files.class_names[0], self.class_names)
        names = [files.class_names[k] for k in files.label]
        keep = [row for row, name in enumerate(names) if name in known]
        used = [name for name in files.class_names
                if name in {names[row] for row in keep}]  # fmt: skip
        left_out = self._others(names)
        if not keep:
            raise ValueError(f"{source}: no images in any class of the run")
        return only(files, keep, used), left_out

    def _named(self, files: ImageFiles, source: Path | InMemory) -> ImageFiles:
        """The files by the class names that the fit or an extension was given, of a source of an
        extension by its own first; a source may have classes that neither was told the names of.
        """
        given: Json = self.options.get("class_names") or {}
        for entry in sources_of(self.run)[1:]:
            own = entry.get("class_names") or {}
            same = isinstance(source, Path) and str(source.resolve()) == entry["source"]
            given = {**given, **own} if same else {**own, **given}
        if any(id_ in given for id_ in files.class_names):
            return with_class_names(files, given, keep_others=True)
        return with_class_names(files, self.options.get("class_names"), keep_others=True)

    def _as_known(self, source: AnySource, names: Sequence[str]) -> list[str]:
        """`names` of classes, as the run writes those that differ in case and the like alone."""
        alike = as_known(names, self.class_names)
        for name, one in alike.items():
            title = printable(str(source))
            logger.warning("%s: class %r is taken as the run's %r", title, name, one)
        return [alike.get(name, name) for name in names]

    def _known(self, records: Records) -> tuple[Records, LeftOut]:
        """The rows of a table in classes of the run, and the others by class."""
        known = set(self.class_names)
        keep = [k for k, name in enumerate(records.class_names) if name in known]
        if len(keep) == len(records.class_names):
            return records, LeftOut()
        if not keep:
            pick("class", records.class_names[0], self.class_names)
        names = [records.class_names[k] for k in records.label.tolist()]
        left_out = self._others(names)
        return records.subset_classes(keep), left_out

    def _others(self, names: Sequence[str]) -> LeftOut:
        """The images of `names`, their classes, in classes that the run does not know."""
        known = set(self.class_names)
        others = Counter(name for name in names if name not in known)
        for name in others:
            hint = nearest(name, self.class_names)
            if "did you mean" in hint:
                logger.warning("class %r is not one of the run%s", name, hint)
        return LeftOut({"other_classes": sum(others.values())}, others)

    def _options(self, images: bool) -> FeatureOptions:
        """Of images the templates are the lines that the run used, wherever they came from.

        Features that exist bring texts that are read of the new half of a base-to-new run alone.
        """
        made = self.adapter.features.get("templates") if images else None
        asked = self.options["templates"] if images or self.options.get("base_to_new") else None
        return FeatureOptions(
            model=self.clip() if images else "demo",
            spatial=self.options["spatial"],
            prompt=self.options["prompt"],
            templates=made or asked,
            need_spatial=self.adapter.head.needs_spatial,
            follow_links=self.follow_links,
            batch_size=self.batch_size,
            cache_dir=self.cache_dir,
            device=str(self.device),
            progress=self.progress,
            every_class=False,
        )

    def _features(self, files: ImageFiles) -> Records:
        from vtclip.data.extract import cached_features

        features = cached_features(files, self._options(True))[0]
        return features.records()

    def _of_set(self, source: SetSource) -> Records:
        result, draw = self.run.result, Draw(0, self.run.result["seed"])
        if source.name == self.options["source"]:
            pool = bool(self.options.get("pseudo_labels"))
            draw = Draw(result["shots"], result["seed"], pool)
        options = replace(self._options(True), templates=self.options["templates"])
        records = open_records(source, options, draw)
        check_features(self.adapter, records)
        return records

    def new_source(self, entry: Json) -> NewSource:
        """Where the classes of an extension came from, listed as then."""
        return NewSource.of_entry(entry, self.options.get("class_names"), self.follow_links)

    def added(self, source: NewSource, augment_passes: int = 0) -> Records:
        """The rows of new classes: a folder of one class, of class folders, or a table."""
        path = source.path
        kind = source_kind(path)
        if kind != "folder":
            source.refuse_table()
            records = open_records(path, self._options(False))
            check_features(self.adapter, records)
            check_templates(self.adapter, records)
            return records
        features = self.adapter.features
        if features.get("model") is None:
            raise ValueError(
                f"extend: the run was fitted on a table of features and has no image encoder; the "
                f"new classes must come from an .npz table of width {features.get('width')}, "
                f"got {path}"
            )
        from vtclip.data.extract import cached_features

        options = replace(
            self._options(True),
            spatial=features.get("spatial") if self.adapter.head.needs_spatial else None,
            need_spatial=False,
            prompt=None,
            templates=self.templates_of_new(),
            augment_passes=augment_passes,
        )
        records = cached_features(new_classes(source), options)[0].records()
        check_features(self.adapter, records)
        return records

    def templates_of_new(self) -> list[Any]:
        """The templates of new classes: those of the run, or all sentences that its fit was given.

        The adapter keeps the sentences of its own classes alone.
        """
        made: list[Any] = self.adapter.features["templates"]
        return self.options["templates"] or made if made and is_per_class(made[0]) else made

    def labels(self, records: Records) -> Tensor:
        """The run's label of each of the records' classes."""
        names = self.class_names
        return torch.tensor([index_of(name, names) for name in records.class_names])


def only(files: ImageFiles, rows: Sequence[int], classes: Sequence[str]) -> ImageFiles:
    """The images `rows` alone, in `classes`, which keep their order."""
    place = {name: k for k, name in enumerate(classes)}
    taken: Json = {}
    if files.roles is not None:
        taken["roles"] = [files.roles[row] for row in rows]
    several: list[list[int]] | None = getattr(files, "labels", None)
    if several is not None:
        taken["labels"] = [
            [place[name] for k in several[row] if (name := files.class_names[k]) in place]
            for row in rows
        ]
    prompts = files.prompts
    if prompts is not None:
        prompts = [prompts[files.class_names.index(name)] for name in classes]
    return replace(
        files,
        class_names=list(classes),
        names=[files.names[row] for row in rows],
        label=[place[files.class_names[files.label[row]]] for row in rows],
        prompts=prompts,
        **taken,
    )


def check_templates(adapter: Adapter, records: Records) -> None:
    """Refuse class texts of other templates than those of the run, where both are known."""
    wanted, actual = adapter.features.get("templates"), records.info.get("templates")
    if wanted and actual and list(wanted) != list(actual):
        raise ValueError(
            f"extend: the class texts are of {len(actual)} templates, e.g. {actual[0]!r}; those of "
            f"the run are of {len(wanted)}, e.g. {wanted[0]!r}"
        )


def check_listable(run: Run, role: str, way: str) -> None:
    """Refuse a source of a run, "source", "val" or "test", that was in memory; `way` is advice."""
    place = str(run.result["config"].get(role))
    if place.startswith(IN_MEMORY):
        images = {"source": "on", "val": "with validation", "test": "with test"}.get(
            role, f"with {role}"
        )
        raise ValueError(
            f"{run.folder} was fitted {images} images {place}, which cannot be listed again; {way}"
        )


def learns(result: Json) -> bool:
    """Whether a run learned from labelled images: its head, or the encoders below it."""
    return "encoders" in result["digests"] or HEADS[result["method"]].learns


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
            "learns": labelled and learns(result),
            "images": digests.get("images"),
            "split": result["split"],
        }
    ]


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

    Without `source` there are also `old_classes`, the metrics of the first source, and
    `new_classes`.
    """
    adapter = sources.adapter

    def report(rows: Sequence[SourceRows]) -> Json:
        names, T = adapter.class_names, adapter.temperature
        if not sum(len(part.test) for part in rows):
            return {}
        return metrics_over(adapter.head, rows, names, T, sources.device)

    if source is None:
        rows = sources.rows(data)
        name = Path(sources.run.result["source"]).name
    else:
        target = as_source(source, data)
        name, rows = source_name(target), [sources.other(target)]
    test = test_report(rows, name)
    values = report(rows)
    if source is None:
        values |= {"old_classes": report(rows[:1]), "new_classes": report(rows[1:])}
    return {"method": sources.run.result["method"], "source": name, **values, **test}


def test_report(rows: Sequence[SourceRows], source: str) -> Json:
    """`test` and `left_out` of an evaluation; an error that says why where no image counts."""
    images = sum(len(group.test) for group in rows)
    left_out = sum((group.left_out for group in rows), LeftOut())
    check_some(images, left_out, source)
    unread = [line for group in rows for line in unreadable(group.records)]
    return {"test": {"images": images, "unreadable": unread}, "left_out": left_out.as_json()}
