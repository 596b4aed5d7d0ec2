# SPDX-License-Identifier: Apache-2.0
"""The shards of one features folder: which images belong to which, encoded and written.

A shard holds whole batches, and which images those are follows from the number of images and the
batch size alone: so one process or several, and a run that was interrupted and resumed, compute
the very same batches and write the same bytes. A finished shard has a note next to it,
shard-00000.json, which is removed once the manifest is written.

While one batch is encoded, the next is decoded on the cores that are free (vtclip.data.threads) and
the previous shard is written.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from vtclip.clip import Clip, mean_text
from vtclip.clip.augment import pass_generator
from vtclip.data.decode import ImageError, content_digest, decode_noted, pixel_digest
from vtclip.data.featureset import TEXT, file_digest
from vtclip.data.hashing import Hashed
from vtclip.data.loading import Batches
from vtclip.data.perceptual import perceptual_digest
from vtclip.data.threads import progress_bar
from vtclip.files import Json, json_digest, printable, read_json, to_json, write_atomic
from vtclip.machine import BatchSize

logger = logging.getLogger(__name__)

# about SHARDS shards, so that several processes have equal shares; fewer if they would be smaller
# than LEAST_ROWS, and more if they would be larger than SHARD_ROWS or SHARD_BYTES
SHARDS, LEAST_ROWS, SHARD_ROWS, SHARD_BYTES = 32, 64, 4096, 64 * 2**20
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class Taken(NamedTuple):
    """What is kept of one decoded image beside its features."""

    pixels: str | None
    perceptual: str | None
    notes: tuple[str, ...]


@dataclass
class Work:
    """Hashed files, a model and the fields that decide every number of their features."""

    hashed: Hashed
    clip: Clip
    fields: Json
    batch_size: int
    progress: bool
    stages: dict[str, float] = field(default_factory=dict)
    taken: dict[int, Taken] = field(default_factory=dict)
    at_a_time: BatchSize = field(default_factory=BatchSize)

    @property
    def key(self) -> str:
        return json_digest(self.fields)

    @property
    def passes(self) -> int:
        return 1 + int(self.fields["augment_passes"])

    @property
    def per_batch(self) -> int:
        """Images of one batch; their augmented passes are encoded in the same batch."""
        return max(1, self.batch_size // self.passes)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.stages[stage] = self.stages.get(stage, 0.0) + time.perf_counter() - start

    def row_bytes(self, tokens: tuple[int, int] | None) -> int:
        """Bytes of one image's features; `tokens`: (L, Cs) of its spatial ones."""
        per_pass = 4 * self.clip.width
        if tokens is not None:
            per_pass += tokens[0] * tokens[1] * DTYPES[self.fields["dtype"]].itemsize
        return self.passes * per_pass


@dataclass(frozen=True)
class Shard:
    """Images start..stop - 1 of the hashed ones."""

    number: int
    start: int
    stop: int

    @property
    def file(self) -> str:
        return f"shard-{self.number:05d}.safetensors"

    def batches(self, rows: int) -> list[range]:
        return [range(at, min(at + rows, self.stop)) for at in range(self.start, self.stop, rows)]

    def note(self, folder: Path) -> Path:
        return folder / f"shard-{self.number:05d}.json"


