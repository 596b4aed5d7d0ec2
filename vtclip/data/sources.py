# SPDX-License-Identifier: Apache-2.0
"""One door to every source of features: images of any kind, a FeatureSet folder, an .npz file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vtclip.data.class_names import needs_image_files
from vtclip.data.image_files import ImageFiles, InMemory
from vtclip.data.listed import list_images
from vtclip.data.lists import is_list
from vtclip.data.npz import open_npz
from vtclip.data.options import Draw, FeatureOptions
from vtclip.data.records import Records
from vtclip.data.sets import SetSource, as_source
from vtclip.names import LIST_SUFFIXES, option

if TYPE_CHECKING:
    from vtclip.clip import Clip


def source_kind(source: str | Path | InMemory) -> str:
    """ "npz", "features", or "folder" for all that `list_images` lists, which a folder stands for.

    A ValueError where `source` is none of them.
    """
    if isinstance(source, InMemory):
        return "folder"
    path = Path(source).expanduser()
    if path.is_file() and is_list(path):
        return "folder"
    if path.is_file() and path.suffix.lower() == ".npz":
        return "npz"
    if path.is_dir():
        return "features" if (path / "manifest.json").is_file() else "folder"
    if not path.exists():
        raise ValueError(f"source: no such file or folder: {source}")
    raise ValueError(
        "source: must be a folder of class folders, a list "
        f"({', '.join(LIST_SUFFIXES)}), a saved dataset, a features folder or an .npz file, "
        f"got {source}"
    )


def open_source(
    source: object,
    *,
    model: str | Path | Clip = "demo",
    spatial: str | None = None,
    prompt: str | None = None,
    templates: str | Sequence[Any] | None = None,
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

    Images of any kind (a folder of class_name/*.jpg, a list of files, see vtclip.data.listed) go
    through `model` into the feature cache first; `spatial` names the spatial option and
    `need_spatial` alone takes the model's default. Features that exist already (a FeatureSet
    folder, an .npz file) bring their own model: what was asked for and cannot be had from them is
    an error. `prompt` chooses one prompt of an .npz file. `shots` and `seed` draw the images of a
    data set (vtclip.data.sets), `pool` takes its whole training list instead; other sources are
    split later.
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
    return open_records(as_source(source, None), options, Draw(shots, seed, pool))


def open_records(
    source: str | Path | SetSource | InMemory,
    options: FeatureOptions,
    draw: Draw | None = None,
    *,
    images: ImageFiles | None = None,
) -> Records:
    """`open_source` of options that were put together before; `draw` is for data sets only.

    images: the files of `source`, where they were listed already.
    """
    if isinstance(source, SetSource):
        from vtclip.data.sets.features import open_set

        needs_image_files(options.class_names, f"data set {source.name}")
        source.refuse(prompt=options.prompt)
        return open_set(source, options, draw or Draw())
    kind = source_kind(source)
    if kind in ("npz", "features"):
        what = "an .npz table" if kind == "npz" else "a features folder"
        needs_image_files(options.class_names, f"{what} ({source})")
    if kind == "npz" and not isinstance(source, InMemory):
        return _open_table(Path(source).expanduser(), options)
    if options.prompt is not None:
        raise ValueError(
            f"{option('prompt')} {options.prompt!r} can be chosen for .npz files only; use "
            f"{option('templates')}"
        )
    from vtclip.data.extract import cached_features
    from vtclip.data.featureset import FeatureSet
    from vtclip.data.text_checks import warn_of_texts

    if kind == "features" and not isinstance(source, InMemory):
        features = FeatureSet.open(source)
        warn_of_texts(features)
    else:
        if images is None:
            images = list_images(
                source, follow_links=options.follow_links, class_names=options.class_names
            )
        features, report = cached_features(images, options)
        warn_of_texts(features, encoded=not report.reused)
    features.require(
        spatial=options.spatial,
        need_spatial=options.need_spatial,
        templates=options.templates,
        augment_passes=options.augment_passes,
    )
    return features.records()


def _open_table(path: Path, options: FeatureOptions) -> Records:
    if options.templates is not None:
        raise ValueError(
            f"{option('templates')} cannot be chosen for an .npz file; use {option('prompt')}"
        )
    if options.augment_passes:
        raise ValueError(
            f"{option('augment_passes')}: an .npz file holds no augmented passes, got "
            f"{options.augment_passes}"
        )
    return open_npz(path, prompt=options.prompt, need_spatial=options.spatial_option is not None)
