# SPDX-License-Identifier: Apache-2.0
"""Bad values of every command: one line that names what was typed, and nothing written."""

from __future__ import annotations

import ast
import errno
import os
import re
from pathlib import Path

import pytest
from commands import refused
from trees import picture

import vtclip
from vtclip import files
from vtclip.cli import COMMANDS, build_parser
from vtclip.cli.errors import line_of
from vtclip.environment import VARIABLES

ROOT = Path(__file__).parents[2]
TABLE = """
fit npz --device gpu
    --device must be cpu, cuda or cuda:N
fit npz --method zeroshot --epochs 3
    so --epochs cannot be set
fit npz --method rada --context-length 4
    method rada has no option --context-length
fit npz --method vtclip --context-init a
    method vtclip has no option --context-init
fit npz --method vtclip --penalty-weight 1
    so --penalty-weight cannot be set
fit npz --lr 0.1 --queries text
    to set --lr, --queries, name one by --method
fit npz --method rada --loss gce --label-smoothing 0.1
    --label-smoothing must be 0 with --loss gce
fit npz --method zeroshot --pseudo-labels
    --pseudo-labels cannot be set
fit npz --method zeroshot --final
    --final changes nothing
fit npz --method tip-adapter --pseudo-labels --shots 0
    --shots must be at least 1 with --pseudo-labels
fit npz --method vtclip --pseudo-labels --base-to-new
    --pseudo-labels cannot be combined with --base-to-new
fit npz --method proker --templates imagenet7
    --templates cannot be chosen for an .npz file; use --prompt
fit npz --method proker --templates gone.txt
    --templates
fit npz --method proker --augment-passes 2
    --augment-passes: an .npz file holds no augmented passes
fit npz --method proker --prompt x
    --prompt 'x' cannot be chosen
fit npz --method proker --shots 0
    --shots must be at least 1
fit npz --method proker --base-to-new
    --base-to-new: --method must be one of
fit npz --method rada --train-encoders
    --train-encoders: SOURCE must be an image folder
fit npz --train-encoders --prompt x
    --train-encoders: --prompt must be left out
fit pics --method vtclip --train-encoders
    --train-encoders: --method must be rada
fit pics --train-encoders --optimizer sgd
    --optimizer: encoders are trained with adamw
fit pics --train-encoders --label-smoothing 0.1
    --label-smoothing cannot be combined with --train-encoders
fit pics --method proker --prompt x
    --prompt 'x' can be chosen for .npz files only
fit pics --model gone/weights.safetensors
    --model
fit pics --class-names gone.json
    --class-names gone.json does not exist
fit pics --out file
    --out file
fit npz --overwrite --resume
    --overwrite and --resume exclude each other
fit file
    SOURCE
fit npz --data gone
    --data 'gone' does not exist
fit caltech101 --data file
    --data
evaluate run npz --predictions gone/p.csv
    --predictions must be a file
evaluate run npz --predictions pics
    --predictions must be a file
evaluate run npz --predictions run/predictions.csv
    --predictions must not be a file of a run itself, got 'run/predictions.csv'
evaluate run npz --predictions pipe
    --predictions must be a file to write, got 'pipe', which is not a file
evaluate run npz --predictions file
    --predictions: 'file' exists and is not such a file
evaluate run npz --device gpu
    --device must be
evaluate run npz --ttt
    --ttt: SOURCE must be a folder of images
evaluate run file
    SOURCE
evaluate file
    RUN
evaluate pics
    RUN
predict run pics
    run was fitted on a table of features
predict run pics --unknown 0.00001
    --unknown
predict run pics --coverage 0.99999
    --coverage
explain run pics/ant/0.jpg --out x.gif
    --out must end in .png
explain run pics/ant/0.jpg --out run/confusion.png
    --out must not be a file of a run itself, got 'run/confusion.png'
explain run pics/ant/0.jpg --out drawn.png
    --out: 'drawn.png' exists and is not such a file
export run --features --overwrite --out run/result.pt2
    --out must not be a file of a run itself, got 'run/result.json'
selftest --json file
    --json: 'file' exists and is not such a file
features pics --out file
    --out file
features pics --out pics/f
    --out must lie outside the image folder
features pics --out f --spatial grid
    --spatial
features pics --out f --device gpu
    --device must be
features pics --out f --model gone/weights.safetensors
    --model
features pics --out f --templates gone.txt
    --templates
features file --out f
    SOURCE
extend run pics --out pics
    --out pics exists
extend run pics --out f --device gpu
    --device must be
extend pics pics --out f
    RUN
repeat run --model x
    --model must be left out
repeat pics
    RUN
repeat run --out run
    --out
report pics
    OUT
report file
    OUT
report run --html x.gif
    --html must end in .html
export run --out x.gif --features
    --out must end in .pt2
export run --onnx x.gif --features
    --onnx must end in .onnx
export run --out gone/x.pt2 --features
    --out: the folder gone does not exist
export run --out held.pt2 --features
    --out: held.pt2 exists; --overwrite
export pics --out x.pt2
    RUN
convert file --out x.gif
    --out
convert pics
    FILE
bench npz --out file
    --out file exists
bench pics --out pics/b
    --out pics/b lies inside
bench npz --out b --shard 3/2
    --shard must be i/n
bench npz --out b --device gpu
    --device must be
bench npz --out b --templates imagenet7
    takes no --templates
bench pics --out b --prompt x
    --prompt 'x' can be chosen
bench npz npz --out b
    SOURCE
bench --data pics --out b
    --data: no data set is complete
bench --data file --out b
    --data
bench --data pics --sets dtd,dtd --out b
    --sets
data check file
    ROOT
demo --device gpu
    --device must be
demo --out file
    --out
explain run pics/ant/0.jpg --class none
    unknown class 'none'
serve gone
    RUN 'gone' does not exist
tune --shape lp:B=1
    --shape must begin with vtclip: or rada:
selftest --device gpu
    --device must be
models vitb33
    PATTERN 'vitb33': no model has it in its name; did you mean
completion fish
    SHELL: unknown name 'fish'
selftest --json gone/x.json
    --json must be a file to write, got 'gone/x.json'
"""
LINES = [line.strip() for line in TABLE.strip().splitlines()]
CASES = list(zip(LINES[::2], LINES[1::2], strict=True))


