# SPDX-License-Identifier: Apache-2.0
"""Features on disk: a folder of safetensors shards and a manifest that names all they depend on.

    manifest.json               written last; a folder without it is unfinished
    text.safetensors            text [K, C] float32; where there are M > 1 templates, and in a
                                folder from before they were kept not even then, text_views
                                [K, M, C] float32, the class texts of each template
    shard-00000.safetensors     image [n, 1 + P, C] float32, spatial [n, 1 + P, L, Cs] (dtype)

Global features are float32, so that cached rows equal fresh ones; spatial features are float16
unless asked otherwise. `key` is a hash of the model's config and weights digest, transform,
augmentation, templates, class names, spatial option, dtype, passes and of every image's name, size,
label and content digest. Paths are relative, so the folder may be moved. Beside it the manifest has
digests of each row's file, pixels and, with the extra "duplicates", picture (`Records.pixels`).

Checks: the manifest carries its own digest and every file's size, all checked on opening together
with the texts; a shard's sha256 is checked once, before its first row is read (`verify` does all).
Shards are memory-mapped: a batch reads its rows only.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vtclip import schemas
from vtclip.clip import resolve_templates
from vtclip.clip.texts import is_per_class, templates_of
from vtclip.data.records import PartedStore, Records
from vtclip.files import Json, json_digest, read_json, to_json
from vtclip.names import option
from vtclip.schemas import check

logger = logging.getLogger(__name__)

FORMAT, VERSION = "vtclip-features", 1
MANIFEST, TEXT = "manifest.json", "text.safetensors"
_size = schemas.whole(0, 2**31)
_file = {"file": schemas.text, "bytes": schemas.whole(), "sha256": schemas.text}
_texts = schemas.rows(schemas.text)
_digests = schemas.maybe(schemas.rows(schemas.maybe(schemas.text)))
SCHEMA = schemas.table(
    {
        "key": schemas.text,
        "fields": schemas.table(
            {
                "class_names": _texts,
                "templates": schemas.rows(schemas.anything),
                "prompts?": schemas.anything,
                "spatial": schemas.maybe(schemas.text),
                "augment_passes": _size,
                "model": schemas.maybe(schemas.obj),
                "transform": schemas.anything,
                "images": schemas.maybe(schemas.text),
                "weights": schemas.maybe(schemas.text),
            }
        ),
        "model_name": schemas.text,
        "logit_scale": schemas.number(),
        "width": _size,
        "spatial_tokens": schemas.maybe(_size),
        "spatial_width": schemas.maybe(_size),
        "names": _texts,
        "label": schemas.rows(_size),
        "labels?": schemas.rows(schemas.rows(_size)),
        "digests?": schemas.maybe(_texts),
        "pixels?": _digests,
        "perceptual?": _digests,
        "roles?": schemas.maybe(schemas.rows(schemas.one_of(0, 1, 2))),
        "skipped": schemas.rows(schemas.tuple_of(schemas.text, schemas.text)),
        "text": schemas.table(_file),
        "shards": schemas.rows(schemas.table({**_file, "rows": _size})),
    }
)


class FeaturesDamaged(ValueError):
    """A features folder whose bytes are not those that were written."""


class FeatureSet:
    """An opened features folder. `manifest` is read-only; `records()` gives the table.

    model_name: of the model that was asked for, wherever it lies. skipped: (name, reason) of files
    without a row. roles: see `Records.roles`. All three are those of the request, if the
    features were found for one, since nothing of them is part of the key.
    """

    def __init__(self, folder: Path, manifest: Json) -> None:
        self.folder = folder
        self.manifest = manifest
        self.key: str = manifest["key"]
        self.fields: Json = manifest["fields"]
        texts = _tensors(folder, manifest["text"])
        if "text" not in texts:
            raise FeaturesDamaged(f"features: {folder / TEXT} lacks the class texts")
        self._text, self._text_views = texts["text"], texts.get("text_views")
        self._store = ShardStore(folder, manifest)
        # what the present request says of its own; the manifest has what the first one said
        self.model_name: str = manifest["model_name"]
        self.skipped: list[tuple[str, str]] = [(name, why) for name, why in manifest["skipped"]]
        self.roles: list[int] | None = manifest.get("roles")

    @classmethod
    def open(cls, folder: str | Path) -> FeatureSet:
        """The features in `folder`, after checking manifest, sizes and texts."""
        folder = Path(folder).expanduser()
        if not (folder / MANIFEST).exists() and (folder / "partial.json").exists():
            raise ValueError(f"features: {folder} is unfinished; run the same command again")
        try:
            manifest = read_json(folder / MANIFEST, "a features folder")
        except ValueError as error:
            raise FeaturesDamaged(f"features: {error}") from None
        if manifest.get("format") != FORMAT:
            raise FeaturesDamaged(f"features: {folder / MANIFEST} is not a manifest of {FORMAT}")
        if manifest.get("version") != VERSION:
            raise ValueError(
                f"features: {folder} has format version {manifest.get('version')}, this vtclip "
                f"reads version {VERSION}"
            )
        body = {name: value for name, value in manifest.items() if name != "digest"}
        whole = (folder / MANIFEST).read_bytes() == to_json(manifest)  # spaces count as well
        try:
            whole = whole and manifest.get("digest") == json_digest(body)
        except ValueError:
            whole = False
        if not whole:
            raise FeaturesDamaged(f"features: {folder / MANIFEST} does not match its own digest")
        try:
            check(manifest, SCHEMA, f"features: {folder / MANIFEST}")
            _check_columns(manifest, f"features: {folder / MANIFEST}")
        except ValueError as error:
            raise FeaturesDamaged(str(error)) from None
        for entry in [manifest["text"], *manifest["shards"]]:
            _check_size(folder, entry)
        return cls(folder, manifest)

    def __repr__(self) -> str:
        return f"FeatureSet({self.folder}, {len(self)} images, key={self.key[:12]})"

    def __len__(self) -> int:
        return len(self.manifest["names"])

    @property
    def num_bytes(self) -> int:
        return sum(int(entry["bytes"]) for entry in self.manifest["shards"])

    def verify(self) -> None:
        """Check every shard's digest now; FeaturesDamaged names the first that fails."""
        for shard in range(len(self.manifest["shards"])):
            self._store.check(shard)

    def require(
        self,
        *,
        spatial: str | None = None,
        need_spatial: bool = False,
        templates: str | Sequence[Any] | None = None,
        augment_passes: int = 0,
    ) -> None:
        """A ValueError that names the first wish these features cannot meet."""
        have = self.fields
        if need_spatial and have["spatial"] is None:
            raise ValueError(
                f"features: {self.folder} holds no spatial features; build them with one"
            )
        if spatial not in (None, "default", have["spatial"]):
            raise ValueError(
                f"features: {self.folder} holds {option('spatial')} {have['spatial']!r}, asked "
                f"for {spatial!r}"
            )
        if templates is not None:
            names = have["prompts"] if "prompts" in have else have["class_names"]
            if templates_of(resolve_templates(templates), names) != have["templates"]:
                first = have["templates"][0]
                made = f"{len(have['templates'])} templates, e.g. {first!r}"
                made = "sentences per class" if is_per_class(first) else made
                raise ValueError(
                    f"features: {self.folder} was made with {made}, not those asked for"
                )
        if augment_passes > have["augment_passes"]:
            raise ValueError(
                f"features: {self.folder} holds {have['augment_passes']} augmented passes, "
                f"asked for {augment_passes}"
            )

    def records(self) -> Records:
        """The table, memory-mapped."""
        have, manifest = self.fields, self.manifest
        info = {
            "kind": "features",
            "path": self.folder.resolve().name,
            "model_name": self.model_name,
            "model": have["model"],
            "spatial": have["spatial"],
            "templates": have["templates"],
            "transform": have["transform"],
            "augment_passes": have["augment_passes"],
            "skipped": [list(pair) for pair in self.skipped],
            "digests": {
                "images": have["images"],
                "text": manifest["text"]["sha256"],
                "weights": have["weights"],
                "features": self.key,
            },
        }
        return Records(
            self._store,
            class_names=have["class_names"],
            text=self._text,
            text_views=self._text_views,
            label=torch.tensor(manifest["label"], dtype=torch.long),
            names=manifest["names"],
            logit_scale=manifest["logit_scale"],
            info=info,
            targets=_targets(manifest),
            roles=None if self.roles is None else torch.tensor(self.roles, dtype=torch.int8),
        )


