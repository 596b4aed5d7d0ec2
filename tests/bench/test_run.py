# SPDX-License-Identifier: Apache-2.0
"""Rows of a benchmark: equal to single fits, written once, whatever stops or repeats the work."""

from __future__ import annotations

import json
import resource
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import python
from sealing import resealed

import vtclip
from vtclip.bench.jobs import JobShard, Settings, job_list, path_sources, set_sources
from vtclip.bench.rows import OtherContent, RowFile, is_finished, read_rows
from vtclip.bench.run import BenchOutcome, run_bench
from vtclip.data.options import Draw, FeatureOptions
from vtclip.data.sets import SETS, open_listing
from vtclip.distributed import Interrupted

FIXED = {"methods": ["zeroshot"], "shots": [1, 2], "seeds": [1, 2], "device": "cpu"}
PLACE = ("source", "method", "shots", "seed")


def bench(out: Path, *paths: Path, **options: Any) -> BenchOutcome:
    settings = options.pop("settings", Settings())
    return run_bench(path_sources(paths, settings), out, settings=settings, **{**FIXED, **options})


def places(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [tuple(row[name] for name in PLACE) for row in rows]


def lines_of(out: Path) -> list[dict[str, Any]]:
    """Every line of every file of rows, as it lies there."""
    files = sorted(out.glob("results*.jsonl"))
    return [json.loads(line) for path in files for line in path.read_text().splitlines()]


def failing_at(number: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let fit number `number` raise; returns the folders of the calls."""
    calls: list[str] = []
    fit = vtclip.fit

    def instead(*args: Any, **options: Any) -> Any:
        calls.append(options["out"].name)
        if len(calls) == number:
            raise error
        return fit(*args, **options)

    monkeypatch.setattr("vtclip.bench.run.fit", instead)
    return calls


def test_a_row_is_the_result_of_the_fit_alone(animals, tmp_path):
    bench(tmp_path / "out", animals, methods=["rada"], shots=[2], seeds=[3])
    (row,) = read_rows(tmp_path / "out")
    options = {"method": "rada", "shots": 2, "seed": 3, "exact_shots": True, "device": "cpu"}
    alone = vtclip.fit(animals, out=tmp_path / "one", **options)
    assert row["digests"] == alone.result["digests"]  # of the adapter's weights too
    for name in ("adapted", "zero_shot", "config", "accuracy", "split"):
        assert row[name] == alone.result[name]
    assert places([row]) == [("animals", "rada", 2, 3)]
    kept = tmp_path / "out" / row["run"]
    assert vtclip.Run.load(kept).accuracy == row["accuracy"]
    assert vtclip.evaluate(kept, device="cpu")["accuracy"] == row["accuracy"]


def test_rows_given_to_fit_are_the_ones_it_takes(animals, tmp_path):
    records = vtclip.open_source(animals)
    given = vtclip.fit("name", records=records, method="zeroshot", shots=2, out=tmp_path / "a")
    read = vtclip.fit(animals, method="zeroshot", shots=2, out=tmp_path / "b")
    assert given.result["digests"] == read.result["digests"]
    assert given.result["source"] == "name"
    with pytest.raises(ValueError, match="method vtclip needs spatial features"):
        vtclip.fit("name", records=records, method="vtclip", shots=2, out=tmp_path / "c")


def test_a_finished_list_is_not_done_again(animals, tmp_path, monkeypatch):
    first = bench(tmp_path / "out", animals)
    assert (first.jobs, first.finished, first.resumed) == (4, 4, 0)
    before = (tmp_path / "out" / "results.jsonl").read_bytes()
    calls = failing_at(0, AssertionError(), monkeypatch)
    again = bench(tmp_path / "out", animals)
    assert calls == []
    assert (again.jobs, again.finished, again.resumed) == (4, 4, 4)
    assert again.summary == first.summary
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == before


def test_a_longer_list_does_what_is_new(animals, tmp_path, monkeypatch):
    bench(tmp_path / "out", animals)
    calls = failing_at(0, AssertionError(), monkeypatch)
    report = bench(tmp_path / "out", animals, seeds=[3, 1, 2], shots=[2])
    assert calls == ["animals-zeroshot-2shot-seed3"]
    assert (report.jobs, report.finished) == (3, 3)
    assert len(lines_of(tmp_path / "out")) == 5


@pytest.mark.parametrize(
    "stop", [KeyboardInterrupt(), SystemExit(143), Interrupted(signal.SIGTERM, 3, None)]
)
def test_a_stop_loses_the_running_job_only(animals, tmp_path, monkeypatch, stop):
    with monkeypatch.context() as patch:
        failing_at(3, stop, patch)
        with pytest.raises(type(stop)):
            bench(tmp_path / "out", animals)
    assert len(lines_of(tmp_path / "out")) == 2
    calls = failing_at(0, AssertionError(), monkeypatch)
    bench(tmp_path / "out", animals)
    assert len(calls) == 2
    assert len(set(places(lines_of(tmp_path / "out")))) == len(lines_of(tmp_path / "out")) == 4


def test_a_line_cut_off_anywhere_is_written_again(animals, tmp_path):
    bench(tmp_path / "out", animals)
    path = tmp_path / "out" / "results.jsonl"
    whole, rows = path.read_bytes(), places(read_rows(tmp_path / "out"))
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for end in (last + 1, last + 40, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert places(read_rows(tmp_path / "out")) == rows[:-1]
        bench(tmp_path / "out", animals)
        assert places(lines_of(tmp_path / "out")) == rows


def test_a_run_that_was_finished_but_not_noted_is_not_fitted_again(animals, tmp_path):
    bench(tmp_path / "out", animals)
    path = tmp_path / "out" / "results.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    results = tmp_path / "out" / "runs" / json.loads(lines[-1])["run"].split("/")[1]
    stamp = (results / "result.json").stat().st_mtime_ns
    bench(tmp_path / "out", animals)
    assert (results / "result.json").stat().st_mtime_ns == stamp
    old, new = json.loads(lines[-1]), lines_of(tmp_path / "out")[-1]
    assert {**new, "time": 0, "digest": ""} == {**old, "time": 0, "digest": ""}


def test_a_folder_of_an_older_recipe_is_begun_anew(animals, tmp_path):
    """The job's key says that its row is not there; the run of another recipe is no such row."""
    bench(tmp_path / "out", animals)
    folder = tmp_path / "out" / "runs" / "animals-zeroshot-1shot-seed1"

    def older(result: dict[str, Any]) -> None:
        result["config"]["fit"]["lr"] = 123.0
        result["accuracy"] = 0.125

    resealed(folder / "result.json", older)
    (tmp_path / "out" / "results.jsonl").unlink()
    bench(tmp_path / "out", animals)
    assert 0.125 not in [row["accuracy"] for row in read_rows(tmp_path / "out")]


def test_a_failing_job_is_a_row_and_the_others_go_on(animals, tmp_path, monkeypatch, caplog):
    with monkeypatch.context() as patch:
        failing_at(2, RuntimeError("out of\nmemory"), patch)
        report = bench(tmp_path / "out", animals)
    assert report.failed == ["animals-zeroshot-1shot-seed2: RuntimeError: out of memory"]
    assert (report.finished, report.jobs) == (3, 4)
    assert "failed, RuntimeError: out of memory" in caplog.text
    (failed,) = [row for row in read_rows(tmp_path / "out") if not is_finished(row)]
    assert failed["failed"] == "RuntimeError: out of memory"
    assert "| animals | zeroshot | 1 | 2 |    1 | failed: RuntimeError: out of memory |" in (
        tmp_path / "out" / "table.md"
    ).read_text("utf-8")
    again = bench(tmp_path / "out", animals)  # tried again
    assert (again.finished, again.resumed, again.failed) == (4, 3, [])
    assert all(is_finished(row) for row in read_rows(tmp_path / "out"))
    assert len(read_rows(tmp_path / "out")) == 4


def test_what_cannot_be_done_is_skipped_with_its_reason(animals, tmp_path):
    report = bench(tmp_path / "out", animals, methods=["zeroshot", "vtclip"], shots=[1, 9])
    assert (report.finished, report.skipped, report.failed) == (2, 6, [])
    reasons = {row.get("skipped") for row in read_rows(tmp_path / "out")} - {None}
    assert reasons == {
        "vtclip needs spatial features, and animals has none",
        "9 shots: class ant has 6 images beside the test share",
    }
    before = (tmp_path / "out" / "results.jsonl").read_bytes()
    bench(tmp_path / "out", animals, methods=["zeroshot", "vtclip"], shots=[1, 9])
    assert (tmp_path / "out" / "results.jsonl").read_bytes() == before


def test_a_source_is_opened_once(animals, insects, tmp_path, monkeypatch):
    from vtclip.bench import sources

    opened: list[tuple[str, bool]] = []
    open_records = sources.open_records

    def instead(path: Path, options: FeatureOptions, draw: Draw) -> Any:
        opened.append((path.name, options.need_spatial))
        return open_records(path, options, draw)

    monkeypatch.setattr(sources, "open_records", instead)
    bench(tmp_path / "out", animals, insects, methods=["zeroshot", "vtclip"], shots=[1], seeds=[1])
    assert opened == [("animals.npz", False), ("insects.npz", True)]


def test_methods_share_rows_and_only_some_get_spatial_features(insects, tmp_path, monkeypatch):
    seen: dict[str, bool] = {}
    fit = vtclip.fit

    def instead(*args: Any, **options: Any) -> Any:
        seen[options["method"]] = options["records"].has_spatial
        return fit(*args, **options)

    monkeypatch.setattr("vtclip.bench.run.fit", instead)
    bench(tmp_path / "out", insects, methods=["zeroshot", "vtclip"], shots=[1], seeds=[1])
    assert seen == {"zeroshot": False, "vtclip": True}
    splits = {row["split"] for row in read_rows(tmp_path / "out")}
    assert len(splits) == 1
    for row in read_rows(tmp_path / "out"):  # and a run can be evaluated on its own
        found = vtclip.evaluate(tmp_path / "out" / row["run"], device="cpu")
        assert found["accuracy"] == row["accuracy"]


def test_without_spatial_keeps_all_but_the_spatial_features(insects):
    whole = vtclip.open_source(insects, need_spatial=True)
    view = whole.without_spatial()
    index = torch.arange(len(whole))
    assert whole.has_spatial
    assert not view.has_spatial
    assert torch.equal(view.batch(index).image, whole.batch(index).image)
    assert view.batch(index).spatial is None
    assert view.names == whole.names
    assert view.without_spatial() is view


def test_a_data_set_is_read_once_for_all_draws(tmp_path, trees, monkeypatch):
    from vtclip.data.sets import features

    root = trees.make_set(tmp_path / "root", "eurosat")
    before = trees.fingerprint(root)
    counts: Counter[str] = Counter()
    reading, cached = features.open_listing, None
    monkeypatch.setattr(features, "open_listing", lambda *a: counts.update(lists=1) or reading(*a))
    from vtclip.data import extract

    cached = extract.cached_features

    def instead(folder: Any, options: FeatureOptions) -> Any:
        counts.update([len(folder.names)])
        return cached(folder, options)

    monkeypatch.setattr(extract, "cached_features", instead)
    sources = set_sources(root, None, Settings())
    options = {**FIXED, "shots": [1, 2, 7], "cache_dir": tmp_path / "cache"}
    report = run_bench(sources, tmp_path / "out", **options)
    assert (report.finished, report.skipped, report.failed) == (4, 2, [])
    assert counts[12] == 3  # 2 x (3 training and 3 validation) below; 12 test images are read once
    assert counts["lists"] <= 1
    (reason,) = {row.get("skipped") for row in read_rows(tmp_path / "out")} - {None}
    assert reason == "7 shots: class Annual Crop Land has 6 training images"
    folders = {"data": root, "out": tmp_path / "one", "cache_dir": tmp_path / "cache"}
    alone = vtclip.fit("eurosat", method="zeroshot", shots=2, seed=1, device="cpu", **folders)
    (row,) = [r for r in read_rows(tmp_path / "out") if (r["shots"], r["seed"]) == (2, 1)]
    assert is_finished(row)
    assert row["digests"] == alone.result["digests"]
    assert trees.fingerprint(root) == before


def test_other_settings_or_contents_are_refused_and_nothing_is_written(animals, insects, tmp_path):
    out = tmp_path / "out"
    bench(out, insects, shots=[1], seeds=[1])
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(
        OtherContent, match=r"holds results with test_fraction 0\.5, now it is 0\.4"
    ):
        bench(out, insects, settings=Settings(test_fraction=0.4))
    other = tmp_path / "insects.npz"
    other.write_bytes(animals.read_bytes())
    with pytest.raises(OtherContent, match=r"another insects \(its content differs\)"):
        bench(out, other)
    with pytest.raises(OtherContent, match="insects over all its rows, now it is the other way"):
        bench(out, insects, methods=["vtclip"])
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_images_that_changed_under_their_names_stop_the_benchmark(tmp_path, trees):
    root = trees.make_set(tmp_path / "root", "eurosat")
    options = {**FIXED, "shots": [1], "seeds": [1], "cache_dir": tmp_path / "cache"}
    run_bench(set_sources(root, None, Settings()), tmp_path / "out", **options)
    listing = open_listing(SETS["eurosat"], root)
    first, second = (listing.image_root / name for name in listing.test.names[:2])
    first.write_bytes(second.read_bytes() + b"\0")
    with pytest.raises(OtherContent, match=r"another eurosat \(its images differs\)"):
        run_bench(
            set_sources(root, None, Settings()), tmp_path / "out", **{**options, "seeds": [2]}
        )


def test_folders_that_are_no_benchmark_are_refused(animals, tmp_path, trees):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for name, message in (
        ("full", r"not a benchmark \(it holds 'thesis.tex'\)"),
        ("file", "folder"),
    ):
        with pytest.raises(FileExistsError, match=message):
            bench(tmp_path / name, animals)
    root = trees.make_set(tmp_path / "root", "eurosat")
    with pytest.raises(ValueError, match="lies inside the source"):
        run_bench(set_sources(root, None, Settings()), root / "dtd" / "out", **FIXED)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "full", "root"]
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]


