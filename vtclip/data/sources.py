# SPDX-License-Identifier: Apache-2.0
"""One door to every source of features: an image folder, a FeatureSet folder or an .npz file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vtclip.data.npz import open_npz
from vtclip.data.records import Records
from vtclip.data.sets import SetSource

if TYPE_CHECKING:
    from vtclip.clip import Clip

__all__ = ["open_source", "source_kind"]

logger = logging.getLogger(__name__)


def source_kind(source: str | Path) -> str:
    """ "npz", "features" or "folder"; a ValueError where `source` is none of them."""
    path = Path(source).expanduser()
    if path.is_file() and path.suffix.lower() == ".npz":
        return "npz"
    if path.is_dir():
        return "features" if (path / "manifest.json").is_file() else "folder"
    if not path.exists():
        raise ValueError(f"source: no such file or folder: {source}")
    raise ValueError(
        f"source: must be an image folder, a features folder or an .npz file, got {source}"
    )


def open_source(
    source: str | Path | SetSource,
    *,
    model: str | Path | Clip = "demo",
    spatial: str | None = None,
    prompt: str | None = None,
    templates: str | Sequence[str] | None = None,
    augment_passes: int = 0,
    need_spatial: bool = False,
    shots: int = 0,
    seed: int = 1,
    pool: bool = False,
    cache_dir: str | Path | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> Records:
    """Records of `source`.

    An image folder (class_name/*.jpg) goes through `model` into the feature cache first; `spatial`
    names the spatial option and `need_spatial` alone takes the model's default. Features that
    exist already (a FeatureSet folder, an .npz file) bring their own model: what was asked for and
    cannot be had from them is an error. `prompt` chooses one prompt of an .npz file. `shots` and
    `seed` draw the images of a data set (vtclip.data.sets), `pool` takes its whole training list
    instead; other sources are split later.
    """
    if isinstance(source, SetSource):
        from vtclip.data.sets.features import open_set

        source.refuse(prompt=prompt)
        return open_set(
            source,
            shots=shots,
            seed=seed,
            pool=pool,
            model=model,
            spatial=spatial or ("default" if need_spatial else None),
            templates=templates,
            augment_passes=augment_passes,
            cache_dir=cache_dir,
            device=device,
            progress=progress,
        )
    kind = source_kind(source)
    path = Path(source).expanduser()
    if kind == "npz":
        if templates is not None:
            raise ValueError("source: templates cannot be chosen for an .npz file; use prompt")
        if augment_passes:
            raise ValueError(
                f"source: an .npz file holds no augmented passes, got {augment_passes}"
            )
        return open_npz(path, prompt=prompt, need_spatial=need_spatial or spatial is not None)
    if prompt is not None:
        raise ValueError(
            f"source: prompt {prompt!r} can be chosen for .npz files only; use templates"
        )
    from vtclip.data.extract import cached_features
    from vtclip.data.featureset import FeatureSet

    if kind == "features":
        found = FeatureSet.open(path)
    else:
        wish = spatial or ("default" if need_spatial else None)
        found, _ = cached_features(
            path,
            model=model,
            spatial=wish,
            augment_passes=augment_passes,
            templates=templates,
            cache_dir=cache_dir,
            device=device,
            progress=progress,
        )
    found.require(
        spatial=spatial,
        need_spatial=need_spatial,
        templates=templates,
        augment_passes=augment_passes,
    )
    return found.records()
