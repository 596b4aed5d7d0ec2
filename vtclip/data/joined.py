# SPDX-License-Identifier: Apache-2.0
"""Tables of the same kind of features, one after the other, as one."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from vtclip.data.records import PartedStore, Records, Store
from vtclip.files import Json, printable
from vtclip.names import as_known, nearest, option

logger = logging.getLogger(__name__)
ROLES = ("train", "val", "test")


class JoinedStore(PartedStore):
    """Rows of several stores, one after the other. Only the first may hold augmented passes."""

    def __init__(self, stores: Sequence[Store], counts: Sequence[int]) -> None:
        self._stores, self._counts = list(stores), list(counts)
        shapes = {(s.width, s.spatial_width, s.spatial_tokens) for s in stores}
        if len(shapes) != 1:
            raise ValueError(f"records: joined features must have one shape, got {shapes}")
        first = self._stores[0]
        super().__init__(counts)
        self.width, self.num_passes = first.width, first.num_passes
        self.spatial_width, self.spatial_tokens = first.spatial_width, first.spatial_tokens

    @property
    def digests(self) -> list[str] | None:
        parts = [getattr(store, "digests", None) for store in self._stores]
        if any(part is None for part in parts):
            return None
        return [digest for part in parts for digest in part or ()]

    @property
    def pixels(self) -> list[str | None] | None:
        return self._of_images("pixels")

    @property
    def perceptual(self) -> list[str | None] | None:
        return self._of_images("perceptual")

    def _of_images(self, name: str) -> list[str | None] | None:
        """A column that some of the stores may lack; their rows then have None."""
        parts = [getattr(store, name, None) for store in self._stores]
        if all(part is None for part in parts):
            return None
        columns = zip(parts, self._counts, strict=True)
        return [
            row for part, count in columns for row in ([None] * count if part is None else part)
        ]

    def read(self, part: int, name: str, row: Tensor, augment_pass: int) -> Tensor:
        store = self._stores[part]
        if augment_pass > store.num_passes:
            raise ValueError(f"records: test images have no augmented pass {augment_pass}")
        return (store.image if name == "image" else store.spatial)(row, augment_pass)


class RowsOf:
    """The rows of `records` as a store, wherever they lie in the store behind them."""

    def __init__(self, records: Records) -> None:
        self._store, self._rows = records.store, records.rows
        self.width, self.num_passes = self._store.width, self._store.num_passes
        self.spatial_width = self._store.spatial_width
        self.spatial_tokens = self._store.spatial_tokens
        self.digests, self.pixels = records.digests, records.pixels
        self.perceptual = records.perceptual

    def image(self, row: Tensor, augment_pass: int) -> Tensor:
        return self._store.image(self._rows[row], augment_pass)

    def spatial(self, row: Tensor, augment_pass: int) -> Tensor:
        return self._store.spatial(self._rows[row], augment_pass)


def join_records(train: Records, others: dict[str, Records]) -> Records:
    """`train` and the images of other sources as one table, with roles.

    others: "val" and "test" to the records whose images validate and test. Names of their rows
        begin with the role, so that a name of both sources stays two; classes are those of `train`,
        by name (see `labels_among`), and a class that it lacks is a ValueError that names the role.
        Texts, templates and digests are those of `train`; the digests of the others' images are
        added as "val_images" and "test_images".
    Roles 1 and 2 of `train` itself must be given up beforehand.
    """
    parts = {"train": train, **others}
    roles = [
        torch.zeros(len(train), dtype=torch.int8) if train.roles is None else train.roles.clone()
    ]
    names, label, skipped = list(train.names), [train.label], list(train.info.get("skipped", []))
    digests = dict(train.info.get("digests", {}))
    for role, part in others.items():
        check_same_features(role, train, part)
        to_train = labels_among(role, train.class_names, part.class_names)
        for name, known in as_known(part.class_names, train.class_names).items():
            logger.warning("%s: class %r is taken as %r", option(role), name, known)
        prefix = f"{role}/"
        while any(name.startswith(prefix) for name in names):
            prefix = "_" + prefix
        names += [prefix + name for name in part.names]
        label.append(to_train[part.label])
        roles.append(torch.full((len(part),), ROLES.index(role), dtype=torch.int8))
        skipped += [[prefix + name, why] for name, why in part.info.get("skipped", [])]
        digests[f"{role}_images"] = part.info.get("digests", {}).get("images")
    info: Json = {**train.info, "digests": digests}
    if skipped:
        info["skipped"] = skipped
    return Records(
        JoinedStore([RowsOf(part) for part in parts.values()],
                    [len(part) for part in parts.values()]),
        class_names=train.class_names,
        text=train.text,
        text_views=train.text_views,
        label=torch.cat(label),
        names=names,
        logit_scale=train.logit_scale,
        info=info,
        roles=torch.cat(roles),
    )  # fmt: skip


def labels_among(role: str, known: Sequence[str], class_names: Sequence[str]) -> Tensor:
    """The place [n] among `known` of each of `class_names`, those of the source `role`.

    A name may differ from the known one in case, spaces, underscores and Unicode form.
    """
    alike = as_known(class_names, known)
    class_names = [alike.get(name, name) for name in class_names]
    place = {name: k for k, name in enumerate(known)}
    for name in class_names:
        if name not in place:
            raise ValueError(
                f"{option(role)}: class {printable(name)!r} is none of the training source's"
                f"{nearest(name, known)}"
            )
    return torch.tensor([place[name] for name in class_names], dtype=torch.long)


def check_same_features(role: str, train: Records, part: Records) -> None:
    """Refuse features of another width, model or kind than those of the training images."""
    wanted, actual = _kind_of(train), _kind_of(part)
    for name, value in wanted.items():
        if actual[name] != value:
            raise ValueError(
                f"{option(role)}: its features have {name} {str(actual[name])[:16]}, those of the "
                f"training source {str(value)[:16]}"
            )


def plain_transform(records: Records) -> Json | None:
    """How pixels are prepared, but for augmented passes."""
    transform = records.info.get("transform")
    if transform is None:
        return None
    return {name: value for name, value in transform.items() if name != "augmentation"}


def _kind_of(records: Records) -> Json:
    """What features that are joined must have in common."""
    return {
        "width": records.width,
        "spatial width": records.spatial_width,
        "weights": records.info.get("digests", {}).get("weights"),
        "spatial": records.info.get("spatial"),
        "transform": plain_transform(records),
    }
