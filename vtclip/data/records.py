# SPDX-License-Identifier: Apache-2.0
"""One table of features: image [N, C], optional spatial [N, L, Cs], labels and class texts.

`Records` knows rows, classes and names; where the numbers are (in memory, in an .npz file, in
memory-mapped shards) is known to its `Store` alone. A selection shares the store.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from vtclip.files import Json
from vtclip.names import name_key

MIN_LENGTH = 1e-12  # below it torch's normalize no longer gives rows of length 1


@dataclass(frozen=True)
class Batch:
    """Rows of a table: image [b, C], label [b], spatial [b, L, Cs], spatial_mask [b, L].

    targets [b, K] bool: all classes of each row, where a row may have more than its label.
    """

    image: Tensor
    label: Tensor
    spatial: Tensor | None = None
    spatial_mask: Tensor | None = None
    targets: Tensor | None = None


class Store(Protocol):
    """Features by row of the whole source; pass 0 is plain, passes p >= 1 are augmented.

    A store that knows the contents of its rows also has `digests`, see `Records.digests`, and one
    that knows the images behind them `pixels` and `perceptual`; None where it does not.
    """

    width: int
    num_passes: int
    spatial_width: int | None
    spatial_tokens: int | None

    def image(self, row: Tensor, augment_pass: int) -> Tensor:
        """[b, C] float32."""

    def spatial(self, row: Tensor, augment_pass: int) -> Tensor:
        """[b, L, Cs] float32."""


class MemoryStore:
    """Tensors in memory: image [N, C] or [N, 1 + P, C], spatial [N, L, Cs] or [N, 1 + P, L, Cs].

    A `projection` [Cs, C] is applied to the spatial rows of each batch in float32, so that the
    projected form never exists for the whole table.
    """

    def __init__(
        self, image: Tensor, spatial: Tensor | None = None, projection: Tensor | None = None
    ) -> None:
        self._image = image if image.dim() == 3 else image[:, None]
        self._spatial = spatial
        self._projection = projection
        if self._image.dim() != 3:
            raise ValueError(f"records: image must be [N, C], got {list(image.shape)}")
        if spatial is not None:
            self._spatial = spatial = spatial[:, None] if spatial.dim() == 3 else spatial
            if spatial.dim() != 4 or spatial.shape[:2] != self._image.shape[:2]:
                raise ValueError(
                    f"records: spatial must be [N, L, Cs] with N = {len(image)}, "
                    f"got {list(spatial.shape)}"
                )
        self.width = int(self._image.shape[2])
        self.num_passes = int(self._image.shape[1]) - 1
        self.spatial_tokens = None if self._spatial is None else int(self._spatial.shape[2])
        self.spatial_width = (
            None
            if self._spatial is None
            else int(self._spatial.shape[3] if projection is None else projection.shape[1])
        )

    @functools.cached_property
    def digests(self) -> list[str]:
        return row_digests(self._image[:, 0])

    def image(self, row: Tensor, augment_pass: int) -> Tensor:
        return self._image[row, augment_pass].float()

    def spatial(self, row: Tensor, augment_pass: int) -> Tensor:
        if self._spatial is None:
            raise ValueError("records: this source holds no spatial features")
        tokens = self._spatial[row, augment_pass].float()
        return tokens if self._projection is None else tokens @ self._projection


class _GlobalStore:
    """A store without the spatial features of another."""

    spatial_width: int | None = None
    spatial_tokens: int | None = None

    def __init__(self, store: Store) -> None:
        self.width, self.num_passes, self.image = store.width, store.num_passes, store.image
        self._whole = store

    @property
    def digests(self) -> list[str] | None:
        return getattr(self._whole, "digests", None)

    @property
    def pixels(self) -> list[str | None] | None:
        return getattr(self._whole, "pixels", None)

    @property
    def perceptual(self) -> list[str | None] | None:
        return getattr(self._whole, "perceptual", None)

    def spatial(self, row: Tensor, augment_pass: int) -> Tensor:
        raise ValueError("records: this source holds no spatial features")


class PartedStore:
    """A store whose rows lie in several parts, one after the other; `read` fetches from one."""

    width: int
    num_passes: int
    spatial_width: int | None
    spatial_tokens: int | None

    def __init__(self, counts: Sequence[int]) -> None:
        self._ends = torch.tensor(list(counts)).cumsum(0)
        self._starts = torch.cat([self._ends.new_zeros(1), self._ends[:-1]])

    def read(self, part: int, name: str, row: Tensor, augment_pass: int) -> Tensor:
        """Rows of one part, counted from its first: "image" [b, C] or "spatial" [b, L, Cs]."""
        raise NotImplementedError

    def image(self, row: Tensor, augment_pass: int) -> Tensor:
        return self._rows("image", row, augment_pass, (self.width,))

    def spatial(self, row: Tensor, augment_pass: int) -> Tensor:
        if self.spatial_width is None or self.spatial_tokens is None:
            raise ValueError("records: this source holds no spatial features")
        return self._rows("spatial", row, augment_pass, (self.spatial_tokens, self.spatial_width))

    def _rows(self, name: str, row: Tensor, augment_pass: int, shape: tuple[int, ...]) -> Tensor:
        out = torch.empty(len(row), *shape)
        part = torch.bucketize(row, self._ends, right=True)
        for number in sorted(set(part.tolist())):
            here = (part == number).nonzero().flatten()
            out[here] = self.read(number, name, row[here] - self._starts[number], augment_pass)
        return out


class Records:
    """Rows of features with their labels, names and class texts.

    `text` rows have norm 1. `info` is JSON-able and says where everything came from; its "digests"
    name the content of images, texts and weights. `roles` [N], if the source itself says which rows
    train (0), validate (1) and test (2), decides every split of these rows. `text_views` [K, M, C]
    are the class texts of each of M templates; M is 1 if the source has only their mean. `targets`
    [N, K] bool: all classes of each row, where rows may have more than one; `label` is the first.
    """

    def __init__(
        self,
        store: Store,
        *,
        class_names: Sequence[str],
        text: Tensor,
        label: Tensor,
        names: Sequence[str],
        logit_scale: float = 100.0,
        info: Json | None = None,
        row: Tensor | None = None,
        roles: Tensor | None = None,
        text_views: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> None:
        self.class_names = check_class_names(class_names)
        self.text = functional.normalize(check_rows(text, "text").float(), dim=-1)
        views = self.text[:, None] if text_views is None else check_rows(text_views, "text_views")
        if views.dim() != 3 or (views.shape[0], views.shape[2]) != tuple(self.text.shape):
            fact = f"K, C = {list(self.text.shape)}, got {list(views.shape)}"
            raise ValueError(f"records: text_views must be [K, M, C] with {fact}")
        self.text_views = functional.normalize(views.float(), dim=-1)
        self.label = torch.as_tensor(label)
        self.names = list(names)
        self.logit_scale = float(logit_scale)
        self.info: Json = dict(info or {})
        self._store = store
        if self.text.dim() != 2 or len(self.text) != len(self.class_names):
            raise ValueError(
                f"records: text must be [K, C] with K = {len(self.class_names)}, "
                f"got {list(self.text.shape)}"
            )
        if self.text.shape[1] != store.width:
            raise ValueError(
                f"records: text and image must share their width, got "
                f"{self.text.shape[1]} and {store.width}"
            )
        if self.label.dim() != 1 or self.label.dtype.is_floating_point:
            raise ValueError(
                f"records: label must be a row of integers, got "
                f"{self.label.dtype} {list(self.label.shape)}"
            )
        self.label = self.label.long()
        self._row = torch.arange(len(self.label)) if row is None else row
        self.roles = roles
        if roles is not None and roles.shape != self.label.shape:
            raise ValueError(f"records: roles must be [{len(self.label)}], got {list(roles.shape)}")
        self.targets = targets
        wish = (len(self.label), len(self.class_names))
        if targets is not None and (targets.shape != wish or targets.dtype != torch.bool):
            raise ValueError(
                f"records: targets must be bool {list(wish)}, got {targets.dtype} "
                f"{list(targets.shape)}"
            )
        if len(self.names) != len(self.label) or len(self._row) != len(self.label):
            raise ValueError(
                f"records: {len(self.label)} labels need as many names and rows, got "
                f"{len(self.names)} and {len(self._row)}"
            )
        _check_labels(self.label, len(self.class_names))
        if len(set(self.names)) != len(self.names):
            twice = Counter(self.names).most_common(1)[0][0]
            raise ValueError(f"records: names must differ, got {twice!r} more than once")

    @classmethod
    def from_tensors(
        cls,
        image: Tensor,
        label: Tensor,
        text: Tensor,
        class_names: Sequence[str],
        *,
        spatial: Tensor | None = None,
        names: Sequence[str] | None = None,
        logit_scale: float = 100.0,
        info: Json | None = None,
    ) -> Records:
        """A table in memory; image may be [N, 1 + P, C] with P augmented passes."""
        check_rows(image, "image")
        if spatial is not None:
            check_finite(spatial, "spatial")
        digests = {"images": digest_of(image), "text": digest_of(text)}
        return cls(
            MemoryStore(image, spatial),
            class_names=class_names,
            text=text,
            label=label,
            names=list(names) if names is not None else [str(i) for i in range(len(label))],
            logit_scale=logit_scale,
            info={"kind": "tensors", "digests": digests, **(info or {})},
        )

    def __len__(self) -> int:
        return len(self.label)

    def __repr__(self) -> str:
        spatial = (
            f", spatial=[{self.spatial_tokens}, {self.spatial_width}]" if self.has_spatial else ""
        )
        return (
            f"Records({len(self)} images, {len(self.class_names)} classes, width={self.width}"
            f"{spatial}, passes={self.num_passes})"
        )

    @property
    def store(self) -> Store:
        return self._store

    @property
    def rows(self) -> Tensor:
        """The row of the store [N] that each row of the table is."""
        return self._row

    @property
    def digests(self) -> list[str] | None:
        """One digest per row that tells images apart by content: sha256 of the file, or, of a table
        of features, of the image's row in float32. None where the store does not know them.
        """
        whole: list[str] | None = getattr(self._store, "digests", None)
        return None if whole is None else [whole[row] for row in self._row.tolist()]

    @property
    def pixels(self) -> list[str | None] | None:
        """sha256 of each row's decoded RGB pixels and their size: the same for one picture in two
        files. None where it was not taken; None for the table where no row has one.
        """
        return self._of_images("pixels")

    @property
    def perceptual(self) -> list[str | None] | None:
        """A perceptual hash of each row's picture, as 16 hex digits; few bits differ
        between copies that were encoded or scaled anew. None as for `pixels`, and for a picture
        without structure; it needs the extra "duplicates" when features are extracted.
        """
        return self._of_images("perceptual")

    def _of_images(self, name: str) -> list[str | None] | None:
        whole: list[str | None] | None = getattr(self._store, name, None)
        rows = [] if whole is None else [whole[row] for row in self._row.tolist()]
        return rows if any(row is not None for row in rows) else None

    @property
    def width(self) -> int:
        return self._store.width

    @property
    def num_passes(self) -> int:
        return self._store.num_passes

    @property
    def has_spatial(self) -> bool:
        return self._store.spatial_width is not None

    @property
    def spatial_width(self) -> int | None:
        return self._store.spatial_width

    @property
    def spatial_tokens(self) -> int | None:
        return self._store.spatial_tokens

    def batch(self, index: Tensor, augment_pass: int = 0) -> Batch:
        """Rows `index` as float32; pass 0 is the evaluation transform, 1..num_passes augmented."""
        if not 0 <= augment_pass <= self.num_passes:
            raise ValueError(
                f"records: augment_pass must lie in 0..{self.num_passes}, got {augment_pass}"
            )
        index = self._checked(index)
        row = self._row[index]
        spatial = self._store.spatial(row, augment_pass) if self.has_spatial else None
        targets = None if self.targets is None else self.targets[index]
        image = self._store.image(row, augment_pass)
        return Batch(image, self.label[index], spatial, targets=targets)

    def without_spatial(self) -> Records:
        """The same rows, classes and texts without the spatial features, which are never read."""
        if not self.has_spatial:
            return self
        view = copy.copy(self)
        view._store = _GlobalStore(self._store)
        view.info = {**self.info, "spatial": None}
        return view

    def select(self, index: Tensor) -> Records:
        """The same classes with rows `index` only, in that order."""
        index = self._checked(index)
        return Records(
            self._store,
            class_names=self.class_names,
            text=self.text,
            label=self.label[index],
            names=[self.names[i] for i in index.tolist()],
            logit_scale=self.logit_scale,
            info=self.info,
            text_views=self.text_views,
            row=self._row[index],
            roles=None if self.roles is None else self.roles[index],
            targets=None if self.targets is None else self.targets[index],
        )

    def subset_classes(self, classes: Sequence[int]) -> Records:
        """The rows of `classes`, relabelled from 0 in that order."""
        keep = [int(k) for k in classes]
        if len(set(keep)) != len(keep) or any(not 0 <= k < len(self.class_names) for k in keep):
            raise ValueError(
                f"records: classes must be different indices below "
                f"{len(self.class_names)}, got {keep}"
            )
        new = torch.full((len(self.class_names),), -1)
        new[torch.tensor(keep, dtype=torch.long)] = torch.arange(len(keep))
        index = (new[self.label] >= 0).nonzero().flatten()
        text = self.text[torch.tensor(keep, dtype=torch.long)]
        digests = {**self.info.get("digests", {}), "text": digest_of(text)}
        return Records(
            self._store,
            class_names=[self.class_names[k] for k in keep],
            text=text,
            label=new[self.label[index]],
            names=[self.names[i] for i in index.tolist()],
            logit_scale=self.logit_scale,
            info={**self.info, "digests": digests},
            text_views=self.text_views[torch.tensor(keep, dtype=torch.long)],
            row=self._row[index],
            roles=None if self.roles is None else self.roles[index],
            targets=None if self.targets is None else self.targets[index][:, keep],
        )

    def _checked(self, index: Tensor) -> Tensor:
        index = torch.as_tensor(index)
        if index.numel() == 0:
            return index.reshape(-1).long()
        if index.dim() != 1 or index.dtype.is_floating_point or index.dtype == torch.bool:
            raise ValueError(
                f"records: index must be a row of integers, got {index.dtype} {list(index.shape)}"
            )
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= len(self):
            raise ValueError(f"records: index must lie in 0..{len(self) - 1}, got {low}..{high}")
        return index.long().cpu()


def check_class_names(class_names: Sequence[str]) -> list[str]:
    """`class_names`, which must differ in more than case, spaces, underscores and Unicode form."""
    seen: dict[str, str] = {}
    for index, name in enumerate(class_names):
        if not isinstance(name, str):
            raise TypeError(f"classes: name {index} must be a str, got {type(name).__name__}")
        if any("\ud800" <= letter <= "\udfff" for letter in name):
            known = sys.getfilesystemencoding()
            hint = "" if known == "utf-8" else f"; Python reads names as {known}, set PYTHONUTF8=1"
            raise ValueError(f"classes: name {index} is not valid UTF-8: {name!a}{hint}")
        key = name_key(name)
        if not key:
            raise ValueError(f"classes: name {index} is empty")
        if key in seen:
            raise ValueError(
                f"classes: {seen[key]!a} and {name!a} are the same name but for case, "
                "spaces, underscores or Unicode form"
            )
        seen[key] = name
    if not seen:
        raise ValueError("classes: at least one class is needed, got none")
    return list(class_names)


def _check_labels(label: Tensor, num_classes: int) -> None:
    if not len(label):
        return
    low, high = int(label.min()), int(label.max())
    if low < 0 or high >= num_classes:
        present = torch.zeros(num_classes, dtype=torch.bool)
        present[label[(label >= 0) & (label < num_classes)]] = True
        missing = (~present).nonzero().flatten().tolist()
        raise ValueError(
            f"records: labels must lie in 0..{num_classes - 1} for {num_classes} "
            f"classes, got {low}..{high}, first class without images: "
            f"{missing[0] if missing else 'none'}"
        )


def check_finite(rows: Tensor, what: str) -> Tensor:
    """`rows`, or a ValueError that names the first rows with NaN or infinity."""
    flat = rows.reshape(len(rows), -1) if rows.numel() else rows.reshape(0, 1)
    bad = (~flat.isfinite()).any(dim=1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"records: {what} must be finite, got NaN or infinity in {len(bad)} rows: "
            f"{', '.join(map(str, bad[:5]))}"
        )
    return rows


def check_rows(rows: Tensor, what: str) -> Tensor:
    """`rows` [N, ..., C], which must be finite, with lengths above 0 and finite in float32."""
    check_finite(rows, what)
    length = rows.float().norm(dim=-1).reshape(len(rows), -1) if len(rows) else rows.new_ones(0, 1)
    for fault, wrong in (("zero rows", length < MIN_LENGTH), ("overlong rows", length.isinf())):
        bad = wrong.any(dim=1).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"records: {what} must hold no {fault}, got {len(bad)}: "
                f"{', '.join(map(str, bad[:5]))}"
            )
    return rows


def digest_of(values: Tensor) -> str:
    """sha256 over dtype, shape and bytes."""
    array = values.detach().cpu().contiguous()
    total = hashlib.sha256(f"{array.dtype}{list(array.shape)}".encode())
    if array.numel():
        total.update(array.view(torch.uint8).numpy().data)
    return total.hexdigest()


def row_digests(rows: Tensor) -> list[str]:
    """sha256 of the float32 numbers of each row of `rows` [N, C]; -0 counts as 0."""
    numbers = (rows.detach().cpu().float() + 0.0).contiguous().numpy().astype("<f4", copy=False)
    return [hashlib.sha256(row.data).hexdigest() for row in numbers]
