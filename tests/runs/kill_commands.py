# SPDX-License-Identifier: Apache-2.0
"""Kill writing commands and look at what is left: `python tests/runs/kill_commands.py fit 500`.

The commands are fit (with overwrite; "train" is one that goes on after a kill), extend, export and
bench, on a table of 4 classes, and features, on pictures. Each is
killed so many times after random delays, and, with `--points N`, at N of the calls of the system
that change files, in the middle of a write. After each kill the files are read, the command is
given again, and they are read again. The counts are printed as JSON: "kills", by what was found
after them ("old", "new", "none"), and "faults", which must be empty: what was lost, mixed or
blocked.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import numpy as np
import torch
from pictures import dots
from tables import animal_features

import vtclip
from vtclip.bench.jobs import Settings, path_sources
from vtclip.bench.rows import is_finished, read_rows
from vtclip.bench.run import run_bench
from vtclip.data import shards
from vtclip.data.extract import write_features
from vtclip.data.featureset import FeatureSet
from vtclip.runs import export as exports
from vtclip.runs.adapter import load_adapter
from vtclip.runs.export import export, load_exported
from vtclip.runs.folder import CHECKPOINT, LOG
from vtclip.runs.result import Run
from vtclip.runs.seen import Seen
from vtclip.writing import FRESH, JOURNAL

CHANGES = ("open", "write", "fsync", "replace", "unlink", "rmdir", "mkdir", "ftruncate")
EXPORTS = ("m.pt2", "m.json")


class Fit:
    """A run of 1 shot that is replaced by one of 4."""

    def __init__(self, place: Path) -> None:
        self.place, self.old, self.target = place, place / "old", place / "run"
        self.fit(self.old, 1)
        self.whole = {1: self.read(self.old), 4: self.read(self.fit(place / "new", 4).folder)}

    def fit(self, out: Path, shots: int) -> Run:
        return vtclip.fit(
            self.place / "animals.npz", method="proker", shots=shots, out=out, overwrite=True,
            device="cpu",
        )  # fmt: skip

    def begin(self) -> None:
        shutil.rmtree(self.target, ignore_errors=True)
        shutil.copytree(self.old, self.target)

    def command(self) -> None:
        self.fit(self.target, 4)

    def read(self, folder: Path) -> Any:
        """What the run says; an AssertionError where its files are of different runs."""
        run = Run.load(folder)
        load_adapter(folder, result=run.result)
        kept = run.result["predictions"]
        table = hashlib.sha256((folder / kept["file"]).read_bytes()).hexdigest()
        assert table == kept["sha256"], "mixed: predictions"
        if "seen" in run.result:
            Seen.read(folder, run.result["seen"])
        names = sorted(path.name for path in folder.iterdir())
        return names, run.accuracy, run.result["digests"]

    def found(self) -> str:
        shots = Run.load(self.target).result["shots"]
        read = self.read(self.target)
        names = [name for name in read[0] if not FRESH.fullmatch(name)]
        assert (names, *read[1:]) == self.whole[shots], f"mixed: {names}"
        return {1: "old", 4: "new"}[shots]

    def again(self) -> None:
        self.command()
        assert self.found() == "new", "lost: the command was given again"
        assert self.read(self.target) == self.whole[4], "left over"


class Extend(Fit):
    """A run of four classes that is extended by two."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        table = animal_features()
        more = {
            "image": -table["image"][:48], "spatial": table["spatial"][:48],
            "label": table["label"][:48], "text": -table["text"][:2],
            "classname": np.array(["eel", "fox"]), "temperature": table["temperature"],
        }  # fmt: skip
        np.savez(place / "more.npz", **more)
        self.whole = {"new": self.extended(place / "extended")}

    def extended(self, out: Path) -> Any:
        vtclip.extend(self.old, self.place / "more.npz", out=out, device="cpu")
        return self.read(out)

    def read(self, folder: Path) -> Any:
        run = Run.load(folder)
        load_adapter(folder, result=run.result)
        names = sorted(path.name for path in folder.iterdir())
        return names, run.accuracy, run.result["digests"]

    def begin(self) -> None:
        shutil.rmtree(self.target, ignore_errors=True)

    def command(self) -> None:
        self.extended(self.target)

    def found(self) -> str:
        try:
            Run.load(self.target)
        except FileNotFoundError:
            return "none"
        assert self.read(self.target) == self.whole["new"], "mixed"
        return "new"

    def again(self) -> None:
        if self.found() == "none":
            self.command()
        assert self.found() == "new"