def shards_of(work: Work, tokens: tuple[int, int] | None) -> list[Shard]:
    """The shards of all images: whole batches, except for the very last one."""
    count, batch = len(work.hashed.names), work.per_batch
    most = max(1, min(SHARD_ROWS, SHARD_BYTES // work.row_bytes(tokens)))
    rows = -(-max(LEAST_ROWS, -(-count // SHARDS)) // batch) * batch
    if rows > most:
        rows = max(most // batch * batch, min(most, batch))
    return [
        Shard(number, start, min(start + rows, count))
        for number, start in enumerate(range(0, count, rows))
    ]


def finished_shards(work: Work, shards: Sequence[Shard], folder: Path) -> dict[int, Json]:
    """Entries of the shards that an earlier run finished and whose bytes are unchanged."""
    intact: dict[int, Json] = {}
    for shard in shards:
        try:
            note = read_json(shard.note(folder), "a note of a finished shard")
        except (OSError, ValueError):
            continue
        entry, path = note.get("entry", {}), folder / shard.file
        if note != _note(work, shard, entry) or not path.is_file():
            continue
        if file_digest(path) == entry["sha256"]:
            intact[shard.number] = entry
    return intact


def _note(work: Work, shard: Shard, entry: Json) -> Json:
    rows = [shard.start, shard.stop, work.per_batch]
    body = {"key": work.key, "rows": rows, "entry": entry}
    return {**body, "digest": json_digest(body)}


def write_text(work: Work, folder: Path) -> Json:
    """Encodes and writes the class texts; returns the manifest's entry for their file."""
    fields = work.fields
    words: list[str] = fields["prompts"] if "prompts" in fields else fields["class_names"]
    views = work.clip.encode_text_views(words, fields["templates"]).cpu()
    texts = {"text": mean_text(views, words)}
    if views.shape[1] > 1:
        texts["text_views"] = views
    entry = write_tensors(folder / TEXT, texts)
    cut = getattr(work.clip, "cut_prompts", {})
    if cut.get("cut"):  # so that who takes these features from the cache is told as well
        entry |= {**cut, "context": work.clip.tokenizer.context_length}
    return entry


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> Json:
    # cloned, because a view would take its whole storage to the disk
    data = safetensors.torch.save(
        {name: value.contiguous().clone() for name, value in tensors.items()}
    )
    write_atomic(path, data)
    return {"file": path.name, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def make_shards(
    work: Work,
    shards: Sequence[Shard],
    folder: Path,
    tokens: tuple[int, int] | None,
    *,
    finished: int = 0,
    meanwhile: Callable[[], None] = lambda: None,
) -> dict[int, Json]:
    """Encodes and writes `shards`; returns the entries of their files by shard number.

    finished: images that the progress bar counts from the start. meanwhile: called while the first
    batch is decoded.
    """
    done: dict[int, Json] = {}
    total = finished + sum(shard.stop - shard.start for shard in shards)
    pieces = [piece for shard in shards for piece in shard.batches(work.per_batch)]
    size = work.clip.preprocess_cfg["size"]
    height, width = (size, size) if isinstance(size, int) else size
    on_cpu = work.clip.device.type == "cpu"
    with (
        warnings.catch_warnings(),
        ThreadPoolExecutor(1, thread_name_prefix="vtclip-write") as writer,
        progress_bar(total, "features", work.progress) as bar,
        Batches(
            functools.partial(load_views, work),
            pieces,
            (work.passes, 3, height, width),
            torch.get_num_threads() if on_cpu else 1,
        ) as batches,
    ):
        warnings.filterwarnings("ignore", module="PIL")  # metadata that nobody uses
        bar.update(finished)
        meanwhile()
        pending: Future[None] | None = None

        def write(
            shard: Shard,
            tensors: dict[str, Tensor],
            rows: list[int],
            skipped: list[tuple[str, str]],
        ) -> None:
            _check(work, tensors, rows)
            entry = write_tensors(folder / shard.file, tensors)
            entry |= {"number": shard.number, "rows": len(rows), "kept": rows, "skipped": skipped}
            entry |= {"taken": [work.taken.pop(row) for row in rows]}
            write_atomic(shard.note(folder), to_json(_note(work, shard, entry)))
            done[shard.number] = entry

        for shard in shards:
            encoded = _encode_shard(work, shard, batches, tokens, bar)
            with work.timed("waiting for the disk"):
                if pending is not None:
                    pending.result()
            pending = writer.submit(write, shard, *encoded)
        with work.timed("waiting for the disk"):
            if pending is not None:
                pending.result()
    return done


def load_views(work: Work, row: int) -> Tensor | ImageError:
    """Views [1 + P, 3, H, W] of one file: the plain one, then the augmented passes."""
    path = work.hashed.folder.path(work.hashed.names[row])
    data = work.hashed.folder.read(work.hashed.names[row])
    digest = content_digest(data)
    if digest != work.hashed.digests[row]:
        raise ImageError(path, "the file changed while features were extracted")
    try:
        image, notes = decode_noted(data, path)
    except ImageError as error:
        return error
    work.taken[row] = Taken(pixel_digest(image), perceptual_digest(image), notes)
    views = [work.clip.preprocess(image)]
    for augment_pass in range(1, work.passes):
        views.append(work.clip.augment(image, pass_generator(digest, augment_pass)))
    return torch.stack(views) if len(views) > 1 else views[0][None]


def _encode_shard(
    work: Work, shard: Shard, batches: Batches, tokens: tuple[int, int] | None, bar: Any
) -> tuple[dict[str, Tensor], list[int], list[tuple[str, str]]]:
    """A shard's tensors, the rows they hold, and (name, reason) of the files without a row."""
    dtype = DTYPES[work.fields["dtype"]] if tokens is not None else torch.float32
    shape = (work.passes, work.clip.width)
    images = [torch.empty(0, *shape)]
    spatials = [torch.empty(0, work.passes, *(tokens or ()), dtype=dtype)]
    rows: list[int] = []
    skipped: list[tuple[str, str]] = []

    def encode(pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        image, spatial = work.clip.encode_image(pixels, work.fields["spatial"])
        return image.float().cpu(), None if spatial is None else spatial.cpu().to(dtype)

    for piece in shard.batches(work.per_batch):
        with work.timed("waiting for images"):
            pixels, errors = batches.next_batch()
        for row, error in zip(piece, errors, strict=True):
            if error is None:
                rows.append(row)
            else:
                skipped.append((work.hashed.names[row], error.reason))
        if len(pixels):
            with work.timed("encoding"):
                parts = work.at_a_time.map(encode, pixels)
            # joined first, because the views of one image may be in two parts
            images.append(torch.cat([image for image, _ in parts]).reshape(-1, *shape))
            if tokens is not None:
                spatial = torch.cat([part for _, part in parts if part is not None])
                spatials.append(spatial.reshape(-1, *spatials[0].shape[1:]))
        bar.update(len(errors))
    tensors = {"image": torch.cat(images)}
    if tokens is not None:
        tensors["spatial"] = torch.cat(spatials)
    return tensors, rows, skipped


def _check(work: Work, tensors: dict[str, Tensor], rows: list[int]) -> None:
    """Every number is finite and no image feature is 0; `rows` name the images."""
    for what, tensor in tensors.items():
        flat = tensor.flatten(1) if len(tensor) else tensor.reshape(0, 1)
        bad = (~flat.isfinite()).any(dim=1).nonzero().flatten().tolist()
        if bad:
            hint = " (try dtype='float32')" if tensor.dtype == torch.float16 else ""
            raise ValueError(
                f"features: {what} features of {len(bad)} images are not finite{hint}, "
                f"e.g. of {printable(work.hashed.names[rows[bad[0]]])}"
            )
    zero = (tensors["image"] == 0).all(dim=-1).any(dim=-1).nonzero().flatten().tolist()
    if zero:
        raise ValueError(
            f"features: the image features of {len(zero)} images are all 0, e.g. "
            f"of {printable(work.hashed.names[rows[zero[0]]])}"
        )
