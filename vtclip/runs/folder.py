# SPDX-License-Identifier: Apache-2.0
"""A run's folder: its name, what may be replaced in it, its log, and the finished run in it."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vtclip.data.sets import SetSource
from vtclip.files import Json, to_json
from vtclip.runs.adapter import CONFIG, TENSORS
from vtclip.runs.encoders import ENCODERS
from vtclip.runs.result import RESULT, Run
from vtclip.train.methods import takes_images

if TYPE_CHECKING:
    from vtclip.runs.request import FitRequest

logger = logging.getLogger(__name__)
CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"
RUN_FILES = {TENSORS, CONFIG, ENCODERS, RESULT, CHECKPOINT, LOG}


def run_folder(request: FitRequest, shots: int) -> Path:
    """The folder that the request names, else runs/SOURCE-METHOD-SHOTSshot-seedSEED."""
    if request.out is not None:
        return Path(request.out).expanduser()
    source = request.source
    name = source.resolve().name
    if isinstance(source, Path) and source.suffix == ".npz":
        name = source.resolve().stem
    kind = request.method
    if request.base_to_new or request.train_encoders:
        kind += "-base-to-new" if request.base_to_new else "-encoders"
    return Path("runs") / f"{name}-{kind}-{shots}shot-seed{request.seed}"


def check_run_folder(folder: Path, request: FitRequest) -> None:
    """Refuse an output that would touch the images, a file, or a run nobody asked to replace."""
    source, overwrite, resume = request.source, request.overwrite, request.resume
    images = source.root if isinstance(source, SetSource) else source
    if images.is_dir() and folder.resolve().is_relative_to(images.resolve()):
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
    asked = {"method": request.method, "shots": shots, "seed": request.seed, **config}
    have = {**run.result, **run.result["config"]}
    for name, value in json.loads(to_json(asked)).items():
        if have.get(name) != value and not (name == "shots" and not takes_images(have["method"])):
            raise ValueError(f"out {folder} holds a finished run with another {name}")
    logger.info("%s is finished, nothing to resume", folder)
    return run


def can_return_finished(folder: Path, request: FitRequest) -> bool:
    """Whether `resume` finds a finished run, which has a result and no checkpoint any more."""
    return request.resume and (folder / RESULT).is_file() and not (folder / CHECKPOINT).is_file()


@contextlib.contextmanager
def removed_if_empty(folder: Path) -> Iterator[None]:
    """Remove the folders made for a run again where the work fails before it wrote a file."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for place in made:
                place.rmdir()
        raise


class _LineLog:
    """Appends JSON lines; a full disk costs the log, not the run."""

    def __init__(self, path: Path, append: bool) -> None:
        self.path, self.broken = path, False
        if not append:
            path.unlink(missing_ok=True)

    def __call__(self, row: Json) -> None:
        if self.broken:
            return
        line = json.dumps(json.loads(to_json({**row, "time": time.time()}))) + "\n"
        try:
            with open(self.path, "a", encoding="ascii") as file:
                file.write(line)
        except OSError as error:
            self.broken = True
            logger.warning("cannot write %s (%s); the run goes on without it", self.path, error)


@contextlib.contextmanager
def line_log(path: Path, *, append: bool) -> Iterator[_LineLog]:
    yield _LineLog(path, append)