class Export:
    """A file and its description that are replaced by those of another run."""

    def __init__(self, place: Path) -> None:
        fits = Fit(place)
        self.runs = {"old": fits.old, "new": place / "new"}
        self.target, self.before = place / "files", place / "files before"
        self.before.mkdir()
        self.written: dict[str, bytes] = {}
        trace, as_pt2, self.running = exports.traced, exports._as_pt2, ""

        def traced_once(*args: Any) -> Any:
            return None if self.running in self.written else trace(*args)

        def as_pt2_once(program: Any) -> bytes:
            if self.running not in self.written:
                self.written[self.running] = as_pt2(program)
            return self.written[self.running]

        exports.traced, exports._as_pt2 = traced_once, as_pt2_once  # which take seconds
        exports._parity = lambda *_: {}  # type: ignore[assignment]
        for name in ("new", "old"):
            self.export(name, self.before)

    def export(self, name: str, folder: Path) -> None:
        self.running = name
        export(self.runs[name], folder / EXPORTS[0], kind="features", overwrite=True)

    def begin(self) -> None:
        shutil.rmtree(self.target, ignore_errors=True)
        shutil.copytree(self.before, self.target)

    def command(self) -> None:
        self.export("new", self.target)

    def found(self) -> str:
        load_exported(self.target / EXPORTS[0])
        files = {name: (self.target / name).read_bytes() for name in EXPORTS}
        about = json.loads(files["m.json"])
        assert about["files"] == {"m.pt2": hashlib.sha256(files["m.pt2"]).hexdigest()}, "mixed"
        (name,) = (name for name, data in self.written.items() if data == files["m.pt2"])
        assert about["digests"]["adapter"] == Run.load(self.runs[name]).result["digests"]["adapter"]
        return name

    def again(self) -> None:
        self.command()
        assert self.found() == "new"
        assert not (self.target / JOURNAL).exists()


class Bench:
    """Three jobs, begun anew each time."""

    def __init__(self, place: Path) -> None:
        np.savez(place / "animals.npz", **animal_features())
        self.place, self.target = place, place / "bench"
        self.settings = Settings()
        self.whole: Any = None
        self.command()
        self.whole = self.rows()

    def begin(self) -> None:
        shutil.rmtree(self.target, ignore_errors=True)

    def command(self) -> None:
        run_bench(
            path_sources([self.place / "animals.npz"], self.settings), self.target,
            methods=["zeroshot", "proker", "tip-adapter"], shots=[2], seeds=[1], device="cpu",
            settings=self.settings,
        )  # fmt: skip

    def rows(self) -> dict[str, Any]:
        return {
            row["key"]: (row["accuracy"], row["digests"])
            for row in read_rows(self.target)
            if is_finished(row)
        }

    def found(self) -> str:
        rows = self.rows() if self.target.is_dir() else {}
        if self.whole is not None:
            assert all(self.whole[key] == row for key, row in rows.items()), "mixed"
        return "new" if rows == self.whole else f"{len(rows)} rows"

    def again(self) -> None:
        before = self.rows() if self.target.is_dir() else {}
        self.command()
        assert self.found() == "new", "lost"
        keys = [row["key"] for row in map(json.loads, self.lines())]
        assert len(keys) == len(set(keys)) == len(self.whole), "a row twice"
        assert before.items() <= self.whole.items()

    def lines(self) -> list[str]:
        return (self.target / "results.jsonl").read_text().splitlines()


class Train:
    """A training with a checkpoint at each epoch, which the same command takes up."""

    def __init__(self, place: Path) -> None:
        self.place, self.target = place, place / "run"
        self.whole: Any = None
        self.command()
        self.whole = self.read()

    def begin(self) -> None:
        shutil.rmtree(self.target, ignore_errors=True)

    def command(self) -> None:
        vtclip.fit(
            self.place / "animals.npz", method="vtclip", shots=4, overrides={"epochs": 6},
            out=self.target, resume=True, device="cpu",
        )  # fmt: skip

    def read(self) -> Any:
        run = Run.load(self.target)
        load_adapter(self.target, result=run.result)
        names = sorted(path.name for path in self.target.iterdir() if path.name != LOG)
        return names, run.accuracy, run.result["digests"]

    def found(self) -> str:
        if (self.target / "result.json").exists():
            assert self.read() == self.whole, "mixed"
            return "new"
        return "a checkpoint" if (self.target / CHECKPOINT).exists() else "none"

    def again(self) -> None:
        self.command()
        assert self.read() == self.whole, "another run than the one that nobody killed"
        rows = [json.loads(line) for line in (self.target / LOG).read_text().splitlines()]
        epochs = [row["epoch"] for row in rows if "epoch" in row]
        assert epochs == sorted(set(epochs)), "an epoch twice in the log"


