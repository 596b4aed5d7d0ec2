# SPDX-License-Identifier: Apache-2.0
"""The order in which a command's words may stand."""

from __future__ import annotations

from typing import Any

import pytest

from vtclip.cli import build_parser


def parsed(*words: str) -> dict[str, Any]:
    return vars(build_parser().parse(list(words)))


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("evaluate r --device cpu s", {"folder": "r", "source": "s", "device": "cpu"}),
        ("evaluate r --json s", {"folder": "r", "source": "s", "json": True}),
        ("evaluate r --device=cpu s", {"folder": "r", "source": "s", "device": "cpu"}),
        ("evaluate --ttt r --views 3 s --json", {"folder": "r", "source": "s", "views": 3}),
        ("evaluate --device cpu r", {"folder": "r", "source": None}),
        ("evaluate --device cpu -- r -s", {"folder": "r", "source": "-s"}),
        ("evaluate r --json -- -s", {"folder": "r", "source": "-s", "json": True}),
        ("bench --out o a --seeds 1 b", {"sources": ["a", "b"], "out": "o", "seeds": [1]}),
        ("bench a --out o b", {"sources": ["a", "b"], "out": "o"}),
        ("data check --json root dtd", {"action": "check", "root": "root", "names": ["dtd"]}),
        ("data check root --json dtd", {"root": "root", "names": ["dtd"]}),
        ("predict r a.jpg --topk 2 b.jpg", {"folder": "r", "images": ["a.jpg", "b.jpg"]}),
        ("predict --topk 2 r a.jpg", {"folder": "r", "images": ["a.jpg"]}),
        ("fit --shots 3 s --final", {"source": "s", "shots": 3, "final": True}),
        ("report --method vtclip o", {"folder": "o", "method": ["vtclip"]}),
    ],
)
def test_positional_arguments_may_follow_options(words, wanted):
    values = parsed(*words.split())
    assert {name: values[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("evaluate r --json s t", "unknown argument 't'"),
        ("evaluate r s --device", "--device: expected one argument"),
        ("evaluate r --device --json s", "--device: expected one argument"),
        ("fit x --shot 4 y", "unknown argument '--shot'"),
        ("fit x --seed -1", "--seed: must be in"),
        ("predict r --json", "required: IMAGE"),
    ],
)
def test_wrong_words_are_still_named(capsys, words, message):
    with pytest.raises(SystemExit) as stopped:
        parsed(*words.split())
    assert stopped.value.code == 2
    line = capsys.readouterr().err
    assert message in line
    assert line.count("\n") == 1
