# SPDX-License-Identifier: Apache-2.0
"""A run's folder: its name, what may be replaced in it, its log, and the finished run in it."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vtclip.methods import takes_images

from .adapter import CONFIG, TENSORS
from .data.sets import SetSource
from .encoders import ENCODERS
from .files import to_json
from .result import RESULT, Run

logger = logging.getLogger(__name__)
CHECKPOINT, LOG = "checkpoint.safetensors", "log.jsonl"
RUN_FILES = {TENSORS, CONFIG, ENCODERS, RESULT, CHECKPOINT, LOG}


def run_folder(
    out: str | Path | None, source: Path | SetSource, method: str, shots: int, seed: int
) -> Path:
    if out is not None:
        return Path(out).expanduser()
    name = source.resolve().name
    if isinstance(source, Path) and source.suffix == ".npz":
        name = source.resolve().stem
    return Path("runs") / f"{name}-{method}-{shots}shot-seed{seed}"


def check_out(folder: Path, source: Path | SetSource, *, overwrite: bool, resume: bool) -> None:
    """Refuse an output that would touch the images, a file, or a run nobody asked to replace."""
    if overwrite and resume:
        raise ValueError("overwrite and resume exclude each other")
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
        raise FileExistsError(f"out {folder} holds a run already; say overwrite or resume")
    if overwrite:
        (folder / CHECKPOINT).unlink(missing_ok=True)


def finished_run(folder: Path, named: dict[str, Any], options: dict[str, Any]) -> Run:
    """The run that lies in `folder`, if it is the one asked for."""
    run = Run.load(folder)
    wanted = json.loads(to_json({**named, **options}))
    have = {**run.result, **run.result["config"]}
    for name, value in wanted.items():
        if have.get(name) != value and not (name == "shots" and not takes_images(have["method"])):
            raise ValueError(f"out {folder} holds a finished run with another {name}")
    logger.info("%s is finished, nothing to resume", folder)
    return run


@contextlib.contextmanager
def removed_if_empty(folder: Path) -> Iterator[None]:
    """Leave no empty run folder, nor a folder made for it, where the work fails before a file."""
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

    def __call__(self, row: dict[str, Any]) -> None:
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
