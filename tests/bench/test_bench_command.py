# SPDX-License-Identifier: Apache-2.0
"""`vtclip bench` at the command line: what it prints, its exit status, and bad input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import call, json_of, refused


def bench(*words: str | Path) -> int:
    """The exit status."""
    return call("bench", *words)


@pytest.fixture
def quick(animals: Path, tmp_path: Path) -> list[str]:
    """A list of two jobs."""
    words = [animals, "--methods", "zeroshot", "--shots", 1, "--seeds", "1,2", "--out"]
    return [*map(str, words), str(tmp_path / "out"), "--device", "cpu"]


def test_prints_the_table_and_where_it_lies(quick, tmp_path, capsys):
    assert bench(*quick) == 0
    text = capsys.readouterr()
    out = tmp_path / "out"
    first, _, rest = text.out.partition("\n")
    assert first.startswith("2 jobs in ")
    assert rest.startswith((out / "table.md").read_text("utf-8"))
    assert text.out.splitlines()[-1] == (
        f"{out}: table.md, table.csv, results.csv, results.jsonl and runs"
    )
    assert text.err == ""  # no bar where there is no terminal
    assert bench(*quick, "--resume") == 0
    assert "2 finished, 2 of them before" in capsys.readouterr().out


def test_json_holds_the_cells(quick, capsys):
    found = json_of(capsys, "bench", *quick)
    assert (found["jobs"], found["finished"], found["failed"], found["left"]) == (2, 2, [], 0)
    (cell,) = found["summary"]["cells"]
    assert (cell["source"], cell["method"], cell["shots"]) == ("animals", "zeroshot", 1)
    assert cell["seeds"] == [1, 2]


def test_a_failure_is_one_line_and_exit_1(quick, capsys, caplog, monkeypatch):
    def instead(*_: Any, **__: Any) -> Any:
        raise FloatingPointError("fit: loss is not finite")

    monkeypatch.setattr("vtclip.bench.run.fit", instead)
    assert bench(*quick) == 1
    assert "2 failed" in capsys.readouterr().out
    assert [record.message for record in caplog.records] == [
        f"animals-zeroshot-1shot-seed{seed}: failed, fit: loss is not finite" for seed in (1, 2)
    ]


def test_a_full_disk_is_one_line_and_exit_1(quick, capsys, monkeypatch):
    def instead(*_: Any, **__: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("vtclip.bench.run.fit", instead)
    assert bench(*quick) == 1
    assert capsys.readouterr().err == "vtclip bench: No space left on device\n"


def test_torchrun_gives_each_process_its_share(quick, tmp_path, capsys, monkeypatch):
    for name, value in ("WORLD_SIZE", "2"), ("MASTER_ADDR", "localhost"), ("MASTER_PORT", "29500"):
        monkeypatch.setenv(name, value)
    for rank in "01":
        monkeypatch.setenv("LOCAL_RANK", rank)
        monkeypatch.setenv("RANK", rank)
        assert bench(*quick) == 0
        text = capsys.readouterr().out
        assert ("\n# Few-shot results\n" in text) == (rank == "1")
    names = {path.name for path in (tmp_path / "out").glob("results*.jsonl")}
    assert names == {"results-1-of-2.jsonl", "results-2-of-2.jsonl"}


def test_all_names_every_method(animals, tmp_path, capsys):
    words = ["--methods", "all", "--shots", "9", "--seeds", "1", "--out", tmp_path / "out"]
    assert bench(animals, *words) == 0
    out = capsys.readouterr().out
    assert "| vtclip " in out
    assert "9 shots: class ant has 6 images beside the test share" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--methods", "zerosho"], "unknown name 'zerosho'; did you mean 'zeroshot'?"),
        (["--methods", "zeroshot,zeroshot"], "values must differ"),
        (["--methods", "all,zeroshot"], "--methods all stands alone"),
        (["--shots", "0"], "must be in 1..1e+06, got 0"),
        (["--shots", "1,1"], "values must differ, got '1,1'"),
        (["--shots", "1,,2"], "'' is not an integer"),
        (["--seeds", "2,3,2"], "values must differ, got '2,3,2'"),
        (["--seeds", "1.5"], "'1.5' is not an integer"),
        (["--shard", "0/4"], "--shard must be i/n with i in 1..n, got 0/4"),
        (["--shard", "five"], "--shard must be i/n with i in 1..n, got 'five'"),
        (["--sets", "dtd"], "--sets needs --data ROOT"),
        (["--data", "nowhere"], "SOURCE * and --data exclude each other"),
        (["nowhere.npz"], "SOURCE 'nowhere.npz' does not exist"),
        (["--thread", "1"], "unknown argument '--thread'; did you mean '--threads'?"),
        (["--templates", "photo7"], "takes no --templates"),
        (["--device", "tpu"], "--device must be cpu, cuda or cuda:N"),
    ],
)
def test_bad_input_is_one_line_exit_2_and_writes_nothing(quick, tmp_path, capsys, words, message):
    kept = quick
    if words[0].startswith("--") and words[0] in quick:
        place = quick.index(words[0])
        kept = quick[:place] + quick[place + 2 :]
    line = refused(capsys, "bench", *kept, *words)
    assert all(part in line for part in message.split("*", 1))
    assert not (tmp_path / "out").exists()


def test_bad_roots_sets_and_outs(tmp_path, capsys, trees, animals):
    root = trees.make_set(tmp_path / "root", "eurosat")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.tex").touch()
    out = ["--out", tmp_path / "out"]
    for words, message in (
        ([animals, "nowhere.npz", *out], "SOURCE 'nowhere.npz' does not exist"),
        ([*out], "SOURCE or --data ROOT must be given"),
        (["--data", tmp_path / "no", *out], "--data "),
        (["--data", root, "--sets", "eurosatt", *out], "did you mean 'eurosat'"),
        (["--data", root, "--sets", "dtd", *out], "dtd: the folder"),
        (["--data", root, "--out", root / "eurosat" / "out"], "lies inside the source"),
        ([animals, "--out", tmp_path / "thesis"], "is not a benchmark (it holds 'a.tex')"),
        ([animals, "--out", animals], "exists and is not a folder"),
        ([animals], "--out"),
    ):
        assert bench(*words) == 2
        err = capsys.readouterr().err
        assert message in err
        assert [line for line in err.splitlines() if not line.startswith("note: ")] == [
            err.splitlines()[-1]
        ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["root", "thesis"]
