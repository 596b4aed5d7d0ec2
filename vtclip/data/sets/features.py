# SPDX-License-Identifier: Apache-2.0
"""Records of a data set: the drawn training and validation images and the official test images.

Two feature sets are extracted and cached: one of the test list, the same for all shots and seeds,
and one of the drawn images, with the augmented passes that only training needs. They are joined
into one table whose rows carry their roles.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vtclip.data.coop_sampling import Picks, coop_picks
from vtclip.data.image_files import ImageFiles, absent_images
from vtclip.data.joined import JoinedStore
from vtclip.data.options import Draw, FeatureOptions
from vtclip.data.records import Records
from vtclip.data.sets.listing import ImageList, Listing
from vtclip.data.sets.reading import SetSource, open_listing
from vtclip.files import Json, cache_folder, is_below, json_digest, printable
from vtclip.names import option

if TYPE_CHECKING:
    from vtclip.data.featureset import FeatureSet

logger = logging.getLogger(__name__)


def open_set(source: SetSource, options: FeatureOptions, draw: Draw) -> Records:
    """Records with `roles` of one draw: see `SetDraws`."""
    return SetDraws(source).records(options, draw)


class SetDraws:
    """Draws from one data set. Its lists and its test features are read once for all of them."""

    def __init__(self, source: SetSource) -> None:
        self.source = source
        self._test: tuple[FeatureOptions, FeatureSet] | None = None

    @cached_property
    def listing(self) -> Listing:
        return open_listing(self.source.spec, self.source.root)

    def records(self, options: FeatureOptions, draw: Draw) -> Records:
        """Records with `roles`: drawn training images per class, validation, the test list.

        The cache must lie outside the data root. A listed image that is absent is an error; one
        that cannot be decoded too, unless it is a test image, which is then reported as unreadable
        and not counted.
        """
        spec = self.source.spec
        cache = cache_folder(options.cache_dir)
        if is_below(cache, self.source.root):
            raise spec.error(
                f"nothing is written below the data root, but {option('cache_dir')} is {cache}"
            )
        if draw.shots and spec.test_only:
            raise spec.error(
                "a test set without training images; fit imagenet, then evaluate the run on this "
                "one"
            )
        if draw.pool:
            training, validation = self.listing.train, ImageList([], [])
        else:
            training, validation = drawn(self.listing, shots=draw.shots, seed=draw.seed)
        support = ImageList(training.names + validation.names, training.label + validation.label)
        known = self._test[1] if self._test is not None and self._test[0] == options else None
        self._check_there(support.names + (self.listing.test.names if known is None else []))
        images = _Images(self.listing, options)
        made = [images.features(support, options.augment_passes)] if len(support) else []
        if known is None:
            known = images.features(self.listing.test, 0)
            self._test = options, known
        roles = dict.fromkeys(training.names, 0) | dict.fromkeys(validation.names, 1)
        return _joined(self.listing, draw, roles, made, known)

    def _check_there(self, names: list[str]) -> None:
        absent = absent_images(self.listing.image_root, names)
        if absent:
            name, why = absent[0]
            raise self.source.spec.error(
                f"{len(absent)} listed images are not there, first {printable(name)} ({why}); "
                f"`vtclip data check` lists them"
            )


class _Images:
    """Features of listed images. The model is loaded once, `templates` None are the set's own."""

    def __init__(self, listing: Listing, options: FeatureOptions) -> None:
        from vtclip.clip import load_clip

        model, templates = options.model, options.templates
        self.listing = listing
        self.options = dataclasses.replace(
            options,
            model=load_clip(model, options.device) if isinstance(model, (str, Path)) else model,
            templates=listing.spec.template if templates is None else templates,
        )

    def features(self, part: ImageList, augment_passes: int) -> FeatureSet:
        from vtclip.data.extract import cached_features

        folder = ImageFiles(
            self.listing.image_root,
            self.listing.class_names,
            part.names,
            part.label,
            prompts=self.listing.prompts,
        )
        options = dataclasses.replace(self.options, augment_passes=augment_passes)
        return cached_features(folder, options)[0]


def _joined(
    listing: Listing,
    draw: Draw,
    roles: dict[str, int],
    drawn_features: Sequence[FeatureSet],
    test_features: FeatureSet,
) -> Records:
    """One table of the drawn images (`roles` by name, 0 training and 1 validation) and the test."""
    made = [*drawn_features, test_features]
    tables = [features.records() for features in made]
    if drawn_features and tables[0].info["skipped"]:
        name, why = tables[0].info["skipped"][0]
        raise listing.spec.error(f"the drawn image {printable(name)} cannot be read: {why}")
    test = tables[-1]
    names = [name for table in tables for name in table.names]
    return Records(
        JoinedStore([table.store for table in tables], [len(table) for table in tables]),
        class_names=test.class_names,
        text=test.text,
        text_views=test.text_views,
        label=torch.cat([table.label for table in tables]),
        names=names,
        logit_scale=test.logit_scale,
        info=_info(listing, draw, 1 in roles.values(), made, tables),
        roles=torch.tensor([roles.get(name, 2) for name in names], dtype=torch.int8),
    )


def _info(
    listing: Listing,
    draw: Draw,
    has_validation: bool,
    made: Sequence[FeatureSet],
    tables: Sequence[Records],
) -> Json:
    """Where the rows came from; digests of both feature sets count as one."""
    digests = [table.info["digests"] for table in tables]
    return {
        **tables[-1].info,
        "kind": "set",
        "path": listing.spec.name,
        "augment_passes": tables[0].num_passes if len(tables) > 1 else 0,
        "set": {
            "name": listing.spec.name,
            "lists": listing.digest(),
            "official": listing.official(),
            "shots": draw.shots,
            "seed": draw.seed,
            "val_from": None if not has_validation else "train" if listing.val is None else "val",
            "repeated_in_test": _repeats(made),
        },
        "digests": {
            **digests[-1],
            "images": json_digest({"images": [digest["images"] for digest in digests]}),
            "test_images": digests[-1]["images"],
            "features": json_digest({"features": [digest["features"] for digest in digests]}),
            "lists": listing.digest(),
        },
    }


def drawn(listing: Listing, *, shots: int, seed: int) -> tuple[ImageList, ImageList]:
    """The training and validation images of one draw."""
    val = listing.val
    try:
        picks: Picks = coop_picks(
            listing.train.label,
            None if val is None else val.label,
            shots=shots,
            seed=seed,
            class_names=listing.class_names,
        )
    except ValueError as error:
        raise listing.spec.error(str(error).removeprefix("coop_picks: ")) from None
    return (
        _take(listing.train, picks.train),
        _take(listing.train if val is None else val, picks.val),
    )


def _repeats(made: Sequence[FeatureSet]) -> int:
    """How many drawn images have the content of a test image; more than 0 is warned of."""
    if len(made) < 2:
        return 0
    drawn_images, test = (one.manifest for one in made)
    seen = dict(zip(test["digests"], test["names"], strict=True))
    twice = [
        (name, seen[digest])
        for name, digest in zip(drawn_images["names"], drawn_images["digests"], strict=True)
        if digest in seen
    ]
    if twice:
        logger.warning(
            "%d drawn images have the same content as a test image, e.g. %s and %s",
            len(twice), printable(twice[0][0]), printable(twice[0][1]),
        )  # fmt: skip
    return len(twice)


def _take(part: ImageList, rows: Sequence[int]) -> ImageList:
    return ImageList([part.names[row] for row in rows], [part.label[row] for row in rows])
