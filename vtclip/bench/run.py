# SPDX-License-Identifier: Apache-2.0
"""One process's share of a benchmark: every job fitted once, its row on the disk before the next.

A kill loses at most the running job, and of that only what its own checkpoint does not hold. A job
that fails becomes a row that says so and is tried again by the next call; the others go on.
"""

from __future__ import annotations

import dataclasses
import errno
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vtclip.bench.csv_files import runs_csv, summary_csv, summary_of
from vtclip.bench.jobs import BenchJob, JobShard, Settings, Source, job_list, spatial_rows_only
from vtclip.bench.page import markdown_page
from vtclip.bench.report import make_report, read_benchmark
from vtclip.bench.rows import (
    PLACE,
    OtherContent,
    RowFile,
    check_bench_folder,
    claim_folder,
    is_finished,
    read_rows,
)
from vtclip.bench.sources import SourceOpener
from vtclip.distributed import Interrupted
from vtclip.environment import num_processes, process_number
from vtclip.files import locked, printable, settle, several, write_together
from vtclip.heads import HEADS
from vtclip.machine import choose_device, reset_peak_memory, set_threads
from vtclip.runs.fit import fit
from vtclip.runs.folder import CHECKPOINT
from vtclip.runs.result import RESULT

logger = logging.getLogger(__name__)

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


@dataclass
class BenchOutcome:
    """What one process did: jobs by outcome, those of other shards that are left, the summary."""

    out: Path
    jobs: int = 0
    resumed: int = 0
    finished: int = 0
    skipped: int = 0
    failed: list[str] = field(default_factory=list)
    left: int = 0
    seconds: float = 0.0
    summary: dict[str, Any] = field(default_factory=dict)

    def line(self) -> str:
        parts = [f"{self.finished} finished"]
        parts += [f"{self.resumed} of them before"] if self.resumed else []
        parts += [f"{self.skipped} skipped"] if self.skipped else []
        parts += [f"{len(self.failed)} failed"] if self.failed else []
        parts += [f"{self.left} left to other shards"] if self.left else []
        return f"{several(self.jobs, 'job')} in {self.seconds:.1f} s: {', '.join(parts)}"

    def as_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "out": str(self.out)}


def run_bench(
    sources: Sequence[Source],
    out: str | Path,
    *,
    methods: Sequence[str] | None = None,
    shots: Sequence[int] = (1, 2, 4, 8, 16),
    seeds: Sequence[int] = (1, 2, 3),
    settings: Settings | None = None,
    shard: JobShard | None = None,
    device: str | torch.device | None = None,
    threads: int | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = False,
) -> BenchOutcome:
    """Fit and evaluate every method on every source, draw by draw; rows and tables lie in `out`.

    sources: from `jobs.path_sources` or `jobs.set_sources`, with the same settings.
    methods: None takes those that apply to each source.
    shard: the part of the list that this process does; all of it by default.
    Jobs that have a row in `out` are not done again. Raises ValueError or FileExistsError before
    anything is written where `out` is something else or has other settings; OSError where a row
    cannot be written (then the rows so far remain).
    """
    started, settings, shard = time.perf_counter(), settings or Settings(), shard or JobShard()
    where, out = _process_device(device), Path(out).expanduser()
    set_threads(threads)
    jobs = job_list(sources, methods, shots, seeds, settings)
    check_bench_folder(out, [source.folder for source in sources])
    shared = settings.as_json()
    claim_folder(out, shared, _facts(sources, jobs))
    opener = SourceOpener(
        settings,
        spatial={
            job.source.name
            for job in jobs
            if job.spatial or (HEADS[job.method].needs_spatial and job.skip is None)
        },
        device=where,
        cache_dir=cache_dir,
        progress=progress,
        note=lambda name, facts: claim_folder(out, shared, {name: facts}),
    )
    shard_jobs = shard.of(jobs)
    report = BenchOutcome(out, jobs=len(shard_jobs))
    rows = RowFile(out / shard.file)
    try:
        known = {row["key"]: row for row in read_rows(out)}
        todo = [
            job for job in shard_jobs if job.key not in known or not is_finished(known[job.key])
        ]
        report.finished = report.resumed = len(shard_jobs) - len(todo)
        bar = tqdm(
            total=len(shard_jobs),
            initial=report.resumed,
            desc="jobs",
            disable=None if progress else True,
        )
        with bar:
            for job in todo:
                _run_job(job, opener, rows, report, known.get(job.key, {}))
                bar.update()
    finally:
        rows.close()
    report.seconds = time.perf_counter() - started
    with locked(out):
        rows_now = read_rows(out)
        done = {row["key"] for row in rows_now}
        report.left = sum(job.key not in done for job in jobs)
        report.summary = write_tables(out)
    return report


