# SPDX-License-Identifier: Apache-2.0
"""Sources of images whose labels are not read: folders, lists, saved data sets, tables of features.

Whatever a source says of classes and splits, its rows are of one class called "image", and all
count. Of a folder these are the images in and below it, by whatever names.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from vtclip.data.folders import other_files, walk_images
from vtclip.data.image_datasets import is_saved_dataset
from vtclip.data.image_files import ImageFiles, InMemory
from vtclip.data.joined import check_same_features
from vtclip.data.listed import list_images
from vtclip.data.lists import read_paths
from vtclip.data.npz import open_npz
from vtclip.data.options import FeatureOptions
from vtclip.data.records import Records
from vtclip.data.sources import source_kind
from vtclip.files import printable
from vtclip.names import option

logger = logging.getLogger(__name__)
ROLE = "unlabelled"
CLASS = "image"


def list_unlabelled(place: Path | InMemory, *, follow_links: bool = False) -> ImageFiles | None:
    """The image files of a source; None of one that holds features. Nothing is decoded."""
    if source_kind(place) in ("npz", "features"):
        return None
    if isinstance(place, InMemory) or is_saved_dataset(place):
        files = list_images(place)
        rows = [0] * len(files.names)
        return replace(
            files, class_names=[CLASS], label=rows, labels=None, roles=None, prompts=None
        )
    path = Path(place).expanduser()
    if path.is_file():
        return read_paths(path)
    paths, skipped = walk_images(path, follow_links=follow_links)
    if not paths:
        others = other_files(path, follow_links=follow_links)
        raise ValueError(
            f"{option(ROLE)}: {printable(str(place))} is a folder without images{others}"
        )
    names = [one.relative_to(path).as_posix() for one in paths]
    passed = [(Path(name).relative_to(path).as_posix(), why) for name, why in skipped]
    return ImageFiles(path, [CLASS], names, [0] * len(names), passed)


def open_unlabelled(
    place: Path | InMemory,
    options: FeatureOptions,
    train: Records,
    images: ImageFiles | None = None,
) -> Records:
    """Rows of `place`, opened with the options of `train`, of the same width and model.

    images: its files, where they were listed already.
    """
    options = replace(options, templates=None, class_names=None, augment_passes=0, prompt=None)
    kind = source_kind(place)
    if (kind == "npz") != (train.info.get("kind") == "npz"):
        raise ValueError(
            f"{option(ROLE)}: an .npz table goes with another alone, got {place} beside "
            f"{train.info.get('path') or 'images'}"
        )
    if kind == "npz":
        part = open_npz(Path(str(place)).expanduser(), need_spatial=train.has_spatial, labels=False)
    else:
        from vtclip.data.extract import cached_features
        from vtclip.data.featureset import FeatureSet

        if kind == "features":
            features = FeatureSet.open(Path(str(place)))
        else:
            files = images or list_unlabelled(place, follow_links=options.follow_links)
            if files is None:  # features only, which were opened above
                raise ValueError(f"{option(ROLE)}: {place} holds no images")
            features = cached_features(files, replace(options, every_class=False))[0]
        part = features.records()
    part = part if train.has_spatial else part.without_spatial()
    check_same_features(ROLE, train, part)
    if not len(part):
        raise ValueError(f"{option(ROLE)}: {place} holds no image that can be read")
    return part
