# SPDX-License-Identifier: Apache-2.0
"""One door to every source of features: an image folder, a FeatureSet folder or an .npz file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vtclip.data.class_names import needs_image_files
from vtclip.data.npz import open_npz
from vtclip.data.options import Draw, FeatureOptions
from vtclip.data.records import Records
from vtclip.data.sets import SetSource

if TYPE_CHECKING:
    from vtclip.clip import Clip


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
    options = FeatureOptions(
        model=model,
        spatial=spatial,
        need_spatial=need_spatial,
        prompt=prompt,
        templates=templates,
        augment_passes=augment_passes,
        cache_dir=cache_dir,
        device=device,
        progress=progress,
    )
    return open_records(source, options, Draw(shots, seed, pool))


def open_records(
    source: str | Path | SetSource, options: FeatureOptions, draw: Draw | None = None
) -> Records:
    """`open_source` of options that were put together before; `draw` is for data sets only."""
    if isinstance(source, SetSource):
        from vtclip.data.sets.features import open_set

        needs_image_files(options.class_names, f"data set {source.name}")
        source.refuse(prompt=options.prompt)
        return open_set(source, options, draw or Draw())
    kind = source_kind(source)
    path = Path(source).expanduser()
    if kind != "folder":
        what = "an .npz table" if kind == "npz" else "a features folder"
        needs_image_files(options.class_names, f"{what} ({source})")
    if kind == "npz":
        return _open_table(path, options)
    if options.prompt is not None:
        raise ValueError(
            f"source: prompt {options.prompt!r} can be chosen for .npz files only; use templates"
        )
    from vtclip.data.extract import cached_features
    from vtclip.data.featureset import FeatureSet

    features = FeatureSet.open(path) if kind == "features" else cached_features(path, options)[0]
    features.require(
        spatial=options.spatial,
        need_spatial=options.need_spatial,
        templates=options.templates,
        augment_passes=options.augment_passes,
    )
    return features.records()


def _open_table(path: Path, options: FeatureOptions) -> Records:
    if options.templates is not None:
        raise ValueError("source: templates cannot be chosen for an .npz file; use prompt")
    if options.augment_passes:
        raise ValueError(
            f"source: an .npz file holds no augmented passes, got {options.augment_passes}"
        )
    return open_npz(path, prompt=options.prompt, need_spatial=options.spatial_option is not None)
