# SPDX-License-Identifier: Apache-2.0
"""A run's folder: its name, what may be replaced in it, its log, and the finished run in it."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from vtclip.data.image_files import InMemory
from vtclip.data.sets import AnySource, SetSource, source_name
from vtclip.data.splits import UP_TO
from vtclip.files import Json, NewFiles, is_leftover, only_writer, printable, settle, to_json
from vtclip.names import option
from vtclip.runs import result
from vtclip.runs.adapter import CONFIG, TENSORS
from vtclip.runs.class_counts import images_per_class
from vtclip.runs.encoders import ENCODERS, LORA
from vtclip.runs.predictions import CONFUSION, PREDICTIONS, named_parts, write_decisions
from vtclip.runs.refit import refit_split
from vtclip.runs.result import RESULT, Run
from vtclip.runs.seen import FILE as IMAGES
from vtclip.runs.seen import Seen
from vtclip.runs.tell import told
from vtclip.runs.together import FILE as TOGETHER
from vtclip.runs.together import place_of
from vtclip.train.checkpoint import Checkpoint
from vtclip.train.steps import TrainingRun

if TYPE_CHECKING:
    from vtclip.data.records import Records
    from vtclip.data.splits import Split
    from vtclip.heads.config import FitConfig
    from vtclip.machine import Stopwatch
    from vtclip.runs.request import FitRequest
    from vtclip.train.calibration import Judged
    from vtclip.train.finetune_config import FinetuneConfig

logger = logging.getLogger(__name__)
CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"
# what a run means whose record lacks an option that came after it
LATER = {"draw": "exact", "follow_links": False, "final": False, "refit": False, "budget": None}
LATER |= {"lora": False, "unlabelled": None}
RUN_FILES = {TENSORS, CONFIG, ENCODERS, LORA, RESULT, CHECKPOINT, LOG, PREDICTIONS, CONFUSION}
RUN_FILES |= {IMAGES, TOGETHER}


@dataclass(frozen=True)
class RunRows:
    """The records that one run evaluates on, and which of their rows it draws.

    recipe_shots: training images of the usual class, for which the method's recipe is taken.
    training: the records with the labels that training sees, where pseudo-labels replace them.
    new: records of the classes that are never trained on, of a base-to-new run.
    new_split: which of those are tested.
    left_out: test images whose content trained or validated, which the split lacks for it.
    """

    records: Records
    split: Split
    recipe_shots: int
    training: Records
    new: Records | None = None
    left_out: Json = field(default_factory=dict)
    new_split: Split | None = None

    def seen(self, learns: bool, *, refit: bool = False) -> Seen:
        """Every image of the run's source with its role; `learns`: whether any could train.

        refit: whether the validation images trained at last.
        """
        split = refit_split(self.split) if refit else self.split
        seen = Seen.of(self.records, split, learns=learns)
        if self.new is None or self.new_split is None:
            return seen
        return seen + Seen.of(self.new, self.new_split, learns=False)


def run_folder(request: FitRequest) -> Path:
    """The folder that the request names, else runs/SOURCE-METHOD-SHOTSshot-seedSEED.

    SHOTS are those that were asked for, "all" too.
    """
    if request.out is not None:
        return Path(request.out).expanduser()
    source = request.source
    name = source_name(source)
    if isinstance(source, Path) and source.is_file():
        name = source.resolve().stem
    kind = request.method
    if request.base_to_new or request.train_encoders:
        kind += "-base-to-new" if request.base_to_new else "-encoders"
    kind = "lora" if request.lora else kind
    return Path("runs") / f"{name}-{kind}-{request.known_shots}shot-seed{request.seed}"


def check_run_folder(folder: Path, request: FitRequest) -> None:
    """Refuse an output that would touch images or a file, or a run nobody asked to replace."""
    name = option("out")
    for what, place in source_folders(request).items():
        if folder.resolve().is_relative_to(place.resolve()):
            hint = "" if request.out is not None else f"; name a folder outside of it as {name}"
            raise ValueError(f"{name} {folder} lies inside the {what} {place}{hint}")
    above = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not above.is_dir():
        if above == folder:
            raise FileExistsError(f"{name} {folder} exists and is not a folder")
        raise NotADirectoryError(f"{name} {folder}: {above} is a file")
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(f"{name} {folder}: {above} cannot be written to")
    if not folder.exists():
        return
    settle(folder)
    held = {path.name for path in folder.iterdir() if not is_leftover(path.name)}
    if held - RUN_FILES and not held & RUN_FILES:
        raise FileExistsError(f"{name} {folder} exists and is not a run (it holds {min(held)!r})")
    if held and not request.overwrite and not request.resume:
        ways = f"{option('overwrite')} or {option('resume')}"
        raise FileExistsError(f"{name} {folder} holds a run already; set {ways}")


def source_folders(request: FitRequest) -> dict[str, Path]:
    """The folders that the request reads, each by what to call it."""
    sources: dict[str, AnySource | None] = {"source": request.source}
    sources |= {f"source of {option(role)}": getattr(request, role) for role in ("val", "test")}
    sources[f"source of {option('unlabelled')}"] = place_of(request.unlabelled)
    places = {
        what: source.root if isinstance(source, SetSource) else source
        for what, source in sources.items()
        if source is not None and not isinstance(source, InMemory)
    }
    return {what: place for what, place in places.items() if place.is_dir()}


def finished_run(folder: Path, request: FitRequest) -> Run:
    """The finished run in `folder`, where it is the requested one."""
    run = Run.load(folder)
    recorded = {**run.result, **run.result["config"]}
    shots = recorded.get("recipe_shots", recorded["shots"])
    if request.train_encoders:
        settings: FitConfig | FinetuneConfig = request.encoder_settings(
            run.result["images"]["train"]
        )
    else:
        settings = request.settings(shots)
    config = request.as_config(shots, settings, refit=bool(request.refit))
    if request.refit is None:  # then the run has decided
        config.pop("refit", None)
    requested = {"method": request.method, "shots": request.known_shots, "seed": request.seed}
    for name, value in json.loads(to_json({**requested, **config})).items():
        if name == "shots" and not request.learns:
            continue
        # what was added after the run was not asked for then
        if recorded.get(name, LATER.get(name)) != value:
            raise ValueError(f"{option('out')} {folder} holds a finished run with another {name}")
    logger.info("%s is finished, nothing to resume", printable(str(folder)))
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
    new: NewFiles,
    request: FitRequest,
    rows: RunRows,
    config: Json,
    values: Json,
    watch: Stopwatch,
    digests: Mapping[str, str],
    judged: Judged | None,
    **others: object,
) -> Run:
    """Write what a finished fit says of its images, and its result; `folder` then holds the run.

    new: the files of the run so far. With the last one they replace, in one step, all that a run
    before left there, and the checkpoint; the log is that of this run already.
    values: metrics, and what else the result says; with "refit" validation images have trained.

    digests: of what the run wrote; those of its source and split are added. judged: the adapted
    head's decisions on the validation and test images; None of several labels per image, of which
    no table of predictions is written.
    """
    records, split = rows.records, rows.split
    if judged is not None:
        temperature = values["adapted"]["temperature"]
        parts = named_parts(records.names, split, judged)
        others = {**others, **write_decisions(new, parts, records.class_names, temperature)}
    learns = request.learns
    seen = rows.seen(learns, refit="refit" in values)
    if request.final:  # fitted once more on all of them
        seen = seen.with_role("train")
    contents = result.make_result(
        values,
        watch,
        method=request.method,
        source=source_name(request.source),
        shots=request.known_shots if learns or len(split.val) else 0,
        seed=request.seed,
        config=config,
        digests={**records.info.get("digests", {}), "split": split.digest, **digests},
        split=split.digest,
        classes=records.class_names,
        images=split.counts(),
        images_per_class=images_per_class(records, split),
        unreadable=result.unreadable(records),
        seen=seen.write(new),
        left_out={"trained": 0, "validated": 0, **rows.left_out},
        **others,
    )
    return finish_run(folder, new, contents)


def finish_run(folder: Path, new: NewFiles, contents: Json) -> Run:
    """Add the result to the new files of a run, which then are those of the folder."""
    run = Run.write(folder, contents, new)
    new.remove(*(RUN_FILES - new.names - {LOG}))
    new.commit()
    return run


def training_run(
    request: FitRequest,
    checkpoint: Checkpoint | None,
    *,
    logs: bool = True,
    log_to: Path | None = None,
) -> TrainingRun:
    """Where and how the request trains, with its log next to the checkpoint if `logs`.

    log_to: a log to add to, of a training without a checkpoint.
    """
    resume = request.resume and checkpoint is not None and checkpoint.path.is_file()
    run = TrainingRun(
        request.device,
        request.seed,
        checkpoint=checkpoint,
        resume=resume,
        balanced=request.rule == UP_TO and not request.pseudo_labels,
        progress=request.progress,
    )
    if log_to is not None:
        log = LineLog(log_to, append=True)
    elif checkpoint is None or not logs:
        return run
    else:
        log = LineLog(checkpoint.path.parent / LOG, append=resume)
    return replace(run, log=told(log, request.on_metrics, request.device))


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
            with open(self.path, "a", encoding="ascii", opener=_open_no_link) as file:
                file.write(line)
        except OSError as error:
            self.broken = True
            place, why = printable(str(self.path)), printable(str(error))
            logger.warning("cannot write %s (%s); the run goes on without it", place, why)


def _open_no_link(path: str, flags: int) -> int:
    flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    return os.open(path, flags, 0o666)
