# SPDX-License-Identifier: Apache-2.0
"""Sources of a benchmark, each opened once; what was read is kept until the next source's turn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vtclip.bench.jobs import BenchJob, Settings, Source
from vtclip.data.options import Draw, FeatureOptions
from vtclip.data.records import Records
from vtclip.data.sets import Listing, SetSource
from vtclip.data.sets.features import SetDraws
from vtclip.data.sources import open_records
from vtclip.files import printable
from vtclip.heads import HEADS

if TYPE_CHECKING:
    from vtclip.clip import Clip


class SourceOpener:
    """Gives a job the rows that `vtclip.fit` would open for it.

    spatial: names of the sources that are opened with spatial features. Methods that take none are
        given the same rows without them, so that none are read.
    note: is told each opened source's name and the digests of its images and weights.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        spatial: Collection[str],
        device: torch.device,
        cache_dir: str | Path | None,
        progress: bool,
        note: Callable[[str, dict[str, str]], None],
    ) -> None:
        self.settings, self.device, self.cache_dir = settings, device, cache_dir
        self.progress, self._note = progress, note
        self._spatial = frozenset(spatial)
        self._clip: Clip | None = None
        self._source: Source | None = None
        self._draws: SetDraws | None = None  # of the source at hand, where it is a data set
        self._open: tuple[tuple[int, int] | None, Records] | None = None
        self._failed: dict[tuple[str, tuple[int, int] | None], str] = {}

    def records(self, job: BenchJob) -> Records:
        """The rows of the job's source; for a data set those of its draw."""
        self._switch_to(job.source)
        draw = (job.shots, job.seed) if isinstance(job.source.where, SetSource) else None
        if self._open is None or self._open[0] != draw:
            self._open = None  # before the next is read
            place = (job.source.name, draw)
            if place in self._failed:
                raise ValueError(self._failed[place])
            try:
                self._open = draw, self._read_records(job)
            except (ValueError, TypeError) as error:
                self._failed[place] = str(error)
                raise
            self._note(job.source.name, _content(self._open[1]))
        records = self._open[1]
        return records if _keeps_spatial(job) else records.without_spatial()

    def why_not(self, job: BenchJob) -> str | None:
        """Why there are not enough images for the job; None where there are."""
        self._switch_to(job.source)
        if self._draws is None:
            return too_few_images(self.records(job), job.shots, self.settings.test_fraction)
        return too_few_listed(self._draws.listing, job.shots)

    def _switch_to(self, source: Source) -> None:
        if self._source != source:
            self._source, self._open = source, None
            where = source.where
            self._draws = SetDraws(where) if isinstance(where, SetSource) else None

    def _read_records(self, job: BenchJob) -> Records:
        source, settings = job.source, self.settings
        options = FeatureOptions(
            model=self._model() if source.kind in ("folder", "set") else settings.model,
            spatial=job.spatial,
            need_spatial=source.name in self._spatial,
            prompt=settings.prompt,
            templates=settings.templates,
            augment_passes=settings.augment_passes,
            follow_links=settings.follow_links,
            cache_dir=self.cache_dir,
            device=self.device,
            progress=self.progress,
        )
        draw = Draw(job.shots, job.seed)
        if self._draws is not None:
            return self._draws.records(options, draw)
        return open_records(source.where, options, draw)

    def _model(self) -> Clip:
        if self._clip is None:
            from vtclip.clip import load_clip

            self._clip = load_clip(self.settings.model, self.device)
        return self._clip


def _keeps_spatial(job: BenchJob) -> bool:
    """Whether `vtclip.fit` alone would have spatial features, and the method looks at them."""
    if job.method == "auto":  # takes what is there
        return job.spatial is not None or job.source.kind in ("npz", "features")
    return HEADS[job.method].needs_spatial


def _content(records: Records) -> dict[str, str]:
    """Digests of what all draws of a source share."""
    digests = records.info.get("digests", {})
    images = digests.get("test_images", digests.get("images"))
    content = {"images": images, "weights": digests.get("weights")}
    return {name: digest for name, digest in content.items() if digest is not None}


def too_few_images(records: Records, shots: int, test_fraction: float) -> str | None:
    """Why `shots` images per class cannot be drawn next to the test share; None where they can."""
    counts = torch.bincount(records.label, minlength=len(records.class_names)).tolist()
    left = [count - int(count * test_fraction) for count in counts]
    return _shortage(left, records.class_names, shots, "images beside the test share")


def too_few_listed(listing: Listing, shots: int) -> str | None:
    """Why `shots` images per class cannot be drawn from the train list; None where they can."""
    counts = Counter(listing.train.label)
    left = [counts[k] for k in range(len(listing.class_names))]
    return _shortage(left, listing.class_names, shots, "training images")


def _shortage(left: Sequence[int], class_names: Sequence[str], shots: int, what: str) -> str | None:
    least = min(left)
    if least >= shots:
        return None
    name = printable(class_names[left.index(least)])
    return f"{shots} shots: class {name} has {least} {what}"
