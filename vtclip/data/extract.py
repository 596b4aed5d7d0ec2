# SPDX-License-Identifier: Apache-2.0
"""Image folders to features on disk: hashed, decoded in threads, resumable, one writer at a time.

Order of work: every file is hashed; the key follows from hashes and model; finished features of
that key are reused; else partial.json marks the folder, shards are written one by one (temporary
file, fsync, rename; vtclip.data.shards), and the manifest comes last. A run that was cut off goes
on with the shards that are missing. A full disk or a kill leaves finished features untouched. Files
that cannot be decoded are listed in the report and the manifest and have no row.

Of several processes (torchrun) each hashes and encodes its part; the first holds the folder, writes
texts and manifest, and the bytes are those of one process with as many threads.

The cache lies in VTCLIP_CACHE or ~/.cache/vtclip, one folder per key. A file counts as unchanged
by its content, not by its name or time.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import logging
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vtclip import files
from vtclip.clip import Clip, load_clip, resolve_templates
from vtclip.clip.augment import AUGMENTATION
from vtclip.clip.loading import work_begins
from vtclip.clip.texts import by_class_name, read_templates, templates_of
from vtclip.data.class_names import as_class_names
from vtclip.data.decode import note_line
from vtclip.data.featureset import FORMAT, MANIFEST, VERSION, FeaturesDamaged, FeatureSet
from vtclip.data.folder_tree import in_remarks, named
from vtclip.data.hashing import (
    ExtractionReport,
    Hashed,
    alike,
    duplicates_of,
    hash_all,
    in_other_classes,
    skipped_now,
)
from vtclip.data.image_files import ImageFiles
from vtclip.data.listed import list_images
from vtclip.data.options import FeatureOptions
from vtclip.data.records import Records
from vtclip.data.shards import (
    DTYPES,
    Taken,
    Work,
    finished_shards,
    make_shards,
    shards_of,
    write_text,
)
from vtclip.data.text_checks import warn_of_texts
from vtclip.distributed import World, device_of_rank, joined
from vtclip.files import Json, only_writer
from vtclip.machine import choose_device, set_threads
from vtclip.names import option

logger = logging.getLogger(__name__)

PARTIAL = "partial.json"
LOCK_WAIT_S = 600.0
EAGER_BYTES = 2**30


def extract_features(
    source: str | Path,
    out: str | Path,
    *,
    model: str | Path | Clip = "demo",
    spatial: str | None = None,
    augment_passes: int = 0,
    templates: str | Sequence[Any] | None = None,
    dtype: str = "float16",
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    progress: bool = True,
    follow_links: bool = False,
    class_names: Mapping[str, str] | str | Path | None = None,
    world: World | None = None,
) -> tuple[FeatureSet, ExtractionReport]:
    """Features of an image folder in the folder `out`, reused where they are there already.

    `dtype` is that of the spatial features. Features of something else in `out` are an error that
    names what differs, and stay as they are. `world`: the processes that share the work, each of
    which calls this with the same arguments (vtclip.distributed.joined).
    """
    out = Path(out).expanduser()
    if files.is_below(out, Path(source).expanduser()):
        raise ValueError(f"{option('out')} must lie outside the image folder, got {out}")
    _check_out(out)
    names = as_class_names(class_names)
    options = FeatureOptions(
        model=model,
        spatial=spatial,
        templates=by_class_name(read_templates(templates), names),
        augment_passes=augment_passes,
        device=device,
        progress=progress,
        dtype=dtype,
        batch_size=batch_size,
        follow_links=follow_links,
        class_names=names,
    )
    world = world or World()
    return _Job.of(source, options, world).run(out, world)


def cached_features(
    source: str | Path | ImageFiles, options: FeatureOptions, say: bool = True
) -> tuple[FeatureSet, ExtractionReport]:
    """Features of an image folder, or of listed files, from the cache.

    They are extracted first where they are missing or damaged. say: warn of what the files are
    like; not wanted where another model reads the same files.
    """
    job = _Job.of(source, options, World())
    place = Path("features") / job.key[:32]
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # below says what is wrong, if so
        cache = files.cache_folder(options.cache_dir)
        if (cache / place / MANIFEST).is_file() and not os.access(cache / place, os.W_OK):
            return job.reuse(FeatureSet.open(cache / place), say)
    place = _writable_cache(options.cache_dir) / place
    return job.run(place, World(), rebuild=True, say=say)


class _Job(Work):
    """One extraction: what is to be made, and where it may lie already."""

    every_class = True

    @classmethod
    def of(cls, source: str | Path | ImageFiles, options: FeatureOptions, world: World) -> _Job:
        _check_numbers(options)
        lines = resolve_templates(options.templates)
        folder = list_images(
            source, follow_links=options.follow_links, class_names=options.class_names
        )
        lines = templates_of(lines, folder.prompts or folder.class_names)
        world.check_same(
            "list of images", files.json_digest({"names": [*map(ascii, folder.names)]})
        )
        model = options.model
        if isinstance(model, (str, Path)):
            name = model
            model = world.by_each(lambda: load_clip(name, options.device))
        spatial = model.check_spatial(options.spatial_option)
        work_begins(model)
        start = time.perf_counter()
        hashed = hash_all(folder, options.progress, world)
        fields = {
            "model": model.config,
            "weights": model.weights_digest,
            "transform": {
                **model.preprocess_cfg,
                "augmentation": AUGMENTATION if options.augment_passes else None,
            },
            "augment_passes": options.augment_passes,
            "templates": lines,
            "class_names": folder.class_names,
            "images": hashed.digest(),
            "spatial": spatial,
            "dtype": options.dtype if spatial is not None else None,
            "features_version": VERSION,
        }
        if folder.prompts not in (None, folder.class_names):
            fields["prompts"] = folder.prompts
        if hashed.traits:  # older features of such files were decoded by other rules
            fields["decoding"] = hashed.traits
        stages = {"hashing": time.perf_counter() - start}
        made = cls(hashed, model, fields, options.batch_size, options.progress, stages)
        made.every_class = options.every_class
        return made

    def reuse(self, features: FeatureSet, say: bool = True) -> tuple[FeatureSet, ExtractionReport]:
        """Finished features of a folder that cannot be written, and so cannot be locked."""
        if features.key != self.key:
            raise ValueError(f"features: {features.folder} holds features of something else")
        features.verify()
        report = ExtractionReport(reused=True)
        self._report(features, report, say)
        return features, report

    def run(
        self, folder: Path, world: World, *, rebuild: bool = False, say: bool = True
    ) -> tuple[FeatureSet, ExtractionReport]:
        start = time.perf_counter()
        report = ExtractionReport(stages=self.stages)
        world.check_same("features", self.key)
        finished: list[FeatureSet] = []
        with contextlib.ExitStack() as held:

            def enter() -> bool:
                folder.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(_hold(folder))
                found = self._finished(folder, rebuild)
                finished.extend([] if found is None else [found])
                return found is not None

            report.reused = bool(world.collect(world.by_first(enter))[0])
            if not report.reused:
                self._build(folder, world)
            features = finished[0] if finished else FeatureSet.open(folder)
        report.seconds = time.perf_counter() - start
        self._report(features, report, say=say and world.first)
        return features, report

    def _report(self, features: FeatureSet, report: ExtractionReport, say: bool = True) -> None:
        """Give features what this request says of itself, and tell of this scan's files."""
        features.model_name = self.clip.name
        names = features.manifest["names"]
        features.skipped = skipped_now(self.hashed, names, features.skipped)
        features.roles = self._roles(names)
        report.rows, report.skipped = len(features), features.skipped
        report.num_bytes, report.notes = features.num_bytes, features.manifest.get("notes", {})
        report.duplicates = duplicates_of(self.hashed, names)
        if not say:
            return
        folder = self.hashed.folder
        for line in folder.remarks:
            logger.warning("%s", files.printable(line))
        for note, count in sorted(report.notes.items()):
            logger.warning("%s", note_line(note, count))
        if report.duplicates:
            first, second = report.duplicates[0]
            count = len(report.duplicates)
            others = in_other_classes(self.hashed, report.duplicates)
            fault = f"; {len(others)} of them in another class" if others else ""
            first, second = others[0] if others else (first, second)
            logger.warning(
                "%d %s the same content as another one%s, e.g. %s and %s",
                count, "image has" if count == 1 else "images have", fault,
                files.printable(first), files.printable(second),
            )  # fmt: skip
        said = {why for _, why in folder.skipped if folder.remarks and in_remarks(why)}
        if any(why not in said for _, why in report.skipped):
            lines = [line for line in report.lines(5) if not line.endswith(tuple(said))]
            logger.warning("%s", "; ".join(lines))
        if folder.passed:
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(folder.passed.items()))
            place = files.printable(str(folder.root))
            logger.info("passed over in %s: %s", place, files.printable(kinds))

    def _roles(self, names: Sequence[str]) -> list[int] | None:
        """The role of each row in the present source."""
        folder = self.hashed.folder
        if folder.roles is None:
            return None
        roles = dict(zip(folder.names, folder.roles, strict=True))
        return [roles[name] for name in names]

    def _finished(self, folder: Path, rebuild: bool) -> FeatureSet | None:
        if (folder / MANIFEST).exists():
            features = damage = None
            try:
                features = FeatureSet.open(folder)
                if features.num_bytes <= EAGER_BYTES:
                    features.verify()
            except FeaturesDamaged as error:
                if not rebuild:
                    raise ValueError(f"{error}; remove the folder to build it again") from None
                damage = str(error)
            if features is None or damage is not None:
                features = None  # Windows removes no file that is mapped
                logger.warning("%s; building it again", files.printable(str(damage)))
                for path in [*folder.glob("*.json"), *folder.glob("*.safetensors")]:
                    path.unlink()
                return None
            if features.key == self.key:
                if (folder / PARTIAL).exists():  # of a process that was killed right behind its end
                    with contextlib.suppress(OSError):
                        _remove_notes(folder)
                return features if rebuild else self._renewed(features)
            differs = [
                name for name, value in self.fields.items() if features.fields.get(name) != value
            ]
            raise ValueError(
                f"features: {folder} holds features that differ in {', '.join(differs)}; "
                "give another folder or remove this one"
            )
        _check_out(folder)
        return None

    def _renewed(self, features: FeatureSet) -> FeatureSet:
        """Features in a folder that was asked for, whose manifest then says what was asked now."""
        body = {name: value for name, value in features.manifest.items() if name != "digest"}
        skipped = skipped_now(self.hashed, body["names"], features.skipped)
        now = {
            **body,
            "model_name": self.clip.name,
            "roles": self._roles(body["names"]),
            "skipped": [list(pair) for pair in skipped],
        }
        if now == {"roles": None, **body}:
            return features
        folder = features.folder
        files.write_atomic(
            folder / MANIFEST, files.to_json({**now, "digest": files.json_digest(now)})
        )
        return FeatureSet.open(folder)

    def _build(self, folder: Path, world: World) -> None:
        tokens = self._spatial_shape()
        shards = shards_of(self, tokens)

        def begin() -> dict[int, Json]:
            self._announce(folder, self.row_bytes(tokens))
            done = finished_shards(self, shards, folder)
            if done:
                logger.info("features: going on after %d finished shards", len(done))
            # before all else, so that a later run knows the folder as ours
            files.write_atomic(folder / PARTIAL, files.to_json({"key": self.key}))
            return done

        text: Json = {}

        def texts() -> None:
            if world.first:
                with self.timed("texts"):
                    text.update(write_text(self, folder))

        done = world.collect(world.by_first(begin))[0] or {}
        todo = [shard for shard in shards if shard.number not in done]
        ready = sum(shard.stop - shard.start for shard in shards if shard.number in done)
        mine = todo[world.rank :: world.size]
        made = make_shards(self, mine, folder, tokens, finished=ready, meanwhile=texts)
        for part in world.collect(made):
            done |= part
        entries = [done[number] for number in range(len(shards))]
        world.by_first(lambda: self._finish(folder, entries, text, tokens))

    def _announce(self, folder: Path, row_bytes: int) -> None:
        need = row_bytes * len(self.hashed.names)
        free = shutil.disk_usage(folder).free
        logger.info("features: %d images, about %.1f MB in %s",
                    len(self.hashed.names), need / 1e6, files.printable(str(folder)))  # fmt: skip
        if need > free:
            raise OSError(
                errno.ENOSPC, f"features: {folder} needs about {need} bytes, {free} are free"
            )

    def _spatial_shape(self) -> tuple[int, int] | None:
        """(L, Cs) from one blank image."""
        if self.fields["spatial"] is None:
            return None
        size = self.clip.preprocess_cfg["size"]
        height, width = (size, size) if isinstance(size, int) else size
        _, spatial = self.clip.encode_image(
            torch.zeros(1, 3, height, width), self.fields["spatial"]
        )
        if spatial is None:
            raise ValueError(f"features: the model gives no spatial {self.fields['spatial']!r}")
        return int(spatial.shape[1]), int(spatial.shape[2])

    def _finish(
        self, folder: Path, entries: list[Json], text_entry: Json, tokens: tuple[int, int] | None
    ) -> None:
        hashed = self.hashed
        kept = [row for entry in entries for row in entry["kept"]]
        class_names = self.fields["class_names"]
        skipped = [*hashed.skipped, *(pair for entry in entries for pair in entry["skipped"])]
        if self.every_class:
            _check_classes(hashed, class_names, {hashed.label[row] for row in kept}, skipped)
        names = [hashed.names[row] for row in kept]
        body: Json = {
            "format": FORMAT,
            "version": VERSION,
            "key": self.key,
            "fields": self.fields,
            "model_name": self.clip.name,
            "logit_scale": self.clip.logit_scale,
            "width": self.clip.width,
            "spatial_tokens": tokens[0] if tokens else None,
            "spatial_width": tokens[1] if tokens else None,
            "names": names,
            "label": [hashed.label[row] for row in kept],
            "sizes": [hashed.sizes[row] for row in kept],
            "digests": [hashed.digests[row] for row in kept],
            "roles": self._roles(names),
            **_columns(entries),
            "skipped": skipped,
            "text": text_entry,
            "shards": [
                {name: entry[name] for name in ("file", "bytes", "sha256", "rows")}
                for entry in entries
            ],
        }
        if hashed.labels is not None:
            body["labels"] = [hashed.labels[row] for row in kept]
        files.write_atomic(
            folder / MANIFEST, files.to_json({**body, "digest": files.json_digest(body)})
        )
        _remove_notes(folder)


