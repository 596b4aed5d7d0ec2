# SPDX-License-Identifier: Apache-2.0
"""The jobs of a benchmark: which there are, in which order, under which key, in which process.

All of it is a pure function of what was asked for and of the sources' contents, so every process
of a shared benchmark makes the same list. Nothing is opened beyond what names a source's content.
"""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vtclip.data.featureset import FeatureSet, file_digest
from vtclip.data.listed import list_images
from vtclip.data.sets import SETS, SetSource, find_set
from vtclip.data.sets.imagenet import CLASSNAMES, names_file
from vtclip.data.sets.reading import missing_files
from vtclip.data.sources import source_kind
from vtclip.environment import check_launcher, num_processes, process_number
from vtclip.files import json_digest
from vtclip.heads import HEADS, method_from
from vtclip.heads.config import check_seed
from vtclip.names import in_order, option, pick
from vtclip.runs.multi_label import check_single
from vtclip.train.auto import RULE
from vtclip.train.methods import recipe_config

KEY_FORMAT = 1  # raised where the meaning of a job changes


@dataclass(frozen=True)
class Settings:
    """What every job of one benchmark shares; the same names as in `vtclip.fit`."""

    model: str = "demo"
    spatial: str | None = None
    prompt: str | None = None
    templates: tuple[str, ...] | None = None
    test_fraction: float = 0.5
    augment_passes: int = 0
    follow_links: bool = False

    def as_json(self) -> dict[str, object]:
        """All that decides a number; links that are not followed came later and are left out."""
        values = dataclasses.asdict(self)
        return {name: values[name] for name in values if name != "follow_links" or values[name]}


@dataclass(frozen=True)
class Source:
    """One source of the list. identity: digest of its content, as far as it is known unopened.

    spatial: "none", "some" (an .npz whose spatial features are of some rows only) or "all".
    encoder: whether a model, and so a text encoder, belongs to it.
    """

    name: str
    where: Path | SetSource
    kind: str
    identity: str
    spatial: str
    encoder: bool

    @property
    def folder(self) -> Path:
        """The file or folder that holds it; of a data set the root of all."""
        return self.where.root if isinstance(self.where, SetSource) else self.where

    @property
    def test_only(self) -> bool:
        return isinstance(self.where, SetSource) and self.where.spec.test_only


@dataclass(frozen=True)
class BenchJob:
    """One fit. skip: why it is not run, where that is known beforehand."""

    source: Source
    method: str
    shots: int
    seed: int
    spatial: str | None
    key: str
    group: int
    column: int
    skip: str | None = None

    @property
    def name(self) -> str:
        return f"{self.source.name}-{self.method}-{self.shots}shot-seed{self.seed}"

    def place(self) -> tuple[str, str, int, int]:
        return self.source.name, self.method, self.shots, self.seed


def path_sources(paths: Sequence[str | Path], settings: Settings) -> list[Source]:
    """Image folders, features folders and .npz files, under different names."""
    sources: list[Source] = []
    for path in paths:
        source = _path_source(Path(path).expanduser(), settings)
        for other in sources:
            if other.name == source.name:
                pair = f"{other.where} and {source.where}"
                raise ValueError(
                    f"{option('source')}: the names of sources must differ, got {pair}"
                )
        sources.append(source)
    return sources


def set_sources(root: str | Path, names: Sequence[str] | None, settings: Settings) -> list[Source]:
    """Data sets below `root`: those named, or all whose folder and lists are there."""
    root = Path(root).expanduser()
    if not root.is_dir():
        raise ValueError(
            f"{option('data')}: the root of the data sets must be a folder, got {root}"
        )
    if names is None:
        specs = [spec for spec in SETS.values() if not missing_files(spec, root)]
        if not specs:
            raise ValueError(
                f"{option('data')}: no data set is complete below {root}; see vtclip data check"
            )
    else:
        specs = [find_set(name) for name in names]
        if len({spec.name for spec in specs}) < len(specs):
            raise ValueError(f"{option('sets')} must differ, got {', '.join(names)}")
    sources = []
    for spec in specs:
        where = SetSource(spec, root)
        fraction = None if settings.test_fraction == 0.5 else settings.test_fraction
        where.refuse(prompt=settings.prompt, test_fraction=fraction)
        missing = missing_files(spec, root)
        if missing:
            raise spec.error(missing[0])
        files = [names_file(spec, root) if file == CLASSNAMES else spec.place(root) / file
                 for file in spec.files]  # fmt: skip
        identity = json_digest({"set": spec.name, "lists": [file_digest(file) for file in files]})
        sources.append(Source(spec.name, where, "set", identity, "all", encoder=True))
    return sources


def _path_source(path: Path, settings: Settings) -> Source:
    kind = source_kind(path)
    if kind == "npz":
        for name in ("templates", "augment_passes"):
            if value := getattr(settings, name):
                raise ValueError(f"{path}: an .npz file takes no {option(name)}, got {value}")
        try:
            with zipfile.ZipFile(path) as archive:
                arrays = {Path(name).stem for name in archive.namelist()}
        except (OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"{path.name}: not a readable .npz file: {error}") from None
        spatial = "none"
        if "spatial" in arrays:
            spatial = "some" if "spatial_index" in arrays else "all"
        return Source(path.resolve().stem, path, kind, file_digest(path), spatial, encoder=False)
    if settings.prompt is not None:
        raise ValueError(
            f"{path}: {option('prompt')} {settings.prompt!r} can be chosen for .npz files only"
        )
    name = path.resolve().name
    if kind == "features":
        features = FeatureSet.open(path)
        features.require(
            spatial=settings.spatial,
            templates=settings.templates,
            augment_passes=settings.augment_passes,
        )
        check_single(path, "bench")
        spatial = "none" if features.fields["spatial"] is None else "all"
        return Source(name, path, kind, features.key, spatial, encoder=True)
    check_single(path, "bench")
    folder = list_images(path, follow_links=settings.follow_links)
    total = hashlib.sha256()
    for file, label in zip(folder.names, folder.label, strict=True):
        line = f"{label}\0{folder.size(file)}\0{file}\n"
        total.update(line.encode("utf-8", "surrogateescape"))
    return Source(name, path, kind, total.hexdigest(), "all", encoder=True)


