# SPDX-License-Identifier: Apache-2.0
"""`vtclip fit --help` alone and of one method; `--set NAME=VALUE`."""

from __future__ import annotations

import json

import pytest
from commands import call, python, refused

from vtclip import register_method
from vtclip.cli.method_help import FROM_THE_FIT, meanings_of, method_in, settable, setting
from vtclip.heads import HEADS, Head
from vtclip.names import METHODS


def help_of(capsys, *words):
    capsys.readouterr()
    assert call("fit", *words) == 0
    return capsys.readouterr().out


def test_the_help_is_grouped_and_says_how_to_see_more(capsys):
    text = help_of(capsys, "--help")
    titles = ("images:", "model and features:", "training", "options of one method", "the run:")
    places = [text.index(f"\n{title}") for title in titles]
    assert places == sorted(places)
    assert text.endswith("\nvtclip fit --method NAME --help lists the options of one method\n")
    assert "rada: attention maps" in text
    assert "coop: learned vectors" in text


@pytest.mark.parametrize("method", METHODS)
def test_the_help_of_a_method_has_each_of_its_options(capsys, method):
    text = help_of(capsys, "--method", method, "--help")
    shown = text[text.index(f"\nmethod {method}: ") :]
    if method != "auto":
        assert all(f"\n  {name}=" in shown for name in settable(HEADS[method]))
    assert all(f"\n  {name}=" not in shown for name in FROM_THE_FIT)
    assert ("rada: " in text) == (method == "rada")
    assert ("coop: " in text) == (method == "coop")
    assert "--shots" in text
    assert ("its recipe for 16 images per class:" in shown) == bool(HEADS[method].recipe(16).epochs)


def test_meanings_and_defaults_are_shown_wherever_the_method_stands(capsys):
    for words in (["--help", "--method", "vtclip"], ["--method=vtclip", "--help"]):
        text = help_of(capsys, *words)
        assert '\n  init="zero"\n      "zero" starts at the zero-shot logits' in text
        assert "\n  num_heads=8\n" in text
        assert "optimizer adamw" in text


def test_a_registered_method_is_shown(capsys):
    class Warm(Head):
        """Logits times a number.

        warmth: what they are multiplied by.
        """

        method = "warm-for-help"

        def __init__(self, text, *, warmth: float = 2.0, logit_scale: float = 100.0):
            super().__init__(text, logit_scale=logit_scale)
            self.warmth = warmth

        def forward(self, image, spatial=None, spatial_mask=None):
            return self.warmth * self.logit_scale * image @ self.text.T

    register_method("warm-for-help", Warm)
    try:
        text = help_of(capsys, "--method", "warm-for-help", "--help")
    finally:
        HEADS.remove("warm-for-help")
    assert "\nmethod warm-for-help: Logits times a number.\n" in text
    assert "\n  warmth=2.0\n      what they are multiplied by.\n" in text


def test_an_unknown_method_is_named_in_the_help(capsys):
    unknown = "--method: unknown name 'tip-adaptr'; did you mean 'tip-adapter'?"
    assert unknown in help_of(capsys, "--help", "--method", "tip-adaptr")
    assert unknown in refused(capsys, "fit", "--method", "tip-adaptr", "--help")


def test_torch_is_imported_for_the_help_of_a_method_alone():
    code = "import sys, vtclip.cli\ntry: vtclip.cli.main(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += "print('torch' in sys.modules)"
    for words, imported in ((["--help"], "False"), (["--method", "gda", "--help"], "True")):
        done = python("-c", code, "fit", *words)
        assert done.stdout.splitlines()[-1] == imported


def test_words_and_settings_are_read():
    assert method_in(["x", "--method", "gda"]) == "gda"
    assert method_in(["--method=gda", "--help"]) == "gda"
    assert method_in(["x", "--method"]) is None
    assert method_in(["x"]) is None
    assert setting("a=1") == ("a", 1)
    assert setting("a=text=1") == ("a", "text=1")
    words = "Title.\n\na, b: one\n    two\nc: three\n\nNo: names"
    assert meanings_of(words) == {"a": "one two", "b": "one two", "c": "three"}


QUICK = ["--shots", "2", "--device", "cpu", "--threads", "1"]


def test_set_reaches_the_head(npz, tmp_path):
    words = ["--method", "tip-adapter", "--set", "votes_per_class=3", *QUICK]
    assert call("fit", npz, "--out", tmp_path / "r", *words) == 0
    config = json.loads((tmp_path / "r" / "adapter_config.json").read_text())
    assert config["options"]["votes_per_class"] == 3


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "beta"], "--set: must be NAME=VALUE, got 'beta'"),
        (["--set", "beta=1"], "--set needs one method; name it by --method"),
        (["--method", "tip-adapter", "--set", "bta=1"], "no option 'bta'; did you mean 'beta'?"),
        (["--method", "tip-adapter", "--set", "num_support=1"], "no option 'num_support'"),
        (
            ["--method", "tip-adapter", "--set", "beta=-1"],
            "beta must be finite and above 0",
        ),
        (["--method", "tip-adapter", "--set", "beta=1", "--set", "beta=2"], "beta is given twice"),
        (["--method", "rada", "--temperature", "2", "--set", "temperature=2"], "is given twice"),
    ],
)
def test_what_set_refuses_is_one_line_before_any_work(npz, tmp_path, capsys, words, message):
    assert message in refused(capsys, "fit", npz, "--out", tmp_path / "r", *words)
    assert not (tmp_path / "r").exists()
