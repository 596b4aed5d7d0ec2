# SPDX-License-Identifier: Apache-2.0
"""The command line: what users type, right and wrong, and what they get back."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import call, environment, json_of, python, refused

import vtclip
from vtclip.cli import COMMANDS
from vtclip.data.records import Records
from vtclip.data.splits import few_shot_split
from vtclip.files import to_json
from vtclip.train import engine

ROOT = Path(vtclip.__file__).parents[1]
VT = ["--method", "vtclip"]
QUICK = [*VT, "--shots", "4", "--epochs", "3", "--threads", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs land in a folder of their own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def run(npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the table of features."""
    out = tmp_path_factory.mktemp("runs") / "animals"
    vtclip.fit(
        npz, method="vtclip", shots=4, overrides={"epochs": 3}, out=out, device="cpu", threads=1
    )
    return out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ftt"], "unknown command 'ftt'; did you mean 'fit'"),
        (["fit"], "required: SOURCE"),
        (["fit", "x", "--shot", "4"], "unknown argument '--shot'; did you mean '--shots'"),
        (["fit", "x", "--shots", "1.5"], "--shots: '1.5' is not an integer"),
        (["fit", "x", "--shots", "al"], "--shots: must be a number or all, got 'al'"),
        (["fit", "x", "--shots", "-1"], "--shots: must be in 0..1e+06, got -1"),
        (["fit", "x", "--shots", "2", "--shots", "3"], "--shots is given twice"),
        (["fit", "x", "--seed", "-1"], "--seed: must be in 0..4.29497e+09, got -1"),
        (["fit", "x", "--seed", str(2**64)], "--seed: must be in"),
        (["fit", "x", "--lr", "0"], "--lr: must be above 0"),
        (["fit", "x", "--lr", "nan"], "--lr: must be above 0"),
        (["fit", "x", "--lr", "1e30"], "--lr: must be above 0 and at most 1000"),
        (["fit", "x", "--epochs", "0"], "--epochs: must be in 1..1e+06"),
        (["fit", "x", "--batch-size", "0"], "--batch-size: must be in"),
        (["fit", "x", "--weight-decay", "-1"], "--weight-decay: must be in"),
        (["fit", "x", "--test-fraction", "1.5"], "--test-fraction: must be in 0..1"),
        (["fit", "x", "--optimizer", "adma"], "unknown name 'adma'; did you mean 'adamw'"),
        (["fit", "x", "--method", "vt-clip"], "unknown name 'vt-clip'; did you mean 'vtclip'"),
        (["fit", "x", "--temperature", "0"], "--temperature: must be above 0"),
        (["fit", "x", "--temperature", "-1"], "--temperature: must be above 0"),
        (["fit", "x", "--penalty", "l2"], "unknown name 'l2'; did you mean 'l1'"),
        (["fit", "x", "--penalty-weight", "-1"], "--penalty-weight: must be in 0..1e+06"),
        (["fit", "x", "--label-smoothing", "1"], "--label-smoothing: must be in 0..0.99"),
        (["fit", "x", "--queries", "image,txt"], "unknown name 'txt'; did you mean 'text'"),
        (["fit", "x", "--queries", "image,image"], "--queries: values must differ"),
        (["fit", "x", "--queries", ""], "unknown name ''"),
        (["fit", "no such place"], "SOURCE 'no such place' does not exist"),
        (["fit", "two\nlines"], r"SOURCE 'two\nlines' does not exist"),
        (["fit", "~/no such place"], "SOURCE '~/no such place' does not exist"),
        (["fit", "--", "-dash"], "SOURCE '-dash' does not exist"),
        (["evaluate", "nowhere"], "RUN 'nowhere' does not exist"),
        (["evaluate", "x", "--view", "3"], "unknown argument '--view'; did you mean '--views'"),
        (["export", "x", "--no-portabel"], "did you mean '--no-portable'"),
        (["features", "x", "--out", "y", "--hlp"], "did you mean '--help'"),
        (["--versoin"], "unknown argument '--versoin'; did you mean '--version'"),
        (["predict", "nowhere"], "required: IMAGE"),
        (["predict", "nowhere", "x.jpg", "--topk", "0"], "--topk: must be in"),
        (["explain", "nowhere", "x.jpg"], "RUN 'nowhere' does not exist"),
        (["explain", "x", "y", "--top", "0"], "--top: must be in"),
        (["info", "extra"], "unknown argument 'extra'"),
        (["selftest", "--impl", "cpu,trition"], "unknown name 'trition'; did you mean 'triton'"),
        (["selftest", "--device", "gpu"], "--device must be cpu, cuda or cuda:N, got 'gpu'"),
        (["selftest", "--json", "no/x.json"], "--json must be a file to write, got 'no/x.json'"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(capsys, words, message):
    line = refused(capsys, *words)
    assert message in line
    known = any(words[0] == name for name, _, _ in COMMANDS)
    assert line.startswith(f"vtclip {words[0]}: " if known else "vtclip: ")
    assert not list(Path.cwd().iterdir())


def test_bad_sources_and_values_are_named(capsys, npz, tmp_path):
    (tmp_path / "text.npz").write_text("hello")
    assert "not a readable .npz" in refused(capsys, "fit", "text.npz")
    for words, message in (
        ("--prompt x", "--prompt 'x' cannot be chosen"),
        ("--device gpu", "--device must be"),
        ("--device cuda:77", "--device cuda:77: this torch sees"),
        (
            "--test-fraction 1",
            "--shots 16: no training images besides the test share of 1 in class",
        ),
        (
            "--test-fraction 0",
            "--test-fraction 0 leaves no test images: name some as --test SOURCE",
        ),
        ("--shots 0", "--shots must be at least 1"),
        ("--method zeroshot --lr 0.1", "method zeroshot has no training, so --lr cannot be set"),
        ("--method vtclip --temperature 0.1", "method vtclip has no option --temperature"),
        ("--lr 0.1", "each with its own settings; to set --lr, name one by --method"),
    ):
        assert message in refused(capsys, "fit", npz, *words.split())
    message = refused(capsys, "fit", npz, *VT, "--penalty-weight", "1")
    assert "method vtclip has no penalty, so --penalty-weight cannot be set" in message
    message = refused(capsys, "fit", npz, "--method", "zeroshot", "--adapters")
    assert "method zeroshot has no training, so --adapters cannot be set" in message
    words = ["--method", "rada", "--penalty", "none", "--penalty-weight", "1"]
    message = refused(capsys, "fit", npz, *words)
    assert "--penalty-weight must be 0 where --penalty is none, got 1" in message
    assert "leaves no test images" in refused(capsys, "fit", npz, "--test-fraction", "0", *QUICK)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["text.npz"]


def test_fit_prints_a_table_and_writes_a_run(capsys, npz, tmp_path):
    assert call("fit", npz, *QUICK) == 0
    out = capsys.readouterr().out
    folder = tmp_path / "runs" / "animals-vtclip-4shot-seed1"
    files = ["adapter.safetensors", "adapter_config.json", "confusion.png", "images.csv"]
    files += ["log.jsonl", "predictions.csv", "result.json"]
    assert sorted(path.name for path in folder.iterdir()) == files
    assert "4 classes, 16 training, 16 validation and 48 test images, seed 1" in out
    first = out.splitlines()[0]
    sentence = (
        r"\d+\.\d % right on 48 images it did not train on \(95 % interval \d+\.\d-\d+\.\d %\); "
        r"without training \d+\.\d %"
    )
    assert re.fullmatch(sentence, first)
    assert re.search(r"^zero-shot +\d+\.\d\d %", out, re.M)
    assert re.search(r"^vtclip +\d+\.\d\d %", out, re.M)
    result = json.loads((folder / "result.json").read_text())
    keys = (
        "method source shots seed zero_shot adapted accuracy seconds peak_memory_mb device "
        "versions revision config digests"
    )
    assert set(keys.split()) <= set(result)
    for name in ("zero_shot", "adapted"):
        wanted = {"accuracy", "macro_f1", "nll", "ece", "interval95", "per_class"}
        assert wanted <= set(result[name])
        assert 0 <= result[name]["accuracy"] <= 1
        assert list(result[name]["per_class"]) == ["ant", "bee", "cat", "dog"]
    assert result["accuracy"] == result["adapted"]["accuracy"]
    assert (result["method"], result["shots"], result["seed"]) == ("vtclip", 4, 1)
    assert result["test"] == {"images": 48, "unreadable": []}
    assert len(result["digests"]["split"]) == 64
    assert len((folder / "log.jsonl").read_text().splitlines()) == 3


def test_a_run_is_not_overwritten_unasked(capsys, npz, tmp_path):
    assert call("fit", npz, "--out", "r", *QUICK) == 0
    first = (tmp_path / "r" / "adapter.safetensors").read_bytes()
    assert "holds a run already" in refused(capsys, "fit", npz, "--out", "r", *QUICK)
    both = ["--overwrite", "--resume"]
    assert "exclude each other" in refused(capsys, "fit", npz, "--out", "r", *both, *QUICK)
    assert call("fit", npz, "--out", "r", "--resume", *QUICK) == 0
    other = ["--seed", "2", "--resume"]
    assert "with another seed" in refused(capsys, "fit", npz, "--out", "r", *other, *QUICK)
    assert (tmp_path / "r" / "adapter.safetensors").read_bytes() == first
    assert call("fit", npz, "--out", "r", "--overwrite", "--seed", "2", *QUICK) == 0
    assert (tmp_path / "r" / "adapter.safetensors").read_bytes() != first
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    for word in ("--overwrite", "--resume"):
        message = refused(capsys, "fit", npz, "--out", "mine", word, *QUICK)
        assert "is not a run (it holds 'thesis.txt')" in message
    (tmp_path / "file").write_text("")
    assert "not a folder" in refused(capsys, "fit", npz, "--out", "file", *QUICK)
    (tmp_path / "photos" / "ant").mkdir(parents=True)
    inside = tmp_path / "photos" / "run"
    assert call("fit", tmp_path / "photos", "--out", inside) == 2
    assert "lies inside the source" in capsys.readouterr().err


def test_training_never_touches_a_test_row(npz, tmp_path, monkeypatch):
    """Every row asked of the real table, in order: none of the test's before its one evaluation."""
    asked: list[int] = []
    real, training = Records.batch, engine.train_head
    trained_with: list[int] = []

    def batch(self: Records, index: torch.Tensor, augment_pass: int = 0) -> Any:
        asked.extend(index.tolist())
        return real(self, index, augment_pass)

    def fit(head: Any, records: Any, *args: Any, **options: Any) -> None:
        assert type(records) is engine.TrainingRows
        training(head, records, *args, **options)
        trained_with.extend(asked)

    monkeypatch.setattr(Records, "batch", batch)
    monkeypatch.setattr(engine, "train_head", fit)
    run = vtclip.fit(
        npz, method="vtclip", shots=4, overrides={"epochs": 2}, out=tmp_path / "r", device="cpu"
    )
    split = few_shot_split(
        torch.arange(4).repeat_interleave(24), [str(row) for row in range(96)], shots=4, seed=1
    )
    assert split.digest == run.result["split"]
    pool, test = {*split.train.tolist(), *split.val.tolist()}, set(split.test.tolist())
    assert trained_with
    assert set(trained_with) == pool
    assert set(asked) - pool == test
    # once for zero-shot and once for the adapted head
    assert all(asked.count(row) == 2 for row in test)


def test_evaluate_repeats_the_numbers_of_the_run(capsys, run, npz):
    wanted = json.loads((run / "result.json").read_text())["adapted"]
    for words in (["evaluate", run], ["evaluate", run, npz]):
        values = json_of(capsys, *words, "--threads", "1")
        assert {name: values[name] for name in wanted} == wanted
        assert values["test"]["images"] == 48
    assert call("evaluate", run) == 0
    assert re.search(r"^vtclip +\d", capsys.readouterr().out, re.M)


def test_evaluate_on_other_features_matches_classes_by_name(capsys, run, npz, tmp_path):
    data = dict(np.load(npz))
    keep = np.isin(data["label"], [1, 3])
    two = {**data, "classname": np.array(["dog", "bee"]), "text": data["text"][[3, 1]]}
    two |= {name: data[name][keep] for name in ("image", "spatial")}
    two["label"] = np.where(data["label"][keep] == 3, 0, 1)
    np.savez(tmp_path / "two.npz", **two)
    values = json_of(capsys, "evaluate", run, tmp_path / "two.npz")
    assert values["test"]["images"] == 24  # rows of the run's own table: those that it tested
    assert values["left_out"]["trained"] == values["left_out"]["validated"] == 8
    assert values["per_class"]["ant"] is None
    assert values["per_class"]["dog"] is not None
    np.savez(tmp_path / "other.npz", **{**two, "classname": np.array(["dgo", "bee"])})
    values = json_of(capsys, "evaluate", run, tmp_path / "other.npz")
    assert values["test"]["images"] == 12
    assert values["left_out"]["classes"] == {"dgo": 24}
    np.savez(tmp_path / "none.npz", **{**two, "classname": np.array(["dgo", "bea"])})
    message = refused(capsys, "evaluate", run, tmp_path / "none.npz")
    assert "unknown class 'dgo'; did you mean 'dog'" in message


def test_images_for_a_run_on_features_are_refused_in_one_line(capsys, run, tmp_path):
    (tmp_path / "x.jpg").write_bytes(b"")
    message = refused(capsys, "predict", run, "x.jpg")
    assert "fitted on a table of features and has no image encoder" in message
    message = refused(capsys, "explain", run, "x.jpg", "--out", "heat.png")
    assert "has no image encoder" in message


def test_json_output_is_strict(capsys, npz):
    assert call("fit", npz, "--json", *QUICK) == 0
    result = json.loads(capsys.readouterr().out, parse_constant=lambda name: pytest.fail(name))
    assert result["classes"] == ["ant", "bee", "cat", "dog"]
    values = {"a": float("nan"), "b": [float("inf"), 1.5]}
    assert json.loads(to_json(values)) == {"a": None, "b": [None, 1.5]}


def test_a_damaged_run_is_one_line(capsys, npz, tmp_path):
    assert call("fit", npz, "--out", "r", *QUICK) == 0
    path = tmp_path / "r" / "adapter.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "not a vtclip adapter" in refused(capsys, "evaluate", "r")
    (tmp_path / "r" / "result.json").write_text("{")
    assert "not a vtclip run" in refused(capsys, "evaluate", "r")


def test_zeroshot_needs_no_shots(capsys, npz, tmp_path):
    words = ["--method", "zeroshot", "--test-fraction", "1", "--out", "z"]
    assert call("fit", npz, *words) == 0
    result = json.loads((tmp_path / "z" / "result.json").read_text())
    assert result["test"]["images"] == 96
    assert result["adapted"] == result["zero_shot"]
    assert result["adapted"]["temperature"] is None
    assert call("evaluate", "z", "--json") == 0


def test_the_package_does_not_import_its_command_line():
    importing = re.compile(r"^\s*(from|import)\s.*\bcli\b", re.M)
    package = ROOT / "vtclip"
    users = {path for path in package.rglob("*.py") if importing.search(path.read_text())}
    assert users - set((package / "cli").iterdir()) == {package / "__main__.py"}


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["fit", "--help"]])
def test_help_is_quick_and_needs_no_torch(words):
    started = time.perf_counter()
    done = python("-X", "importtime", "-m", "vtclip", *words)
    seconds = time.perf_counter() - started
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & {"torch", "numpy", "open_clip", "triton", "PIL"}
    assert seconds < 2