def _remove_notes(folder: Path) -> None:
    """What a later run needs to go on with unfinished features; last the sign that there is any."""
    for path in (*folder.glob("shard-*.json"), folder / PARTIAL):
        path.unlink(missing_ok=True)


def _check_classes(
    hashed: Hashed, class_names: list[str], read: set[int], skipped: list[tuple[str, str]]
) -> None:
    """Refuse classes of which no image could be read; the error counts the reasons."""
    lost = [k for k in range(len(class_names)) if k not in read]
    if not lost:
        return
    folder = hashed.folder
    label = dict(zip(folder.names, folder.label, strict=True))
    failed = [(name, why) for name, why in skipped if label.get(name) in lost]
    reasons = "; ".join(
        f"{files.printable(place)}: {files.printable(why)}" for place, why in alike(failed)
    )
    raise ValueError(
        "features: no image of these classes could be read: "
        f"{named([class_names[k] for k in lost])} ({files.several(len(failed), 'file')}: {reasons})"
    )


def _check_out(folder: Path) -> None:
    """Refuse a place for features that is a file, or a folder that holds something else."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{option('out')} {folder} is not a folder; give a new or an empty folder")
    if not folder.exists() or (folder / MANIFEST).exists() or (folder / PARTIAL).exists():
        return
    if not all(files.is_leftover(path.name) for path in folder.iterdir()):
        raise ValueError(
            f"{option('out')} {folder} holds other files; give a new or an empty folder"
        )


def _columns(entries: Sequence[Json]) -> Json:
    """Digests of each row's pixels and picture, and counts of notes, from the shards' entries.

    A shard that was finished before these were taken has none.
    """
    taken = [one for entry in entries for one in entry.get("taken", [None] * entry["rows"])]
    rows = [Taken(None, None, ()) if one is None else Taken(*one) for one in taken]
    return {
        "pixels": [row.pixels for row in rows],
        "perceptual": [row.perceptual for row in rows],
        "notes": dict(sorted(Counter(note for row in rows for note in row.notes).items())),
    }


@contextlib.contextmanager
def _hold(folder: Path) -> Iterator[None]:
    """Be the only writer of `folder`, after waiting for another one to finish."""
    deadline = time.monotonic() + LOCK_WAIT_S
    told = False
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(only_writer(folder))
                break
            except FileExistsError:
                if time.monotonic() > deadline:
                    raise
                if not told:
                    place = files.printable(str(folder))
                    logger.info("features: waiting for another process to finish %s", place)
                told = True
                time.sleep(0.1)
        yield


def _check_numbers(options: FeatureOptions) -> None:
    if options.dtype not in DTYPES:
        raise ValueError(
            f"features: dtype must be one of {', '.join(DTYPES)}, got {options.dtype!r}"
        )
    for name, value, least in (
        ("augment_passes", options.augment_passes, 0),
        ("batch_size", options.batch_size, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"features: {name} must be an int of at least {least}, got {value!r}")


def _writable_cache(cache_dir: str | Path | None) -> Path:
    """The cache folder, or a temporary one with a warning where nothing can be written."""
    try:
        folder = files.cache_folder(cache_dir)
        (folder / "features").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder / "features"):
            return folder
    except (OSError, RuntimeError) as error:
        place, why = getattr(error, "filename", None), getattr(error, "strerror", None)
        logger.warning(
            "the cache cannot be written (%s); features are kept for this run only",
            files.printable(f"{place}: {why}" if place and why else str(error)),
        )
    temporary = Path(tempfile.mkdtemp(prefix="vtclip-"))
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return temporary


def write_features(
    source: str | Path,
    out: str | Path,
    *,
    model: str = "demo",
    spatial: str | None = "default",
    templates: Sequence[Any] | None = None,
    augment_passes: int = 0,
    device: str | torch.device | None = None,
    threads: int | None = None,
    progress: bool = False,
    batch_size: int = 64,
    follow_links: bool = False,
    class_names: Mapping[str, str] | str | Path | None = None,
) -> Records:
    """Features of an image folder in the folder `out`, which `fit` then takes as its source.

    batch_size: images at a time through the encoder; fewer where memory does not hold as many.
    class_names: the names of classes whose folders are called by ids, by id, or the file with them.

    Processes that torchrun started share the work, and each returns the same.
    """
    set_threads(threads)
    where = choose_device(device)
    named = device is not None and torch.device(device).index is not None
    where = device_of_rank(where, named)
    with joined(where) as world:
        found, report = extract_features(
            source,
            out,
            model=model,
            spatial=spatial,
            templates=None if templates is None else list(templates),
            augment_passes=augment_passes,
            batch_size=batch_size,
            device=where,
            progress=progress and world.first,
            follow_links=follow_links,
            class_names=class_names,
            world=world,
        )
        if world.first:
            warn_of_texts(found, encoded=not report.reused)
    return found.records()
