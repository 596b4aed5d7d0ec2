# SPDX-License-Identifier: Apache-2.0
"""Tables of the same kind of features, one after the other, as one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vtclip.data.records import PartedStore, Store


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