def test_no_command_shows_the_help(capsys):
    assert call() == 2
    assert "COMMAND" in capsys.readouterr().out


def test_a_closed_pipe_is_quiet_and_the_run_is_complete(npz, tmp_path):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "vtclip", "fit", str(npz), "--out", "r", "--json", *QUICK]
    pipes = {"stdout": write, "stderr": subprocess.PIPE}
    done = subprocess.run(command, **pipes, env=environment(), timeout=300)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads((tmp_path / "r" / "result.json").read_text())["accuracy"] > 0


def test_plain_locale_and_optimised_python_behave_the_same(npz, tmp_path):
    data = dict(np.load(npz))
    data["classname"] = np.array(["ant", "b\u00e9e", "\u732b", "dog"])
    np.savez(tmp_path / "names.npz", **data)
    env = environment(LANG="C", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    outs = []
    for options in ([], ["-O", "-W", "error"]):
        words = ["fit", "names.npz", "--overwrite", "--out", "r", "--json", *QUICK]
        done = python(*options, "-m", "vtclip", *words, env=env)
        assert done.returncode == 0, done.stderr
        assert done.stderr == ""
        outs.append(json.loads(done.stdout))
    done = python("-O", "-m", "vtclip", "fit", "names.npz", "--shots", "0", env=env)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert outs[0]["adapted"] == outs[1]["adapted"]
    assert outs[0]["digests"] == outs[1]["digests"]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_resuming_gives_the_same_adapter(npz, tmp_path, signum):
    words = ["fit", str(npz), *VT, "--shots", "4", "--epochs", "100", "--threads", "1"]
    command = [sys.executable, "-m", "vtclip", *words, "--out", "r"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    running = subprocess.Popen(command, **pipes, env=environment())
    log = tmp_path / "r" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") >= 3):
        assert running.poll() is None, running.stderr
        assert time.monotonic() < deadline
        time.sleep(0.005)
    running.send_signal(signum)
    _, err = running.communicate(timeout=120)
    assert running.returncode == 128 + signum
    assert err.decode().count("\n") == 1
    assert f"stopped by {signum.name} after step" in err.decode()
    assert "go on with --resume" in err.decode()
    assert not (tmp_path / "r" / "result.json").exists()
    assert call(*words, "--out", "r", "--resume") == 0
    assert call(*words, "--out", "whole") == 0
    for name in ("adapter.safetensors", "adapter_config.json"):
        assert (tmp_path / "r" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    rows = [[json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
            for name in ("r", "whole")]  # fmt: skip
    assert [row["loss"] for row in rows[0]] == [row["loss"] for row in rows[1]]
