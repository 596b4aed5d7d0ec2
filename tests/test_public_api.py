# SPDX-License-Identifier: Apache-2.0
"""What people meet first: names with types, and a docstring on everything that is public."""

from __future__ import annotations

import ast
import inspect
import pydoc
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vtclip

ROOT = Path(__file__).parents[1]
ROOMS = (vtclip, vtclip.ops, vtclip.heads, vtclip.testing)


def typed_names() -> dict[str, str]:
    """The names that `vtclip/__init__.py` imports for type checkers, as `_LAZY` writes them."""
    tree = ast.parse((ROOT / "vtclip" / "__init__.py").read_text(encoding="utf-8"))
    block = next(
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    found = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name  # only this form hands a name on
            module = node.module == "vtclip"
            place = f"vtclip.{alias.name}" if module else f"{node.module}:{alias.name}"
            found[alias.name] = place
    return found


def test_type_checkers_see_every_name_where_it_is():
    assert typed_names() == vtclip._LAZY


def test_every_name_is_there():
    for name in vtclip.__all__:
        assert getattr(vtclip, name) is not None
        assert name in dir(vtclip)
    with pytest.raises(AttributeError, match="module 'vtclip' has no attribute 'fitt'"):
        _ = vtclip.fitt


SNIPPET = """
import vtclip
run = vtclip.fit("images", shots=4)
reveal_type(run)
reveal_type(vtclip.Classifier.load("run").predict("photo.jpg", topk=3))
reveal_type(vtclip.heads.ZeroShot)
vtclip.fit("images", method=3)
vtclip.fitt("images")
"""


@pytest.mark.slow
def test_mypy_knows_what_the_names_are(tmp_path):
    pytest.importorskip("mypy", reason="needs the type checker of the extra dev")
    (tmp_path / "snippet.py").write_text(SNIPPET)
    words = ["--no-error-summary", "--no-incremental", "--cache-dir", str(tmp_path / "cache")]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *words, "--follow-imports", "silent",
         "--config-file", str(ROOT / "pyproject.toml"), str(tmp_path / "snippet.py")],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    said = re.findall(r"snippet.py:(\d+): (?:note|error): (.*)", done.stdout)
    of_line = {int(line): text for line, text in reversed(said)}
    assert of_line[4] == 'Revealed type is "vtclip.runs.result.Run"', done.stdout + done.stderr
    assert re.search(r"list\[.*vtclip\.runs\.predictions\.Prediction\]", of_line[5])
    assert "vtclip.heads.zeroshot.ZeroShot" in of_line[6]
    assert 'Argument "method" to "fit" has incompatible type "int"' in of_line[7]
    assert 'Module has no attribute "fitt"' in of_line[8]


def ours(value: object) -> bool:
    return str(getattr(value, "__module__", "")).startswith("vtclip")


def public() -> Iterator[tuple[str, object]]:
    """(place, function or class) of all that the rooms hand out, methods of classes too."""
    for room in ROOMS:
        names = getattr(room, "__all__", None) or [n for n in vars(room) if n[0] != "_"]
        for name in names:
            value = getattr(room, name)
            if ours(value) and (inspect.isclass(value) or inspect.isfunction(value)):
                yield f"{room.__name__}.{name}", value
            if ours(value) and inspect.isclass(value):
                for kind in filter(ours, value.__mro__):
                    yield from methods(kind)


def methods(kind: type) -> Iterator[tuple[str, object]]:
    for name, value in vars(kind).items():
        bare = getattr(value, "__func__", getattr(value, "fget", value))
        if name[0] != "_" and inspect.isfunction(bare) and ours(bare):
            yield f"{kind.__module__}.{kind.__name__}.{name}", bare


def documented(place: str, value: object) -> bool:
    """Its own docstring or, of a method, that of the method of ours that it replaces."""
    if getattr(value, "__doc__", None):
        return True
    name = place.rpartition(".")[2]
    kinds = {kind for head in vtclip.heads.HEADS.values() for kind in head.__mro__ if ours(kind)}
    bases = [k for k in kinds for below in kinds if place.startswith(
        f"{below.__module__}.{below.__name__}.") and k in below.__mro__[1:]]  # fmt: skip
    return any(getattr(vars(base).get(name), "__doc__", None) for base in bases)


def test_all_that_is_public_has_a_docstring():
    found = dict(public())
    assert {"vtclip.fit", "vtclip.Run", "vtclip.ops.cross_attn"} <= set(found)
    assert "vtclip.runs.classifier.Classifier.predict" in found
    assert len(found) > 200
    assert [place for place, value in found.items() if not documented(place, value)] == []


def test_the_docstring_of_fit_names_every_option():
    explained = vtclip.fit.__doc__ or ""
    starts = re.findall(r"(?m)^    ([a-z_]+(?:, [a-z_]+)*):|\. ([a-z_]+): ", explained)
    names = {name for pair in starts for part in pair for name in part.split(", ") if name}
    options = set(inspect.signature(vtclip.fit).parameters)
    beside = {name for name in options - names if f"`{name}`" in explained}
    assert options - names - beside == set()
    assert beside <= {"test_fraction"}  # said where `test` is


def test_help_begins_with_what_there_is():
    text = pydoc.plain(pydoc.render_doc(vtclip))
    first, _, _ = text.partition("PACKAGE CONTENTS")
    assert len(first.splitlines()) <= 30
    for name in vtclip.__all__[1:]:
        assert re.search(rf"\b{name}\b", first), name
