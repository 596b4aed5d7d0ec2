# SPDX-License-Identifier: Apache-2.0
"""Image folders to features on disk: hashed, decoded in threads, resumable, one writer at a time.

Order of work: every file is hashed; the key follows from hashes and model; finished features of
that key are reused; else shards are written one by one (temporary file, fsync, rename), noted in
partial.json, and the manifest comes last. A run that was cut off goes on after its last shard. A
full disk or a kill leaves finished features untouched. Files that cannot be decoded are listed in
the report and the manifest and have no row.

The cache lies in VTCLIP_CACHE or ~/.cache/vtclip, one folder per key. A file counts as unchanged
by its content, not by its name or time.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import hashlib
import logging
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from vtclip.clip import Clip, load_clip, mean_text, resolve_templates
from vtclip.data.augment import AUGMENTATION, pass_generator
from vtclip.data.featureset import (
    FORMAT,
    MANIFEST,
    TEXT,
    VERSION,
    FeaturesDamaged,
    FeatureSet,
    file_digest,
)
from vtclip.data.hashing import (
    Hashed,
    Report,
    ahead,
    decode_pool,
    duplicates_of,
    hash_all,
    progress_bar,
)
from vtclip.data.images import (
    Folder,
    ImageError,
    content_digest,
    decode,
    printable,
    read_file,
    scan_folder,
)
from vtclip.files import json_digest, only_writer, read_json, to_json, write_atomic

__all__ = ["Report", "cached_features", "default_cache", "extract_features"]

logger = logging.getLogger(__name__)

PARTIAL = "partial.json"
SHARD_BYTES, SHARD_ROWS = 64 * 2**20, 4096
LOCK_WAIT_S = 600.0
EAGER_BYTES = 2**30
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def default_cache() -> Path:
    """VTCLIP_CACHE, else ~/.cache/vtclip."""
    named = os.environ.get("VTCLIP_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "vtclip"


def extract_features(
    source: str | Path,
    out: str | Path,
    *,
    model: str | Path | Clip = "demo",
    spatial: str | None = None,
    augment_passes: int = 0,
    templates: str | Sequence[str] | None = None,
    dtype: str = "float16",
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    progress: bool = True,
    follow_links: bool = False,
) -> tuple[FeatureSet, Report]:
    """Features of an image folder in the folder `out`, reused where they are there already.

    `dtype` is that of the spatial features. Features of something else in `out` are an error that
    names what differs, and stay as they are.
    """
    out = Path(out).expanduser()
    if _is_inside(out, Path(source).expanduser()):
        raise ValueError(f"features: out must lie outside the image folder, got {out}")
    job = _Job.of(source, model, spatial, augment_passes, templates, dtype, batch_size, device,
                  progress, follow_links)  # fmt: skip
    return job.run(out)


def cached_features(
    source: str | Path | Folder,
    *,
    model: str | Path | Clip = "demo",
    spatial: str | None = None,
    augment_passes: int = 0,
    templates: str | Sequence[str] | None = None,
    cache_dir: str | Path | None = None,
    dtype: str = "float16",
    batch_size: int = 64,
    device: str | torch.device = "cpu",
    progress: bool = True,
    follow_links: bool = False,
) -> tuple[FeatureSet, Report]:
    """Features of an image folder, or of listed files, from the cache.

    They are made first where they are missing or damaged.
    """
    job = _Job.of(source, model, spatial, augment_passes, templates, dtype, batch_size, device,
                  progress, follow_links)  # fmt: skip
    place = Path("features") / job.key[:32]
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # below says what is wrong, if so
        cache = Path(cache_dir).expanduser() if cache_dir is not None else default_cache()
        if (cache / place / MANIFEST).is_file() and not os.access(cache / place, os.W_OK):
            return job.reuse(FeatureSet.open(cache / place))
    return job.run(_writable_cache(cache_dir) / place, rebuild=True)


@dataclass
class _Job:
    """One extraction: hashed files, a model and the fields that decide every number."""

    hashed: Hashed
    clip: Clip
    fields: dict[str, Any]
    batch_size: int
    progress: bool

    @classmethod
    def of(
        cls,
        source: str | Path | Folder,
        model: str | Path | Clip,
        spatial: str | None,
        augment_passes: int,
        templates: str | Sequence[str] | None,
        dtype: str,
        batch_size: int,
        device: str | torch.device,
        progress: bool,
        follow_links: bool,
    ) -> _Job:
        if dtype not in DTYPES:
            raise ValueError(f"features: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
        for what, value, low in (
            ("augment_passes", augment_passes, 0),
            ("batch_size", batch_size, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(
                    f"features: {what} must be an int of at least {low}, got {value!r}"
                )
        lines = resolve_templates(templates)
        if isinstance(source, Folder):
            folder = source
        else:
            folder = scan_folder(source, follow_links=follow_links)
        clip = model if isinstance(model, Clip) else load_clip(model, device)
        spatial = clip.check_spatial(spatial)
        hashed = hash_all(folder, progress)
        fields = {
            "model": clip.config,
            "weights": clip.weights_digest,
            "transform": {
                **clip.preprocess_cfg,
                "augmentation": AUGMENTATION if augment_passes else None,
            },
            "augment_passes": augment_passes,
            "templates": lines,
            "class_names": folder.class_names,
            "images": hashed.digest(),
            "spatial": spatial,
            "dtype": dtype if spatial is not None else None,
            "features_version": VERSION,
        }
        if folder.prompts not in (None, folder.class_names):
            fields["prompts"] = folder.prompts
        return cls(hashed, clip, fields, batch_size, progress)

    @property
    def key(self) -> str:
        return json_digest(self.fields)

    def reuse(self, found: FeatureSet) -> tuple[FeatureSet, Report]:
        """Finished features of a folder that cannot be written, and so cannot be locked."""
        if found.key != self.key:
            raise ValueError(f"features: {found.folder} holds features of something else")
        found.verify()
        return found, Report(
            len(found), found.skipped, duplicates_of(self.hashed), found.num_bytes, reused=True
        )

    def run(self, folder: Path, *, rebuild: bool = False) -> tuple[FeatureSet, Report]:
        start = time.perf_counter()
        report = Report(duplicates=duplicates_of(self.hashed))
        if report.duplicates:
            first, second = report.duplicates[0]
            logger.warning(
                "%d images have the same content as another one, e.g. %s and %s: they may be in "
                "training and test at once",
                len(report.duplicates), printable(first), printable(second),
            )  # fmt: skip
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _hold(folder):
            found = self._finished(folder, rebuild)
            report.reused = found is not None
            if found is None:
                self._build(folder)
                found = FeatureSet.open(folder)
        report.rows, report.skipped = len(found), found.skipped
        report.num_bytes, report.seconds = found.num_bytes, time.perf_counter() - start
        if report.skipped:
            logger.warning("%s", "; ".join(report.lines(5)))
        return found, report

    def _finished(self, folder: Path, rebuild: bool) -> FeatureSet | None:
        if (folder / MANIFEST).exists():
            try:
                found = FeatureSet.open(folder)
                if found.num_bytes <= EAGER_BYTES:
                    found.verify()
            except FeaturesDamaged as error:
                if not rebuild:
                    raise ValueError(f"{error}; remove the folder to build it again") from None
                logger.warning("%s; building it again", error)
                for path in [*folder.glob("*.json"), *folder.glob("*.safetensors")]:
                    path.unlink()
                return None
            if found.key == self.key:
                return found
            differs = [
                name for name, value in self.fields.items() if found.fields.get(name) != value
            ]
            raise ValueError(
                f"features: {folder} holds features that differ in {', '.join(differs)}; "
                "give another folder or remove this one"
            )
        others = [path for path in folder.iterdir() if path.name != f"{PARTIAL}.new"]
        if others and not (folder / PARTIAL).exists():
            raise ValueError(f"features: {folder} holds other files; give a new or an empty folder")
        return None

    def _build(self, folder: Path) -> None:
        clip, fields, hashed = self.clip, self.fields, self.hashed
        passes = 1 + fields["augment_passes"]
        tokens = self._spatial_shape()
        row_bytes = passes * 4 * clip.width
        if tokens is not None:
            row_bytes += passes * tokens[0] * tokens[1] * DTYPES[fields["dtype"]].itemsize
        self._announce(folder, row_bytes)
        per_shard = max(1, min(SHARD_ROWS, SHARD_BYTES // row_bytes))
        ranges = [(start, min(start + per_shard, len(hashed.names)))
                  for start in range(0, len(hashed.names), per_shard)]  # fmt: skip
        done = self._resume(folder)
        self._note(folder, done)  # before all else, so that a later run knows the folder as ours
        words = fields.get("prompts", fields["class_names"])
        views = clip.encode_text_views(words, fields["templates"]).cpu()
        texts = {"text": mean_text(views, words)}
        if views.shape[1] > 1:
            texts["text_views"] = views
        text_entry = _write_tensors(folder / TEXT, texts)
        todo = [pair for number, pair in enumerate(ranges) if number not in done]
        rows = [row for start, stop in todo for row in range(start, stop)]
        per_batch = max(1, self.batch_size // passes)
        with (
            warnings.catch_warnings(),
            decode_pool() as pool,
            progress_bar(len(hashed.names), "features", self.progress) as bar,
        ):
            warnings.filterwarnings("ignore", module="PIL")  # metadata that nobody uses
            loaded = ahead(pool, self._load, rows, 2 * per_batch)
            bar.update(len(hashed.names) - len(rows))
            for number, (start, stop) in enumerate(ranges):
                if number in done:
                    continue
                done[number] = self._shard(
                    folder, number, range(start, stop), loaded, per_batch, tokens, bar
                )
                self._note(folder, done)
        self._finish(folder, [done[number] for number in range(len(ranges))], text_entry, tokens)

    def _announce(self, folder: Path, row_bytes: int) -> None:
        need = row_bytes * len(self.hashed.names)
        free = shutil.disk_usage(folder).free
        logger.info("features: %d images, about %.1f MB in %s",
                    len(self.hashed.names), need / 1e6, folder)  # fmt: skip
        if need > free:
            raise OSError(
                errno.ENOSPC, f"features: {folder} needs about {need} bytes, {free} are free"
            )

    def _spatial_shape(self) -> tuple[int, int] | None:
        """(L, Cs) from one blank image."""
        if self.fields["spatial"] is None:
            return None
        size = self.clip.preprocess_cfg["size"]
        height, width = (size, size) if isinstance(size, int) else size
        _, spatial = self.clip.encode_image(
            torch.zeros(1, 3, height, width), self.fields["spatial"]
        )
        if spatial is None:
            raise ValueError(f"features: the model gives no spatial {self.fields['spatial']!r}")
        return int(spatial.shape[1]), int(spatial.shape[2])

    def _note(self, folder: Path, done: dict[int, dict[str, Any]]) -> None:
        body = {"key": self.key, "shards": [done[number] for number in sorted(done)]}
        write_atomic(folder / PARTIAL, to_json({**body, "digest": json_digest(body)}))

    def _resume(self, folder: Path) -> dict[int, dict[str, Any]]:
        """Shards of this key that an earlier run finished and whose bytes are still right."""
        if not (folder / PARTIAL).exists():
            return {}
        try:
            partial = read_json(folder / PARTIAL, "a list of finished shards")
        except ValueError:
            return {}
        body = {"key": partial.get("key"), "shards": partial.get("shards")}
        if partial.get("digest") != json_digest(body) or body["key"] != self.key:
            return {}
        good: dict[int, dict[str, Any]] = {}
        for entry in partial["shards"]:
            path = folder / Path(entry["file"]).name
            if path.is_file() and file_digest(path) == entry["sha256"]:
                good[int(entry["number"])] = entry
        logger.info("features: going on after %d finished shards", len(good))
        return good

    def _load(self, row: int) -> Tensor | ImageError:
        """Views [1 + P, 3, H, W] of one file: plain, then the augmented passes."""
        path = self.hashed.folder.path(self.hashed.names[row])
        data = read_file(path)
        digest = content_digest(data)
        if digest != self.hashed.digests[row]:
            raise ImageError(path, "the file changed while features were made")
        try:
            image = decode(data, path)
        except ImageError as error:
            return error
        views = [self.clip.preprocess(image)]
        for augment_pass in range(1, 1 + self.fields["augment_passes"]):
            views.append(self.clip.augment(image, pass_generator(digest, augment_pass)))
        return torch.stack(views)

    def _shard(
        self,
        folder: Path,
        number: int,
        rows: range,
        loaded: Iterator[Tensor | ImageError],
        per_batch: int,
        tokens: tuple[int, int] | None,
        bar: Any,
    ) -> dict[str, Any]:
        images: list[Tensor] = []
        spatials: list[Tensor] = []
        kept: list[int] = []
        skipped: list[tuple[str, str]] = []
        # batches end with their shard, so that a resumed run computes the very same numbers
        for start in range(rows.start, rows.stop, per_batch):
            views: list[Tensor] = []
            for row in range(start, min(start + per_batch, rows.stop)):
                item = next(loaded)
                bar.update()
                if isinstance(item, ImageError):
                    skipped.append((self.hashed.names[row], item.reason))
                else:
                    kept.append(row)
                    views.append(item)
            if not views:
                continue
            image, spatial = self.clip.encode_image(torch.cat(views), self.fields["spatial"])
            shape = (len(views), len(views[0]))
            images.append(image.float().cpu().unflatten(0, shape))  # type: ignore[no-untyped-call]
            if spatial is not None:
                spatials.append(
                    spatial.cpu().to(DTYPES[self.fields["dtype"]]).unflatten(0, shape)  # type: ignore[no-untyped-call]
                )
        passes = 1 + self.fields["augment_passes"]
        empty = torch.empty(0, passes, self.clip.width)
        tensors = {"image": torch.cat(images) if images else empty}
        if tokens is not None:
            none = torch.empty(0, passes, *tokens, dtype=DTYPES[self.fields["dtype"]])
            tensors["spatial"] = torch.cat(spatials) if spatials else none
        self._check(tensors, kept)
        entry = _write_tensors(folder / f"shard-{number:05d}.safetensors", tensors)
        return {**entry, "number": number, "rows": len(kept), "kept": kept, "skipped": skipped}

    def _check(self, tensors: dict[str, Tensor], kept: list[int]) -> None:
        for what, tensor in tensors.items():
            flat = tensor.flatten(1) if len(tensor) else tensor.reshape(0, 1)
            bad = (~flat.isfinite()).any(dim=1).nonzero().flatten().tolist()
            if bad:
                hint = " (try dtype='float32')" if tensor.dtype == torch.float16 else ""
                raise ValueError(
                    f"features: {what} features of {len(bad)} images are not finite{hint}, "
                    f"e.g. of {printable(self.hashed.names[kept[bad[0]]])}"
                )
        zero = (tensors["image"] == 0).all(dim=-1).any(dim=-1).nonzero().flatten().tolist()
        if zero:
            raise ValueError(f"features: the image features of {len(zero)} images are all 0, e.g. "
                             f"of {printable(self.hashed.names[kept[zero[0]]])}")  # fmt: skip

    def _finish(
        self,
        folder: Path,
        entries: list[dict[str, Any]],
        text_entry: dict[str, Any],
        tokens: tuple[int, int] | None,
    ) -> None:
        hashed = self.hashed
        kept = [row for entry in entries for row in entry["kept"]]
        class_names = self.fields["class_names"]
        lost = [
            name for k, name in enumerate(class_names) if k not in {hashed.label[r] for r in kept}
        ]
        if lost:
            raise ValueError(f"features: no image of these classes could be read: "
                             f"{', '.join(map(printable, lost[:8]))}")  # fmt: skip
        skipped = [*hashed.skipped, *(pair for entry in entries for pair in entry["skipped"])]
        body: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "key": self.key,
            "fields": self.fields,
            "model_name": self.clip.name,
            "logit_scale": self.clip.logit_scale,
            "width": self.clip.width,
            "spatial_tokens": tokens[0] if tokens else None,
            "spatial_width": tokens[1] if tokens else None,
            "names": [hashed.names[row] for row in kept],
            "label": [hashed.label[row] for row in kept],
            "sizes": [hashed.sizes[row] for row in kept],
            "digests": [hashed.digests[row] for row in kept],
            "skipped": skipped,
            "text": text_entry,
            "shards": [
                {name: entry[name] for name in ("file", "bytes", "sha256", "rows")}
                for entry in entries
            ],
        }
        write_atomic(folder / MANIFEST, to_json({**body, "digest": json_digest(body)}))
        for path in (folder / PARTIAL, *folder.glob("*.new")):
            path.unlink(missing_ok=True)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    # cloned, because a view would take its whole storage to the disk
    data = safetensors.torch.save(
        {name: value.contiguous().clone() for name, value in tensors.items()}
    )
    write_atomic(path, data)
    return {"file": path.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


@contextlib.contextmanager
def _hold(folder: Path) -> Iterator[None]:
    """Be the only writer of `folder`, after waiting for another one to finish."""
    deadline = time.monotonic() + LOCK_WAIT_S
    told = False
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(only_writer(folder))
                break
            except FileExistsError:
                if time.monotonic() > deadline:
                    raise
                if not told:
                    logger.info("features: waiting for another process to finish %s", folder)
                told = True
                time.sleep(0.1)
        yield


def _writable_cache(cache_dir: str | Path | None) -> Path:
    """The cache folder, or a temporary one with a warning where nothing can be written."""
    try:
        folder = Path(cache_dir).expanduser() if cache_dir is not None else default_cache()
        (folder / "features").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder / "features"):
            return folder
    except (OSError, RuntimeError) as error:
        logger.warning(
            "the cache cannot be written (%s); features are kept for this run only", error
        )
    temporary = Path(tempfile.mkdtemp(prefix="vtclip-"))
    atexit.register(shutil.rmtree, temporary, ignore_errors=True)
    return temporary


def _is_inside(path: Path, root: Path) -> bool:
    real, top = os.path.realpath(path), os.path.realpath(root)
    return real == top or real.startswith(top + os.sep)