def job_list(
    sources: Sequence[Source],
    methods: Sequence[str] | None,
    shots: Sequence[int],
    seeds: Sequence[int],
    settings: Settings,
) -> list[BenchJob]:
    """Every job, source by source, so that consecutive jobs share features.

    methods None: those that apply to a source; a named one that does not becomes a skipped job.
    A set of test images only gives fixed methods one job with 0 shots.
    """
    for method in methods or ():
        pick("method", method, HEADS)
    _check_distinct("methods", methods or ())
    _check_distinct("shots", shots)
    _check_distinct("seeds", seeds)
    for number in shots:
        if number < 1:
            raise ValueError(f"{option('shots')} must be at least 1, got {number}")
    for seed in seeds:
        check_seed(seed)
    jobs: list[BenchJob] = []
    group = 0
    for source in sources:
        reasons = {method: not_applicable(method, source) for method in methods or every_method()}
        if methods is None:
            reasons = {method: None for method, reason in reasons.items() if reason is None}
        spatial = _spatial(source, reasons, settings)
        for number, seed in _draws(source, shots, seeds):
            for column, (method, reason) in enumerate(reasons.items()):
                key = _key(source, method, number, seed, spatial, settings)
                jobs.append(
                    BenchJob(source, method, number, seed, spatial, key, group, column, reason)
                )
            group += 1
    return jobs


def every_method() -> list[str]:
    """All methods in the usual order, and behind them those of other packages that can be used."""
    return in_order(HEADS)


def not_applicable(method: str, source: Source) -> str | None:
    """Why `method` cannot be fitted to `source`, as far as is known without opening it."""
    if HEADS[method].needs_spatial and source.spatial == "none":
        return f"{method} needs spatial features, and {source.name} has none"
    if HEADS[method].needs_text_encoder and not source.encoder:
        return f"{method} needs the text encoder, and {source.name} names no model"
    if HEADS[method].learns and source.test_only:
        return f"{method} needs training images, and {source.name} is a test set"
    return None


def spatial_rows_only(source: Source, jobs: Sequence[BenchJob]) -> bool:
    """Whether only those rows of `source` count that have spatial features."""
    return source.spatial == "some" and any(
        job.spatial is not None for job in jobs if job.source == source
    )


def _spatial(source: Source, reasons: Mapping[str, str | None], settings: Settings) -> str | None:
    """The spatial option of the source's jobs, the same for all methods: they share their rows."""
    if source.spatial == "some":
        wanted = settings.spatial is not None or any(
            HEADS[method].needs_spatial for method in reasons
        )
        return "default" if wanted else None
    return settings.spatial if source.spatial == "all" else None


def _draws(source: Source, shots: Sequence[int], seeds: Sequence[int]) -> list[tuple[int, int]]:
    if source.test_only:
        return [(0, seeds[0])]
    return [(number, seed) for number in sorted(shots) for seed in seeds]


def _key(
    source: Source, method: str, shots: int, seed: int, spatial: str | None, settings: Settings
) -> str:
    identity = {
        "format": KEY_FORMAT,
        "source": [source.name, source.identity],
        "method": method,
        "shots": shots,
        "seed": seed,
        "settings": {**settings.as_json(), "spatial": spatial},
        "fit": dataclasses.asdict(recipe_config(method, shots, None)),
        **({"pool": RULE} if method == "auto" else {}),  # of another rule it is another method
    }
    origin = method_from(method)  # of another version, too
    identity |= {} if origin is None else {"method_from": origin}
    return json_digest(identity)[:32]


def _check_distinct(what: str, values: Sequence[Any]) -> None:
    if len(set(values)) < len(values):
        raise ValueError(f"{what} must differ, got {','.join(map(str, values))}")


@dataclass(frozen=True)
class JobShard:
    """Part `index` (1..count) of a job list."""

    index: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.index <= self.count:
            raise ValueError(
                f"{option('shard')} must be i/n with i in 1..n, got {self.index}/{self.count}"
            )

    @property
    def file(self) -> str:
        """The name of its rows."""
        if self.count == 1:
            return "results.jsonl"
        return f"results-{self.index}-of-{self.count}.jsonl"

    def of(self, jobs: Sequence[BenchJob]) -> list[BenchJob]:
        """Its jobs. Methods take turns between draws, so that no shard has all the slow ones."""
        return [job for job in jobs if (job.group + job.column) % self.count == self.index - 1]


def parse_shard(text: str | None) -> JobShard:
    """The shard "i/n"; without one, that of torchrun's RANK and WORLD_SIZE, or the whole list."""
    if text is None:
        check_launcher()
        return JobShard(process_number("RANK", 0) + 1, num_processes())
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal()):
        raise ValueError(f"{option('shard')} must be i/n with i in 1..n, got {text!r}")
    return JobShard(int(index), int(count))
