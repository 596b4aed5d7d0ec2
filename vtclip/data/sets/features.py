# SPDX-License-Identifier: Apache-2.0
"""Records of a data set: the drawn training and validation images and the official test images.

Two feature sets are made and cached: one of the test list, the same for all shots and seeds, and
one of the drawn images, with the augmented passes that only training needs. They are joined into
one table whose rows carry their roles.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtclip.data.coop_sampling import Picks, coop_picks
from vtclip.data.images import Folder, printable
from vtclip.data.records import Records, Store
from vtclip.data.sets.listing import Listing, Part
from vtclip.data.sets.reading import SetSource, absent_images, open_listing
from vtclip.files import json_digest

if TYPE_CHECKING:
    from vtclip.clip import Clip
    from vtclip.data.featureset import FeatureSet

__all__ = ["JoinedStore", "drawn", "open_set"]

logger = logging.getLogger(__name__)


def open_set(
    source: SetSource,
    *,
    shots: int,
    seed: int,
    pool: bool = False,
    model: str | Path | Clip = "demo",
    spatial: str | None = None,
    templates: str | Sequence[str] | None = None,
    augment_passes: int = 0,
    cache_dir: str | Path | None = None,
    device: str | torch.device = "cpu",
    progress: bool = True,
    kept: dict[str, Any] | None = None,
) -> Records:
    """Records with `roles`: `shots` drawn training images per class, validation, the test list.

    `templates` None takes the set's own one. The cache must lie outside the data root. A listed
    image that is absent is an error; one that cannot be decoded too, unless it is a test image,
    which is then reported as unreadable and not counted. `kept` is given the lists and the test
    features, which all draws share, and saves a later call with the same options from reading them.
    `pool` takes every image of the training list instead of a draw, and none for validation.
    """
    from vtclip.clip import load_clip
    from vtclip.data.extract import cached_features, default_cache

    spec = source.spec
    cache = Path(cache_dir).expanduser() if cache_dir is not None else default_cache()
    if _below(cache, source.root):
        raise spec.error(f"nothing is written below the data root, but cache_dir is {cache}")
    if shots and spec.test_only:
        raise spec.error(
            "a test set without training images; fit imagenet, then evaluate the run on this one"
        )
    kept = {} if kept is None else kept
    if "listing" not in kept:
        kept["listing"] = open_listing(spec, source.root)
    listing: Listing = kept["listing"]
    if pool:
        picks, held = listing.train, Part([], [])
    else:
        picks, held = drawn(listing, shots=shots, seed=seed)
    support = Part(picks.names + held.names, picks.label + held.label)
    looked_at = [] if "test" in kept else listing.test.names
    absent = absent_images(listing.image_root, support.names + looked_at)
    if absent:
        name, why = absent[0]
        raise spec.error(
            f"{len(absent)} listed images are not there, first {printable(name)} ({why}); "
            f"`vtclip data check` lists them"
        )
    clip = load_clip(model, device) if isinstance(model, (str, Path)) else model

    def extract(part: Part, passes: int) -> FeatureSet:
        folder = Folder(
            listing.image_root, listing.class_names, part.names, part.label, prompts=listing.prompts
        )
        found, _ = cached_features(
            folder,
            model=clip,
            spatial=spatial,
            augment_passes=passes,
            templates=spec.template if templates is None else templates,
            cache_dir=cache_dir,
            device=device,
            progress=progress,
        )
        return found

    made = [extract(support, augment_passes)] if len(support) else []
    if "test" not in kept:
        kept["test"] = extract(listing.test, 0)
    made.append(kept["test"])
    tables = [one.records() for one in made]
    test = tables[-1]
    if len(support) and tables[0].info["skipped"]:
        name, why = tables[0].info["skipped"][0]
        raise spec.error(f"the drawn image {printable(name)} cannot be read: {why}")
    role = dict.fromkeys(picks.names, 0) | dict.fromkeys(held.names, 1)
    names = [name for table in tables for name in table.names]
    digests = test.info["digests"]
    features = [table.info["digests"]["features"] for table in tables]
    images = [table.info["digests"]["images"] for table in tables]
    info = {
        **test.info,
        "kind": "set",
        "path": spec.name,
        "augment_passes": augment_passes if len(support) else 0,
        "set": {
            "name": spec.name,
            "lists": listing.digest(),
            "official": listing.official(),
            "shots": shots,
            "seed": seed,
            "val_from": None if not len(held) else "train" if listing.val is None else "val",
            "repeated_in_test": _repeats(made),
        },
        "digests": {
            **digests,
            "images": json_digest({"images": images}),
            "test_images": digests["images"],
            "features": json_digest({"features": features}),
            "lists": listing.digest(),
        },
    }
    return Records(
        JoinedStore([table._store for table in tables], [len(table) for table in tables]),
        class_names=test.class_names,
        text=test.text,
        text_views=test.text_views,
        label=torch.cat([table.label for table in tables]),
        names=names,
        logit_scale=test.logit_scale,
        info=info,
        roles=torch.tensor([role.get(name, 2) for name in names], dtype=torch.int8),
    )


def drawn(listing: Listing, *, shots: int, seed: int) -> tuple[Part, Part]:
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


class JoinedStore:
    """Rows of several stores in a row. Only the first may hold augmented passes."""

    def __init__(self, stores: Sequence[Store], rows: Sequence[int]) -> None:
        self._stores = list(stores)
        self._ends = torch.tensor(list(rows)).cumsum(0)
        self._starts = self._ends - torch.tensor(list(rows))
        shapes = {(s.width, s.spatial_width, s.spatial_tokens) for s in stores}
        if len(shapes) != 1:
            raise ValueError(f"records: joined features must have one shape, got {shapes}")
        first = self._stores[0]
        self.width = first.width
        self.num_passes = first.num_passes
        self.spatial_width = first.spatial_width
        self.spatial_tokens = first.spatial_tokens

    def image(self, row: Tensor, augment_pass: int) -> Tensor:
        return self._rows("image", row, augment_pass, (self.width,))

    def spatial(self, row: Tensor, augment_pass: int) -> Tensor:
        if self.spatial_width is None or self.spatial_tokens is None:
            raise ValueError("records: this source holds no spatial features")
        return self._rows("spatial", row, augment_pass, (self.spatial_tokens, self.spatial_width))

    def _rows(self, what: str, row: Tensor, augment_pass: int, shape: tuple[int, ...]) -> Tensor:
        out = torch.empty(len(row), *shape)
        store = torch.bucketize(row, self._ends, right=True)
        for number in sorted(set(store.tolist())):
            one, here = self._stores[number], (store == number).nonzero().flatten()
            if augment_pass > one.num_passes:
                raise ValueError(f"records: test images have no augmented pass {augment_pass}")
            local = row[here] - self._starts[number]
            get: Any = getattr(one, what)
            out[here] = get(local, augment_pass)
        return out


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


def _take(part: Part, rows: Sequence[int]) -> Part:
    return Part([part.names[row] for row in rows], [part.label[row] for row in rows])


def _below(path: Path, root: Path) -> bool:
    real, top = os.path.realpath(path), os.path.realpath(root)
    return real == top or real.startswith(top.rstrip(os.sep) + os.sep)
