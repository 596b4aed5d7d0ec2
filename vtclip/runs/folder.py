# SPDX-License-Identifier: Apache-2.0
"""A run's folder: its name, what may be replaced in it, its log, and the finished run in it."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vtclip.data.image_files import InMemory
from vtclip.data.sets import SetSource
from vtclip.files import Json, only_writer, to_json
from vtclip.heads import HEADS
from vtclip.runs import result
from vtclip.runs.adapter import CONFIG, TENSORS
from vtclip.runs.encoders import ENCODERS
from vtclip.runs.predictions import CONFUSION, PREDICTIONS, named_parts, write_decisions
from vtclip.runs.result import RESULT, Run
from vtclip.runs.seen import FILE as IMAGES
from vtclip.runs.seen import Seen
from vtclip.train.checkpoint import Checkpoint
from vtclip.train.rows import split_rows
from vtclip.train.steps import TrainingRun

if TYPE_CHECKING:
    from vtclip.data.records import Records
    from vtclip.data.splits import Split
    from vtclip.machine import Stopwatch
    from vtclip.runs.request import FitRequest
    from vtclip.train.calibration import Judged

logger = logging.getLogger(__name__)
CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"
RUN_FILES = {TENSORS, CONFIG, ENCODERS, RESULT, CHECKPOINT, LOG, PREDICTIONS, CONFUSION, IMAGES}


@dataclass(frozen=True)
class RunRows:
    """The records that one run evaluates on, which of their rows it draws, and for how many shots.

    training: the records with the labels that training sees, where pseudo-labels replace them.
    new: records of the classes that are never trained on, of a base-to-new run.
    left_out: test images whose content trained or validated, which the split lacks for it.
    """

    records: Records
    split: Split
    shots: int
    training: Records
    new: Records | None = None
    left_out: Json = field(default_factory=dict)

    def seen(self, method: str, seed: int, test_fraction: float) -> Seen:
        """Every image of the run's source with its role."""
        seen = Seen.of(self.records, self.split, learns=HEADS[method].learns)
        if self.new is None:
            return seen
        split = split_rows(self.new, False, 0, seed, test_fraction)
        return seen + Seen.of(self.new, split, learns=False)


def run_folder(request: FitRequest, shots: int) -> Path:
    """The folder that the request names, else runs/SOURCE-METHOD-SHOTSshot-seedSEED."""
    if request.out is not None:
        return Path(request.out).expanduser()
    source = request.source
    name = source.resolve().name
    if isinstance(source, Path) and source.is_file():
        name = source.resolve().stem
    kind = request.method
    if request.base_to_new or request.train_encoders:
        kind += "-base-to-new" if request.base_to_new else "-encoders"
    return Path("runs") / f"{name}-{kind}-{shots}shot-seed{request.seed}"


def check_run_folder(folder: Path, request: FitRequest) -> None:
    """Refuse an output that would touch the images, a file, or a run nobody asked to replace."""
    source, overwrite, resume = request.source, request.overwrite, request.resume
    images = source.root if isinstance(source, SetSource) else source
    if not isinstance(images, InMemory) and (
        images.is_dir() and folder.resolve().is_relative_to(images.resolve())
    ):
        raise ValueError(f"out {folder} lies inside the source {images}")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"out {folder} exists and is not a folder")
    held = {path.name.removesuffix(".new") for path in folder.iterdir()}
    if held - RUN_FILES and not held & RUN_FILES:
        raise FileExistsError(f"out {folder} exists and is not a run (it holds {min(held)!r})")
    if held and not overwrite and not resume:
        raise FileExistsError(f"out {folder} holds a run already; set overwrite or resume")
    if overwrite:
        (folder / CHECKPOINT).unlink(missing_ok=True)


def finished_run(folder: Path, request: FitRequest, shots: int, config: Json) -> Run:
    """The finished run in `folder`, where it is the requested one."""
    run = Run.load(folder)
    requested = {"method": request.method, "shots": shots, "seed": request.seed, **config}
    recorded = {**run.result, **run.result["config"]}
    for name, value in json.loads(to_json(requested)).items():
        if name == "shots" and not HEADS[recorded["method"]].learns:
            continue
        if recorded.get(name) != value:
            raise ValueError(f"out {folder} holds a finished run with another {name}")
    logger.info("%s is finished, nothing to resume", folder)
    return run


def can_return_finished(folder: Path, request: FitRequest) -> bool:
    """Whether `resume` finds a finished run, which has a result and no checkpoint any more."""
    return request.resume and (folder / RESULT).is_file() and not (folder / CHECKPOINT).is_file()


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep other writers out of `folder`; remove what was created where no file gets written."""
    created = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        with only_writer(folder):
            yield
    except BaseException:
        with contextlib.suppress(OSError):
            for place in created:
                place.rmdir()
        raise


def write_run(
    folder: Path,
    request: FitRequest,
    rows: RunRows,
    config: Json,
    values: Json,
    watch: Stopwatch,
    digests: Mapping[str, str],
    judged: Judged | None,
    **others: object,
) -> Run:
    """Write what a finished fit says of its images, and its result; the checkpoint goes.

    digests: of what the run wrote; those of its source and split are added. judged: the adapted
    head's decisions on the validation and test images; None of several labels per image, of which
    no table of predictions is written.
    """
    records, split = rows.records, rows.split
    if judged is not None:
        temperature = values["adapted"]["temperature"]
        parts = named_parts(records.names, split, judged)
        others = {**others, **write_decisions(folder, parts, records.class_names, temperature)}
    learns = HEADS[request.method].learns
    seen = rows.seen(request.method, request.seed, request.test_fraction)
    if getattr(request, "final", False):  # fitted once more on all of them
        seen = seen.with_role("train")
    contents = result.make_result(
        values,
        watch,
        method=request.method,
        source=request.source.name,
        shots=rows.shots if learns or len(split.val) else 0,
        seed=request.seed,
        config=config,
        digests={**records.info.get("digests", {}), "split": split.digest, **digests},
        split=split.digest,
        classes=records.class_names,
        images=split.counts(),
        unreadable=result.unreadable(records),
        seen=seen.write(folder),
        left_out={"trained": 0, "validated": 0, **rows.left_out},
        **others,
    )
    run = Run.write(folder, contents)
    (folder / CHECKPOINT).unlink(missing_ok=True)
    return run


def training_run(request: FitRequest, checkpoint: Checkpoint, *, logs: bool = True) -> TrainingRun:
    """Where and how the request trains, with its log next to the checkpoint if `logs`."""
    resume = request.resume and checkpoint.path.is_file()
    run = TrainingRun(
        request.device,
        request.seed,
        checkpoint=checkpoint,
        resume=resume,
        progress=request.progress,
    )
    log = LineLog(checkpoint.path.parent / LOG, append=resume) if logs else run.log
    return replace(run, log=log)


class LineLog:
    """Appends JSON lines; a full disk costs the log, not the run."""

    def __init__(self, path: Path, *, append: bool) -> None:
        self.path, self.broken = path, False
        if not append:
            path.unlink(missing_ok=True)

    def __call__(self, row: Mapping[str, object]) -> None:
        if self.broken:
            return
        line = json.dumps(json.loads(to_json({**row, "time": time.time()}))) + "\n"
        try:
            with open(self.path, "a", encoding="ascii") as file:
                file.write(line)
        except OSError as error:
            self.broken = True
            logger.warning("cannot write %s (%s); the run goes on without it", self.path, error)