def _check_columns(manifest: Json, where: str) -> None:
    """Refuse columns that have not one value for each row, and rows without a label."""
    count = sum(entry["rows"] for entry in manifest["shards"])
    for name in ("names", "label", "labels", "digests", "pixels", "perceptual", "roles"):
        column = manifest.get(name)
        if column is not None and len(column) != count:
            raise ValueError(f"{where}: {name} must have {count} values, got {len(column)}")
    if any(not labels for labels in manifest.get("labels", ())):
        raise ValueError(f"{where}: labels must name a class of each row")


def _targets(manifest: Json) -> Tensor | None:
    """All classes of each image [N, K], of images that may have more than one."""
    if "labels" not in manifest:
        return None
    targets = torch.zeros(
        len(manifest["labels"]), len(manifest["fields"]["class_names"]), dtype=torch.bool
    )
    for row, labels in enumerate(manifest["labels"]):
        if any(label >= targets.shape[1] for label in labels):
            raise FeaturesDamaged(
                f"features: label {max(labels)} of row {row} is of no class of {targets.shape[1]}"
            )
        targets[row, labels] = True
    return targets


class ShardStore(PartedStore):
    """Rows of memory-mapped shards, each checked against its digest before its first use."""

    def __init__(self, folder: Path, manifest: Json) -> None:
        self._folder = folder
        self._shards: list[Json] = manifest["shards"]
        self._open: dict[int, dict[str, Tensor]] = {}
        super().__init__([entry["rows"] for entry in self._shards])
        self.width = int(manifest["width"])
        self.num_passes = int(manifest["fields"]["augment_passes"])
        self.spatial_width = manifest["spatial_width"]
        self.spatial_tokens = manifest["spatial_tokens"]
        self.digests: list[str] | None = manifest.get("digests")
        # of the images: older features lack them
        self.pixels: list[str | None] | None = manifest.get("pixels")
        self.perceptual: list[str | None] | None = manifest.get("perceptual")

    def check(self, shard: int) -> None:
        self._tensors(shard)

    def read(self, part: int, name: str, row: Tensor, augment_pass: int) -> Tensor:
        return self._tensors(part)[name][row, augment_pass].float()

    def _tensors(self, shard: int) -> dict[str, Tensor]:
        if shard not in self._open:
            entry = self._shards[shard]
            tensors = _tensors(self._folder, entry)
            passes = 1 + self.num_passes
            wish = {"image": [entry["rows"], passes, self.width]}
            if self.spatial_tokens is not None and self.spatial_width is not None:
                wish["spatial"] = [entry["rows"], passes, self.spatial_tokens, self.spatial_width]
            got = {name: list(tensor.shape) for name, tensor in tensors.items()}
            if got != wish:
                raise FeaturesDamaged(f"features: {entry['file']} must hold {wish}, got {got}")
            self._open[shard] = tensors
        return self._open[shard]


def _check_size(folder: Path, entry: Json) -> None:
    path = folder / Path(entry["file"]).name  # never outside the folder
    size = path.stat().st_size if path.is_file() else None
    if size != entry["bytes"]:
        raise FeaturesDamaged(
            f"features: {path} must have {entry['bytes']} bytes, got "
            f"{'no such file' if size is None else size}"
        )


def _tensors(folder: Path, entry: Json) -> dict[str, Tensor]:
    """The tensors of a file with the recorded digest, mapped and not read."""
    _check_size(folder, entry)
    path = folder / Path(entry["file"]).name
    digest = file_digest(path)
    if digest != entry["sha256"]:
        raise FeaturesDamaged(f"features: {path} was changed after it was written (sha256 differs)")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise FeaturesDamaged(f"features: {path} is not a safetensors file: {error}") from None


def file_digest(path: Path) -> str:
    """sha256 of a file in pieces."""
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            total.update(piece)
    return total.hexdigest()
