# SPDX-License-Identifier: Apache-2.0
"""A .pt2 from elsewhere: what would run code, or is not what its .json names, is never loaded."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import vtclip
from vtclip.files import sealed, to_json

GRAPH, SAMPLE = "archive/models/model.json", "archive/data/sample_inputs/model.pt"
WEIGHTS = "archive/data/weights/model_weights_config.json"


class Bomb:
    """Unpickling it makes the folder that the working directory then has."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, ("ran",))


@pytest.fixture(scope="module")
def exported() -> bytes:
    program = torch.export.export(
        nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1)).eval(),
        (torch.ones(2, 4),),
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
    ).run_decompositions({})
    file = io.BytesIO()
    torch.export.save(program, file)
    return file.getvalue()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "m.pt2"


def put(file: Path, data: bytes, named: bytes | None = None) -> None:
    """The file, with the .json of an export of `named`, by default of the same bytes."""
    file.write_bytes(data)
    digest = hashlib.sha256(data if named is None else named).hexdigest()
    about = {"format": "vtclip-export", "files": {file.name: digest}, "class_names": ["a"]}
    file.with_suffix(".json").write_bytes(to_json(sealed(about)))


def changed(data: bytes, name: str, change: Callable[[bytes], bytes]) -> bytes:
    """The archive with one member changed, added or, where `change` returns b"", without it."""
    source, out = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as target:
        for member in source.namelist():
            content = source.read(member)
            content = change(content) if member == name else content
            if content:
                target.writestr(member, content)
        if name not in source.namelist():
            target.writestr(name, change(b""))
    return out.getvalue()


def in_graph(change: Callable[[dict[str, Any]], object]) -> Callable[[bytes], bytes]:
    def edit(content: bytes) -> bytes:
        value = json.loads(content)
        change(value)
        return json.dumps(value).encode()

    return edit


def test_an_export_loads(exported, place):
    put(place, exported)
    module = vtclip.load_exported(place)
    assert module(torch.zeros(5, 4)).shape == (5, 3)


@pytest.mark.parametrize("byte", [-300, 3000])
def test_a_flipped_bit_is_refused_before_it_is_loaded(exported, place, byte, monkeypatch):
    damaged = bytearray(exported)
    damaged[byte] ^= 1
    put(place, bytes(damaged), named=exported)
    monkeypatch.setattr(torch.export, "load", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match=r"m\.pt2 is not the file that m\.json describes"):
        vtclip.load_exported(place)


def test_without_its_json_it_is_unknown(exported, place):
    put(place, exported)
    place.with_suffix(".json").unlink()
    with pytest.raises(FileNotFoundError, match="is unknown: .* trust_unknown") as error:
        vtclip.load_exported(place)
    assert "\n" not in str(error.value)
    assert vtclip.load_exported(place, trust_unknown=True)(torch.zeros(2, 4)).shape == (2, 3)
    for content in (b"", b"{}", b"[1]", to_json(sealed({"format": "vtclip-export", "files": []}))):
        place.with_suffix(".json").write_bytes(content)
        with pytest.raises(ValueError, match="is unknown"):
            vtclip.load_exported(place)


def sample(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


RUNS_CODE = "__import__('os').mkdir('ran')"
EXTRA = "archive/data/constants/custom_obj_0"


def first_size(graph: dict[str, Any]) -> dict[str, Any]:
    values = graph["graph_module"]["graph"]["tensor_values"].values()
    sizes = (size for value in values for size in value["sizes"])
    return next(size["as_expr"] for size in sizes if "as_expr" in size)


def call(graph: dict[str, Any]) -> dict[str, Any]:
    return graph["graph_module"]["module_call_graph"][0]["signature"]


ATTACKS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "a sample input that is an object": (SAMPLE, lambda _: sample((Bomb(),))),
    "a plain pickle as sample input": (SAMPLE, lambda _: pickle.dumps(Bomb())),
    "an object among the constants": (EXTRA, lambda _: pickle.dumps(Bomb())),
    "a pickled weight": (
        WEIGHTS,
        in_graph(lambda c: next(iter(c["config"].values())).update(use_pickle=True)),
    ),
    "Python as a size": (GRAPH, in_graph(lambda g: first_size(g).update(expr_str=RUNS_CODE))),
    "Python as a guard": (GRAPH, in_graph(lambda g: g.update(guards_code=[RUNS_CODE]))),
    "Python as an argument's name": (
        GRAPH,
        in_graph(lambda g: call(g).update(forward_arg_names=[f"input={RUNS_CODE}"])),
    ),
    "a call of torch.load": (
        GRAPH,
        in_graph(lambda g: g["graph_module"]["graph"]["nodes"][0].update(target="torch.load")),
    ),
    "an import by a container": (
        GRAPH,
        in_graph(
            lambda g: call(g).update(
                out_spec='[1, {"type": "collections.defaultdict", "context": "{}", '
                '"children_spec": []}]'
            )
        ),
    ),
    "the layout before 2.8": ("serialized_state_dict.pt", lambda _: sample(Bomb())),
    "a member that nobody writes": ("archive/extra/note", lambda _: b"x"),
    "a missing member": (WEIGHTS, lambda _: b""),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_what_could_run_code_is_refused_although_its_json_names_it(exported, place, name):
    member, change = ATTACKS[name]
    put(place, changed(exported, member, change))
    with pytest.raises(ValueError, match="load_exported") as error:
        vtclip.load_exported(place)
    assert not Path("ran").exists()
    assert "\n" not in str(error.value)
    assert "weights_only" not in str(error.value)


def test_such_a_file_does_run_code_where_it_is_trusted(exported, place):
    """So the refusals above are no idle ones."""
    member, change = ATTACKS["a sample input that is an object"]
    put(place, changed(exported, member, change))
    with pytest.raises(ValueError, match="torch cannot load"):
        vtclip.load_exported(place, trust_unknown=True)
    assert Path("ran").is_dir()


@pytest.mark.parametrize("content", [b"", b"PK", b"<html>404</html>", b"\x80\x04." * 20])
def test_other_files_are_refused_in_one_line(place, content):
    put(place, content)
    with pytest.raises(ValueError, match="damaged or another format") as error:
        vtclip.load_exported(place)
    assert "\n" not in str(error.value)