def write_tables(out: Path) -> dict[str, Any]:
    """table.md, table.csv and results.csv from the rows in `out`; returns the cells.

    They hold what `vtclip report` shows of the same rows.
    """
    rows, notes = read_benchmark(out, strict=False)
    report = make_report(rows, notes)
    summary = summary_of(report)
    files = {
        "table.md": markdown_page(report, "Few-shot results", None),
        "table.csv": summary_csv(summary),
        "results.csv": runs_csv([*report.rows, *report.missed]),
    }
    write_together(
        {out / name: text.encode("utf-8", "backslashreplace") for name, text in files.items()}
    )
    return summary


def _process_device(named: str | torch.device | None) -> torch.device:
    """The named device; without a name each process that torchrun started takes its own GPU."""
    count = torch.cuda.device_count()
    if named is None and count > 1 and num_processes() > 1:
        named = f"cuda:{process_number('LOCAL_RANK', 0) % count}"
    return choose_device(named)


def _facts(sources: Iterable[Source], jobs: Sequence[BenchJob]) -> dict[str, dict[str, Any]]:
    """What must stay the same of every source for its rows to compare."""
    return {
        source.name: {
            "kind": source.kind,
            "content": source.identity,
            "spatial_rows_only": spatial_rows_only(source, jobs),
        }
        for source in sources
    }


def _run_job(
    job: BenchJob, opener: SourceOpener, rows: RowFile, report: BenchOutcome, old: Mapping[str, Any]
) -> None:
    """Run one job and append its row; only what concerns all jobs is raised."""
    head = {"key": job.key, **dict(zip(PLACE, job.place(), strict=True))}
    try:
        reason = job.skip or opener.why_not(job)
        if reason is not None:
            report.skipped += 1
            logger.info("%s: skipped, %s", printable(job.name), printable(reason))
            if old.get("skipped") != reason:
                rows.append({**head, "skipped": reason})
            return
        result = _fit(job, opener, rows.path.parent / "runs" / job.name)
    except (Interrupted, OtherContent):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise
        fault = _one_line(error)
        report.failed.append(f"{job.name}: {fault}")
        logger.error("%s: failed, %s", printable(job.name), printable(fault))
        logger.debug("%s", printable(job.name), exc_info=True)
        rows.append({**head, "failed": fault})
        return
    rows.append({**result, **head, "run": f"runs/{job.name}"})
    report.finished += 1
    logger.info("%s: accuracy %.2f %%", printable(job.name), 100 * result["accuracy"])


def _fit(job: BenchJob, opener: SourceOpener, folder: Path) -> dict[str, Any]:
    """The result of the job's run, which goes on where an earlier process stopped."""
    records, settings = opener.records(job), opener.settings
    reset_peak_memory(opener.device)
    options = dataclasses.asdict(settings) | {"spatial": job.spatial, "records": records}
    options |= {"method": job.method, "shots": job.shots, "seed": job.seed, "out": folder}
    options |= {"device": opener.device, "cache_dir": opener.cache_dir}
    # the numbers are compared with published ones, which are of equal shots and train on no other
    options |= {"exact_shots": True, "refit": False}
    settle(folder)
    started = (folder / CHECKPOINT).is_file() or (folder / RESULT).is_file()
    try:
        return fit(job.source.where, resume=True, **options).result
    except ValueError as error:
        if not started:
            raise
        again = printable(job.name), printable(str(error))
        logger.info("%s: started again from the beginning, %s", *again)
    return fit(job.source.where, overwrite=True, **options).result


def _one_line(error: Exception) -> str:
    """The message of a user's error; of any other with its type."""
    text = " ".join(str(error).split()) or "no message"
    known = (ValueError, OSError, NotImplementedError, FloatingPointError)
    return text if isinstance(error, known) else f"{type(error).__name__}: {text}"
