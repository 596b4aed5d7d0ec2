# SPDX-License-Identifier: Apache-2.0
"""Test-time training over the images of a folder, in numbers, next to what costs no training."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vtclip.data.image_files import ImageFiles
from vtclip.data.sets import AnySource, SetSource
from vtclip.data.sources import source_kind
from vtclip.data.threads import progress_bar
from vtclip.files import Json
from vtclip.machine import BatchSize
from vtclip.names import option
from vtclip.runs.adapter import Adapter, check_model
from vtclip.runs.result import metrics_table
from vtclip.train import metrics
from vtclip.train.ttt import TTT, adapt, trainable

if TYPE_CHECKING:
    from vtclip.clip import Clip

ROWS = {"kept_mean": "mean of kept views", "all_mean": "mean of all views", "adapted": "with TTT"}


def check_ttt(adapter: Adapter, source: AnySource, *, base_to_new: bool) -> None:
    """Refuse a source without images and a head without parameters, before any work."""
    if isinstance(source, SetSource):
        raise ValueError(
            f"{option('ttt')}: {option('source')} must be a folder of images, got data set {source}"
        )
    kind = source_kind(source)
    if kind != "folder":
        what = {"npz": "an .npz table", "features": "a features folder"}[kind]
        raise ValueError(
            f"{option('ttt')}: {option('source')} must be a folder of images, got {what}: {source}"
        )
    trainable(adapter.head)
    if base_to_new:
        raise ValueError(f"{option('ttt')}: a base-to-new run is evaluated without it")


def ttt_report(
    adapter: Adapter,
    clip: Clip,
    files: ImageFiles,
    names: Sequence[str],
    label: Tensor,
    config: TTT,
    *,
    progress: bool = False,
) -> Json:
    """Metrics of each of ROWS on the images `names` [N] of `files`, options, and seconds.

    The logits of an average are the log of the mean probability. All rows are divided by the same
    temperature in their `*_scaled` numbers, the run's own, fitted without views and training.
    """
    from vtclip.data.views import folder_views

    check_model(adapter, clip)
    wants = adapter.features.get("spatial") if adapter.head.needs_spatial else None

    at_a_time = BatchSize(what="views")

    def encode(pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        encoded = at_a_time.map(lambda part: clip.encode_image(part, wants), pixels)
        spatial = [tokens for _, tokens in encoded if tokens is not None]
        return torch.cat([image for image, _ in encoded]), torch.cat(spatial) if spatial else None

    def counted() -> Iterator[Tensor]:
        with progress_bar(len(names), "ttt", progress) as bar:
            for views in folder_views(clip, files, names, config.views, seed=config.seed):
                yield views
                bar.update()

    logits = adapt(adapter.head, counted(), encode, config)
    rows = {
        name: metrics.all_metrics(getattr(logits, name), label, adapter.temperature)
        for name in ROWS
    }
    total = sum(logits.seconds.values())
    return {
        "options": {**dataclasses.asdict(config), "kept": config.kept},
        **rows,
        "seconds": {**logits.seconds, "total": total, "per_image": total / len(names)},
    }


def ttt_table(values: Json) -> str:
    """The run's head alone, the views averaged without training, and with training."""
    ttt, method = values["ttt"], values["method"]
    options, seconds = ttt["options"], ttt["seconds"]
    lines = [metrics_table({method: values, **{title: ttt[name] for name, title in ROWS.items()}})]
    lines.append(
        f"{options['views']} views, {options['kept']} kept, {options['steps']} step"
        f"{'' if options['steps'] == 1 else 's'} at lr {options['lr']:g}, seed {options['seed']}; "
        f"{seconds['per_image']:.3f} s per image ("
        f"views {seconds['views']:.1f} s, encode and select {seconds['encode and select']:.1f} s, "
        f"adapt {seconds['adapt']:.1f} s)"
    )
    return "\n".join(lines)