@pytest.fixture(scope="module")
def place(npz: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with images, a file that is none of anything, a table of features and its run."""
    root = tmp_path_factory.mktemp("typed")
    for k, name in enumerate(("ant", "bee")):
        for number in range(8):
            picture(root / "pics" / name / f"{number}.jpg", number, k)
    (root / "file").write_text("hello")
    (root / "held.pt2").write_text("hello")
    os.mkfifo(root / "pipe")
    (root / "drawn.png").write_bytes(b"a picture of somebody")
    (root / "table.npz").write_bytes(npz.read_bytes())
    vtclip.fit(
        root / "table.npz", method="proker", shots=4, out=root / "run", device="cpu", threads=1
    )
    return root


def everything(root: Path) -> dict[str, int]:
    return {str(path): path.lstat().st_mtime_ns for path in root.rglob("*")}


@pytest.mark.parametrize(("words", "typed"), CASES, ids=[words for words, _ in CASES])
def test_what_was_typed_is_named_in_one_line(capsys, place, monkeypatch, words, typed):
    monkeypatch.chdir(place)
    monkeypatch.setenv("VTCLIP_CACHE", str(place / "cache"))
    before = everything(place)
    typed_words = ["table.npz" if word == "npz" else word for word in words.split()]
    line = refused(capsys, *typed_words)
    assert typed in line
    assert "Errno" not in line
    assert everything(place) == before


def test_every_command_that_takes_input_is_in_the_table():
    assert {words.split()[0] for words in LINES[::2]} == {name for name, _, _ in COMMANDS} - {
        "info"
    }


NEEDED = {"bench": ["x", "--out", "y"], "features": ["x", "--out", "y"], "predict": ["x", "y"]}
NEEDED |= {"explain": ["x", "y"], "extend": ["x", "y", "--out", "z"], "data": ["check", "x"]}
NEEDED["completion"] = ["bash"]
NEEDED |= dict.fromkeys(("info", "demo", "selftest", "tune", "models"), [])


@pytest.mark.parametrize("command", [name for name, _, _ in COMMANDS])
def test_every_option_with_a_kind_of_value_names_itself(capsys, command):
    """Whatever stands in place of the value."""
    words = NEEDED.get(command, ["x"])
    parser = build_parser().parse([command, *words]).parser
    for action in {id(action): action for action in parser.actions.values()}.values():
        names = action.option_strings
        # a list of any names is checked later, by the command itself
        if (
            action.type is None
            or not names
            or names[0] in ("--out", "--sets")
            or (command == "report" and names[0] == "--method")
        ):
            continue
        for bad in ("\x1b[2J\r\nforged", "\udcff", "1e999", "\u202e"):
            line = refused(capsys, command, *words, f"{names[0]}={bad}")
            assert line.startswith(f"vtclip {command}: ")
            assert line[:-1].isprintable()
            assert names[0] in line


@pytest.mark.parametrize(
    ("words", "error", "line"),
    [
        (
            ["fit", "pics", "--out", "r"],
            PermissionError(errno.EACCES, "Permission denied", "r/adapter.safetensors"),
            "--out: r/adapter.safetensors: Permission denied",
        ),
        (
            ["fit", "pics", "--out", "r"],
            OSError(errno.ENOSPC, "cannot write 9 bytes to r/a: No space left on device", "r/a"),
            "--out: cannot write 9 bytes to r/a: No space left on device",
        ),
        (
            ["fit", "pics", "--cache-dir", "c/d"],
            NotADirectoryError(errno.ENOTDIR, "Not a directory", "c"),
            "--cache-dir: c: Not a directory",
        ),
        (
            ["predict", "r", "a.jpg", "--json", "b.jpg"],
            IsADirectoryError(errno.EISDIR, "Is a directory", "b.jpg"),
            "IMAGE: b.jpg: Is a directory",
        ),
        (
            ["convert", "w.pt"],
            FileNotFoundError(errno.ENOENT, "No such file or directory", "w.pt"),
            "FILE: w.pt: No such file or directory",
        ),
        (
            ["info"],
            FileNotFoundError(errno.ENOENT, "No such file or directory", "elsewhere"),
            "elsewhere: No such file or directory",
        ),
    ],
)
def test_errors_of_the_system_name_argument_and_path(tmp_path, monkeypatch, words, error, line):
    monkeypatch.chdir(tmp_path)
    assert line_of(error, build_parser().parse(words)) == line


def test_a_full_disk_names_the_option(capsys, place, monkeypatch):
    monkeypatch.chdir(place)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    line = refused(capsys, "evaluate", "run", "--predictions", "p.csv", status=1)
    assert line.startswith("vtclip evaluate: --predictions: cannot write ")
    assert line.endswith(f"p.csv: {os.strerror(errno.ENOSPC)}\n")
    assert not (place / "p.csv").exists()


def raised() -> list[tuple[str, str]]:
    """(file:line, text) of every error that the package raises, what is put in as {}."""
    found = []
    for path in sorted((ROOT / "vtclip").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)):
                continue
            for text in node.exc.args[:1]:
                parts = getattr(text, "values", [text])
                if not isinstance(text, ast.Constant | ast.JoinedStr):
                    continue
                line = "".join(
                    str(part.value) if isinstance(part, ast.Constant) else "{}" for part in parts
                )
                found.append((f"{path.name}:{node.lineno}", line))
    return found


def test_every_text_of_an_error_is_one_line_that_begins_with_its_subject():
    texts = raised()
    assert len(texts) > 600
    names = {node for place in (ROOT / "vtclip" / "heads").glob("*.py")
             for node in re.findall(r"^class (\w+)", place.read_text(), flags=re.M)}  # fmt: skip
    names |= {
        "WordTokenizer",
        "SharedQueryAttention",
        "SOURCE",
        "OUT",
        "RUN",
        "IMAGE",
        "PATTERN",
        "ROOT",
    } | set(VARIABLES)
    for where, text in texts:
        first = re.split(r"[:=\s]", text)[0]
        assert "\n" not in text, where
        assert not text.endswith((".", "!")), where
        assert not first[:1].isupper() or first in names, (where, first)
