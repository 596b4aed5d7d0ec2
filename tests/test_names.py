# SPDX-License-Identifier: Apache-2.0
"""Every list of names that users type is the one of `vtclip.names`, in its order."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vtclip import names, ops
from vtclip.bench.cells import in_order
from vtclip.cli import main
from vtclip.heads import HEADS
from vtclip.heads.config import FitConfig
from vtclip.train.finetune_config import FinetuneConfig
from vtclip.tune import jobs

BAR = "\\|"  # in a table
METHODS_PAGE = (Path(__file__).parents[1] / "docs" / "methods.md").read_text(encoding="utf-8")


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a refused command writes."""
    with pytest.raises(SystemExit):
        main(list(words))
    return capsys.readouterr().err


def test_nothing_of_the_package_and_no_torch_is_imported():
    code = "import sys, vtclip.names as n; print(*{m for m in sys.modules if 'vtclip.' in m})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["vtclip.names"]


def test_every_method_has_a_head():
    assert sorted(names.METHODS) == sorted(HEADS)
    assert len(set(names.METHODS)) == len(names.METHODS)
    assert set(jobs.SHAPES) == set(names.TUNED_METHODS) <= set(names.METHODS)


def test_tables_list_methods_in_their_order():
    lines = [*reversed(names.METHODS), "unheard of"]
    assert in_order(lines) == [*names.METHODS, "unheard of"]


def test_the_page_of_methods_lists_methods_and_options_in_their_order():
    table = re.search(r"\| `--method` \|.*?\n\n", METHODS_PAGE, re.DOTALL)
    assert table
    first_cells = [line.split("|")[1] for line in table[0].splitlines()[2:] if line]
    assert [name for cell in first_cells for name in re.findall("`([^`]+)`", cell)] == [
        name for name in names.METHODS if name != "auto"
    ]
    assert "`auto`" in METHODS_PAGE
    assert f"`--penalty {BAR.join(names.PENALTIES)}`" in METHODS_PAGE
    assert f"`--queries {','.join(names.QUERIES)}`" in METHODS_PAGE


def test_help_lists_names_in_their_order(capsys: pytest.CaptureFixture[str]):
    shown = {}
    for command in ("fit", "bench"):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        shown[command] = re.sub(r"\s", "", capsys.readouterr().out)
    lists = (names.METHODS, names.OPTIMIZERS, names.LOSSES, names.PENALTIES, names.PRECISIONS)
    for listed in (*lists, names.POSITIONS):
        assert "|".join(listed) in shown["fit"]
    assert ",".join(names.QUERIES) in shown["fit"]
    assert ",".join(names.METHODS) in shown["bench"]
    assert ",".join(map(str, names.SHOTS)) in shown["bench"]


@pytest.mark.parametrize(
    ("option", "listed"),
    [
        ("--method", names.METHODS),
        ("--penalty", names.PENALTIES),
        ("--queries", names.QUERIES),
        ("--optimizer", names.OPTIMIZERS),
        ("--loss", names.LOSSES),
        ("--precision", names.PRECISIONS),
        ("--class-position", names.POSITIONS),
    ],
)
def test_the_parser_takes_each_name_and_no_other(capsys, option, listed):
    for name in listed:
        assert "'nowhere' does not exist" in refused(capsys, "fit", "nowhere", option, name)
    error = refused(capsys, "fit", "nowhere", option, "zzz")
    assert error.rstrip().endswith(f"choices: {', '.join(listed[:8])}{', ...' * (len(listed) > 8)}")


def test_settings_take_each_name_and_no_other():
    for name in names.OPTIMIZERS:
        FitConfig(epochs=1, optimizer=name)
    for name in names.LOSSES:
        FitConfig(epochs=1, loss=name)
    for field in ("optimizer", "loss"):
        with pytest.raises(ValueError, match=f"{field} must be "):
            FitConfig(epochs=1, **{field: "zzz"})
    fields = {"epochs": 1, "lr": 1.0, "head_lr": 1.0, "weight_decay": 0.0, "batch_size": 1}
    for name in names.PRECISIONS:
        FinetuneConfig("flyp", **fields, warmup_steps=0, precision=name)
    with pytest.raises(ValueError, match="precision must be "):
        FinetuneConfig("flyp", **fields, warmup_steps=0, precision="zzz")


def test_rada_and_its_operator_take_each_penalty_and_query():
    takes = inspect.signature(HEADS["rada"]).parameters
    assert tuple(takes["queries"].default) == names.QUERIES
    assert takes["penalty"].default in names.PENALTIES
    assert inspect.signature(HEADS["coop"]).parameters["class_position"].default in names.POSITIONS
    text = torch.eye(4)
    tensors = torch.ones(1, 4, 4), torch.eye(4), torch.zeros(4), torch.ones(1, 4), text
    for penalty in names.PENALTIES:
        assert ops.rational_head(*tensors, penalty=penalty).penalty.shape == (1,)
        assert HEADS["rada"](text, penalty=penalty, num_heads=2).penalty == penalty
    for query in names.QUERIES:
        assert HEADS["rada"](text, queries=[query], num_heads=2).queries == (query,)


def test_an_unknown_name_is_told_the_nearest_or_the_first_few():
    assert names.nearest("vt-clip", names.METHODS) == "; did you mean 'vtclip'?"
    assert names.nearest("zzz", names.METHODS).endswith(
        "clip-adapter, coop, tip-adapter, tip-adapter-f, ..."
    )
    with pytest.raises(ValueError, match="unknown class 'dgo'; did you mean 'dog'?"):
        names.index_of("dgo", ["cat", "dog"])
    assert names.index_of("dog", ["cat", "dog"]) == 1


def test_names_are_known_in_another_case_but_not_twice():
    known = ["red cat", "dog", "caf\u00e9"]
    found = names.as_known(["Red_Cat", "DOG", "cafe\u0301", "eel", "dog"], known)
    assert found == {"Red_Cat": "red cat", "cafe\u0301": "caf\u00e9"}