def test_rows_have_one_writer(tmp_path):
    first = RowFile(tmp_path / "results.jsonl")
    with pytest.raises(FileExistsError, match="is being written by another benchmark"):
        RowFile(tmp_path / "results.jsonl")
    first.append({"key": "a"})
    first.close()
    second = RowFile(tmp_path / "results.jsonl")
    second.append({"key": "b", "value": float("nan")})
    second.close()
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [row["key"] for row in rows] == ["a", "b"]
    assert rows[1]["value"] is None
    assert rows[0]["time"] < rows[1]["time"]


def test_a_full_disk_leaves_whole_rows(animals, tmp_path):
    bench(tmp_path / "out", animals, shots=[1], seeds=[1])
    path = tmp_path / "out" / "results.jsonl"
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, limits[1]))
    try:
        rows = RowFile(path)
        with pytest.raises(OSError, match="cannot write .* bytes to"):
            rows.append({"key": "x" * 200})
        rows.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before


def test_a_full_disk_stops_the_benchmark(animals, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        failing_at(2, OSError(28, "No space left on device"), patch)
        with pytest.raises(OSError, match="No space left"):
            bench(tmp_path / "out", animals)
    assert len(lines_of(tmp_path / "out")) == 1
    assert bench(tmp_path / "out", animals).finished == 4


def test_later_rows_count_but_never_a_failure_over_a_result(tmp_path):
    def line(seed: int, key: str, time: float, **rest: Any) -> str:
        place = {"source": "a", "method": "m", "shots": 1, "seed": seed}
        return json.dumps({**place, "key": key, "time": time, **rest}) + "\n"

    one = line(1, "k", 1, accuracy=0.5) + line(1, "k", 2, failed="x") + line(2, "k2", 3, failed="y")
    two = line(2, "k2", 4, accuracy=0.7) + line(3, "old", 5, accuracy=0.1)
    two += line(3, "new", 6, failed="z") + '{"key": 1}\nno row\n[1]\n' + line(4, "c", 7)[:-1]
    (tmp_path / "results-1-of-2.jsonl").write_text(one)
    (tmp_path / "results-2-of-2.jsonl").write_text(two)
    found = {row["seed"]: row.get("accuracy", row.get("failed")) for row in read_rows(tmp_path)}
    assert found == {1: 0.5, 2: 0.7, 3: "z"}


TWO_PROCESSES = """
import os, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from vtclip.bench.jobs import Settings, JobShard, path_sources
from vtclip.bench.run import run_bench
import torch._dynamo  # once, before the processes part

out, source = Path(sys.argv[1]), sys.argv[2]

def start(index):
    child = os.fork()
    if child == 0:
        run_bench(path_sources([source], Settings()), out, methods=["zeroshot"], shots=[1, 2],
                  seeds=range(10), shard=JobShard(index, 2), device="cpu")
        os._exit(0)
    return child

def ended(child):
    return os.waitpid(child, 0)[1]

one, two = start(1), start(2)
path, deadline = out / "results-1-of-2.jsonl", time.monotonic() + 60
while not (path.exists() and path.read_bytes().count(b"\\n") >= 3):
    assert time.monotonic() < deadline
    time.sleep(0.002)
os.kill(one, signal.SIGKILL)
assert ended(one) == signal.SIGKILL
(out / "survived").write_bytes(path.read_bytes())
with open(path, "ab") as file:  # as if the kill had met the middle of a write
    file.write(b'{"key": "torn", "sour')
assert ended(start(1)) == 0
assert ended(two) == 0
"""


def test_two_processes_and_a_kill_lose_and_repeat_nothing(animals, tmp_path):
    """JobShard 1 is killed with SIGKILL while both run, then called again."""
    out = tmp_path / "out"
    done = python("-c", TWO_PROCESSES, out, animals)
    assert done.returncode == 0, done.stderr
    sources = path_sources([animals], Settings())
    jobs = job_list(sources, ["zeroshot"], [1, 2], range(10), Settings())
    rows = lines_of(out)
    assert Counter(row["key"] for row in rows) == Counter(job.key for job in jobs)
    assert Counter(places(rows)) == Counter(job.place() for job in jobs)
    survived = (out / "survived").read_bytes()
    survived = survived[: survived.rfind(b"\n") + 1]
    assert survived.count(b"\n") >= 3
    assert (out / "results-1-of-2.jsonl").read_bytes().startswith(survived)
    for index in (1, 2):
        mine = {job.key for job in JobShard(index, 2).of(jobs)}
        text = (out / f"results-{index}-of-2.jsonl").read_text()
        assert {json.loads(line)["key"] for line in text.splitlines()} == mine
    whole = bench(out, animals, shots=[1, 2], seeds=list(range(10)))
    assert (whole.resumed, whole.left) == (20, 0)
    assert whole.summary["cells"][0]["seeds"] == list(range(10))


def test_what_other_shards_have_left_is_told(animals, tmp_path):
    first = bench(tmp_path / "out", animals, shard=JobShard(1, 2))
    assert (first.jobs, first.finished, first.left) == (2, 2, 2)
    second = bench(tmp_path / "out", animals, shard=JobShard(2, 2))
    assert (second.finished, second.left) == (2, 0)
    assert first.line().endswith("2 finished, 2 left to other shards")
