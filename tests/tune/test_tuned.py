# SPDX-License-Identifier: Apache-2.0
"""The table of tuned tiles: what is read, what is refused, and which launches it changes."""

from __future__ import annotations

import json
import os

import pytest
import torch
from commands import environment, python

from vtclip.files import json_digest
from vtclip.tune import table as tuned

pytest.importorskip("triton", reason="triton is not installed")
from vtclip.kernels import _configs, _tiles

H200 = _configs.Target("cuda", 90, 227 * 1024, "NVIDIA H200")
FWD = ("fwd", torch.bfloat16, "tf32", (32, 8, 1000, 49, 128))
KEY = "fwd bfloat16 tf32 B32 H8 K1000 L49 d128"
ENTRIES = {KEY: (128, 32, 8, 3)}


@pytest.fixture(autouse=True)
def _no_table(monkeypatch):
    monkeypatch.delenv("VTCLIP_TUNED", raising=False)
    yield
    _tiles.use_tuned({})


@pytest.fixture
def table(tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    tuned.write(path, "NVIDIA H200", 90, ENTRIES)
    monkeypatch.setenv("VTCLIP_TUNED", str(path))
    return path


def test_nothing_is_read_unless_asked_for(table, monkeypatch):
    for value in ("", "0"):
        monkeypatch.setenv("VTCLIP_TUNED", value)
        assert tuned.wanted() is None
        assert tuned.activate(("NVIDIA H200", 90)) == 0
    assert _tiles.choose(*FWD, H200) == _tiles.built_in(*FWD, H200)


def test_one_names_the_file_in_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("VTCLIP_CACHE", str(tmp_path))
    monkeypatch.setenv("VTCLIP_TUNED", "1")
    assert tuned.wanted() == tmp_path / "tuned.json"


def test_an_entry_holds_for_exactly_its_key(table):
    assert tuned.activate(("NVIDIA H200", 90)) == 1
    assert _tiles.choose(*FWD, H200) == _tiles.Tile(128, 32, 8, 3)
    kind, dtype, precision, sizes = FWD
    others = [
        ("bwd_query", dtype, precision, sizes, H200),
        (kind, torch.float16, precision, sizes, H200),
        (kind, torch.float32, "ieee", sizes, H200),
        *((kind, dtype, precision, (*sizes[:i], sizes[i] + 1, *sizes[i + 1 :]), H200)
          for i in range(5)),
        (*FWD, H200._replace(name="NVIDIA H100 80GB HBM3")),
        (*FWD, H200._replace(capability=100)),
    ]  # fmt: skip
    for other in others:
        plain = _tiles.fitted(other[0], _tiles.built_in(*other), other[3])
        assert _tiles.choose(*other) == plain


def test_a_tile_of_a_table_is_no_larger_than_the_problem(tmp_path, monkeypatch):
    path = tmp_path / "t.json"
    sizes = (1, 1, 5, 5, 8)
    key = _tiles.entry_name("fwd", torch.bfloat16, "tf32", sizes)
    tuned.write(path, "NVIDIA H200", 90, {key: (128, 128, 4, 2)})
    monkeypatch.setenv("VTCLIP_TUNED", str(path))
    tuned.activate(None)
    tile = _tiles.choose("fwd", torch.bfloat16, "tf32", sizes, H200)
    assert tile == _tiles.Tile(16, 16, 4, 2)


def test_sections_and_entries_are_added_to_a_table(table):
    before = tuned.read(table)
    tuned.write(table, "NVIDIA A100", 80, {KEY: (64, 64, 4, 2)})
    other = "bwd_key bfloat16 tf32 B32 H8 K1000 L49 d128"
    tuned.write(table, "NVIDIA H200", 90, {other: (32, 32, 4, 2)})
    tables = tuned.for_these_versions(table)
    assert tables["NVIDIA H200", 90] == {**ENTRIES, other: (32, 32, 4, 2)}
    assert tables["NVIDIA A100", 80] == {KEY: (64, 64, 4, 2)}
    assert len(before) == 1
    tuned.write(table, "NVIDIA H200", 90, {KEY: (64, 32, 4, 2)})
    assert tuned.for_these_versions(table)["NVIDIA H200", 90][KEY] == (64, 32, 4, 2)
    assert not list(table.parent.glob("*.new"))


def test_a_write_that_fails_leaves_the_old_table(table, monkeypatch):
    before = table.read_bytes()

    def stop(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(OSError, match="no space"):
        tuned.write(table, "NVIDIA H200", 90, {KEY: (16, 16, 4, 1)})
    assert table.read_bytes() == before


@pytest.mark.parametrize("key", ["device", "triton", "vtclip"])
def test_of_another_device_or_version_warns_once_and_is_not_used(table, caplog, key):
    content = json.loads(table.read_text())
    content["sections"][0][key] = "another"
    content["digest"] = json_digest({"sections": content["sections"]})
    table.write_text(json.dumps(content))
    assert tuned.activate(("NVIDIA H200", 90)) == 0
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "has no tiles for NVIDIA H200" in message
    assert "\n" not in message
    assert _tiles.choose(*FWD, H200) == _tiles.built_in(*FWD, H200)


def edited(change):
    def edit(content):
        change(content)
        content["digest"] = json_digest({"sections": content["sections"]})
        return json.dumps(content)

    return edit


def entry_as(value):
    return edited(lambda content: content["sections"][0]["entries"].update({KEY: value}))


BAD = {
    "empty": (lambda content: "", "is not valid JSON"),
    "cut": (lambda content: json.dumps(content)[:-20], "is not valid JSON"),
    "a list": (lambda content: "[]", "holds a list"),
    "foreign": (lambda content: '{"accuracy": 0.5}', "has no format 'vtclip tuned tiles'"),
    "older": (edited(lambda c: c.update(version=0)), "has version 0, this vtclip reads 1; run"),
    "newer": (edited(lambda c: c.update(version=2)), "has version 2, this vtclip reads 1; run"),
    "by hand": (lambda c: json.dumps(c).replace("128, 32", "64, 32"), "damaged or was edited"),
    "no sections": (edited(lambda c: c.update(sections=None)), "tiles that no kernel can have"),
    "not a section": (edited(lambda c: c.update(sections=[3])), "tiles that no kernel can have"),
    "no device": (edited(lambda c: c["sections"][0].pop("device")), "no kernel can have"),
    "a string": (entry_as("64"), "tiles that no kernel can have"),
    "not a power": (entry_as([48, 64, 4, 2]), "tiles that no kernel can have"),
    "too long": (entry_as([64, 64, 4, 2, 2]), "tiles that no kernel can have"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_table_is_refused_in_one_line(table, name):
    change, message = BAD[name]
    table.write_text(change(json.loads(table.read_text())))
    with pytest.raises(ValueError, match="not a table of tuned tiles") as refused:
        tuned.activate(("NVIDIA H200", 90))
    assert message in str(refused.value)
    assert str(table) in str(refused.value)
    assert "\n" not in str(refused.value)
    assert _tiles.choose(*FWD, H200) == _tiles.built_in(*FWD, H200)


def test_a_bad_table_is_not_overwritten(table):
    table.write_text("{}")
    with pytest.raises(ValueError, match="has no format"):
        tuned.write(table, "NVIDIA H200", 90, ENTRIES)
    assert table.read_text() == "{}"


CHILD = """
import torch
from vtclip import ops
from vtclip.kernels import _tiles
query, key = torch.ones(1, 2, 20, 8), torch.ones(2, 2, 9, 8)
for _ in range(2):
    try:
        assert (ops.cross_attn(query, key, key, impl="triton") == 1).all()
    except Exception as error:
        print(type(error).__name__, error)
print(_tiles.choose("fwd", torch.float32, "ieee", (2, 2, 20, 9, 8),
      __import__("vtclip.kernels._configs", fromlist=["x"]).target_of(query)))
"""


def child(**variables):
    done = python("-c", CHILD, env=environment(TRITON_INTERPRET="1", **variables))
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the child runs in the interpreter")
def test_a_process_reads_it_on_its_first_kernel(tmp_path):
    path = tmp_path / "here.json"
    tuned.write(path, "", 0, {"fwd float32 ieee B2 H2 K20 L9 d8": (16, 16, 4, 3)})
    built_in, tile = "Tile(block_k=32, block_l=16", "Tile(block_k=16, block_l=16"
    assert child()[-1].startswith(built_in)
    assert child(VTCLIP_TUNED=str(path))[-1].startswith(tile)
    path.write_text("{}")
    lines = child(VTCLIP_TUNED=str(path))
    assert len(lines) == 3  # refused in every call, not in the first alone
    assert all("ValueError not a table of tuned tiles" in line for line in lines[:2])
    assert lines[2].startswith(built_in)
    missing = child(VTCLIP_TUNED=str(tmp_path / "none.json"))
    assert "FileNotFoundError not a table of tuned tiles" in missing[0]