class Features:
    """Features of a folder of pictures in six shards."""

    def __init__(self, place: Path) -> None:
        self.pictures = dots(place / "pictures")
        self.target = place / "features"
        shards.SHARD_ROWS = 4  # images, which are written as one
        self.command()
        self.whole = self.files()

    def begin(self) -> None:
        shutil.rmtree(self.target, ignore_errors=True)

    def command(self) -> None:
        write_features(self.pictures, self.target, batch_size=4, device="cpu", threads=1)

    def files(self) -> dict[str, str]:
        return {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in self.target.iterdir()
        }

    def found(self) -> str:
        if not (self.target / "manifest.json").exists():
            return "a part" if self.target.exists() else "none"
        FeatureSet.open(self.target).verify()
        assert self.whole.items() <= self.files().items(), "mixed"
        return "new"

    def again(self) -> None:
        self.command()
        assert self.found() == "new", "lost"
        assert self.files() == self.whole, f"left over: {sorted({*self.files()} - {*self.whole})}"


COMMANDS: dict[str, type[Any]] = {
    "fit": Fit, "train": Train, "extend": Extend, "export": Export, "bench": Bench,
    "features": Features,
}  # fmt: skip


def forked(work: Callable[[], None]) -> int:
    """The id of a child that works."""
    child = os.fork()
    if child:
        return child
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        work()
        os._exit(0)
    except BaseException:
        os._exit(1)


def counting(work: Callable[[], None], kill_at: int) -> None:
    """Work, and end before the numbered change of a file; a write ends in its middle."""
    done = 0
    for name in CHANGES:
        real = getattr(os, name)

        def call(*args: Any, _name: str = name, _real: Any = real, **options: Any) -> Any:
            nonlocal done
            made = _name != "open" or args[1] & (os.O_WRONLY | os.O_RDWR)
            done += bool(made)
            if made and done == kill_at:
                if _name == "write":
                    _real(args[0], bytes(args[1])[: len(args[1]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return _real(*args, **options)

        setattr(os, name, call)
    work()
    if kill_at < 0:
        Path(os.environ["VTCLIP_KILL_COUNT"]).write_text(str(done))


def one_kill(scene: Any, child: Callable[[], int], delay_s: float | None) -> str:
    """What a kill left, "missed" where the command was faster, or how it is wrong."""
    scene.begin()
    number = child()
    if delay_s is not None:
        time.sleep(delay_s)
        os.kill(number, signal.SIGKILL)
    status = os.waitpid(number, 0)[1]
    killed = os.WIFSIGNALED(status)
    if not killed and os.WEXITSTATUS(status):
        return "fault: the command failed"
    step = "read"
    try:
        found: str = scene.found()
        step = "again"
        scene.again()
    except Exception as error:
        return f"fault: {step}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return found if killed else "missed"


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("kills", type=int, help="after random delays")
    parser.add_argument("--points", type=int, default=0, help="at calls of the system")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(words)
    torch.set_num_threads(1)
    draw = random.Random(args.seed)
    found: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        np.savez(place / "animals.npz", **animal_features())
        scene = COMMANDS[args.command](place)
        os.environ["VTCLIP_KILL_COUNT"] = str(place / "count")
        scene.begin()
        start = time.perf_counter()
        os.waitpid(forked(lambda: counting(scene.command, -1)), 0)
        usual_s = time.perf_counter() - start
        points = int((place / "count").read_text())
        for _ in range(args.kills):
            delay = draw.random() * usual_s
            found[one_kill(scene, lambda: forked(scene.command), delay)] += 1
        for number in range(min(args.points, points)):
            at = 1 + number * points // min(args.points, points)
            what = one_kill(scene, lambda at=at: forked(lambda: counting(scene.command, at)), None)
            found[what if not what.startswith("fault") else f"{what} (point {at})"] += 1
    faults = {what: n for what, n in found.items() if what.startswith("fault")}
    kept = {what: n for what, n in found.items() if what not in faults}
    kills = sum(found.values()) - kept.pop("missed", 0)
    report = {"command": args.command, "kills": kills, "points": points, "found": kept}
    report |= {"faults": faults, "seconds": round(usual_s, 2)}
    sys.stdout.write(json.dumps(report) + "\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
