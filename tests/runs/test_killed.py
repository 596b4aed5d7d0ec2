# SPDX-License-Identifier: Apache-2.0
"""A fit that ends while it writes: the run before stays whole, and the same command goes on."""

from __future__ import annotations

import numpy as np
import pytest
from pictures import dots
from tables import animal_features

import vtclip
from vtclip.bench.rows import RowFile
from vtclip.runs import folder
from vtclip.runs.folder import CHECKPOINT, LOG, LineLog


@pytest.mark.parametrize(
    ("method", "encoders"), [("proker", False), ("rada", False), ("rada", True)]
)
def test_a_run_that_is_replaced_stays_until_the_new_one_is_whole(
    method, encoders, tmp_path, monkeypatch
):
    """The adapter of the new run beside the result of the old one would be neither of them."""
    dots(tmp_path / "dots")
    how = {"method": method, "out": tmp_path / "run", "cache_dir": tmp_path / "cache",
           "device": "cpu", "train_encoders": encoders,
           "overrides": {"epochs": 2} if method == "rada" else None}  # fmt: skip
    vtclip.fit(tmp_path / "dots", shots=1, **how)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    evaluated = vtclip.evaluate(tmp_path / "run", cache_dir=tmp_path / "cache")

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folder, "write_decisions", killed)  # the adapter is written by then
        with pytest.raises(KeyboardInterrupt):
            vtclip.fit(tmp_path / "dots", shots=3, overwrite=True, **how)
    after = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert {**after, **{name: before[name] for name in before if name != LOG}} == after
    assert set(after) - set(before) <= {CHECKPOINT}
    assert vtclip.evaluate(tmp_path / "run", cache_dir=tmp_path / "cache") == evaluated
    goes_on = {"resume": True} if method == "rada" else {"overwrite": True}
    again = vtclip.fit(tmp_path / "dots", shots=3, **goes_on, **how)
    whole = vtclip.fit(tmp_path / "dots", shots=3, **{**how, "out": tmp_path / "whole"})
    assert again.result["digests"] == whole.result["digests"]
    assert again.accuracy == whole.accuracy


def test_a_log_is_not_written_through_a_planted_link(tmp_path, caplog):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / LOG).symlink_to(tmp_path / "precious")
    LineLog(tmp_path / LOG, append=True)({"step": 1})
    assert "the run goes on without it" in caplog.text
    assert (tmp_path / "precious").read_text() == "precious"
    LineLog(tmp_path / LOG, append=False)({"step": 1})
    assert (tmp_path / "precious").read_text() == "precious"
    assert (tmp_path / LOG).read_text().count("\n") == 1


def test_what_an_older_run_left_goes_with_the_commit_of_the_new_one(tmp_path):
    """A file that the new run does not have would be taken for its own."""
    dots(tmp_path / "dots")
    how = {"method": "zeroshot", "out": tmp_path / "run", "cache_dir": tmp_path / "cache",
           "device": "cpu"}  # fmt: skip
    vtclip.fit(tmp_path / "dots", **how)
    before = {path.name for path in (tmp_path / "run").iterdir()}
    for name in ("encoders.safetensors", "together.csv", CHECKPOINT):
        (tmp_path / "run" / name).write_bytes(b"of a run before")
    vtclip.fit(tmp_path / "dots", overwrite=True, **how)
    assert {path.name for path in (tmp_path / "run").iterdir()} == before


def test_a_rowfile_is_not_opened_through_a_planted_link(tmp_path):
    (tmp_path / "precious").write_text("no line end")
    (tmp_path / "results.jsonl").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="symbolic link"):
        RowFile(tmp_path / "results.jsonl")
    assert (tmp_path / "precious").read_text() == "no line end"


def test_an_unfinished_extension_is_begun_again_and_a_finished_one_stays(tmp_path):
    table, out = animal_features(), tmp_path / "wider"
    np.savez(tmp_path / "a.npz", **table)
    more = {"image": -table["image"][:48], "spatial": table["spatial"][:48],
            "label": table["label"][:48], "text": -table["text"][:2],
            "classname": np.array(["eel", "fox"]), "temperature": table["temperature"]}  # fmt: skip
    np.savez(tmp_path / "more.npz", **more)
    run = vtclip.fit(tmp_path / "a.npz", method="zeroshot", out=tmp_path / "run", device="cpu")
    out.mkdir()
    (out / ".result.json.0123456789abcdef.new").write_bytes(b"of a killed writer")
    wider = vtclip.extend(run, tmp_path / "more.npz", out=out, device="cpu")
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    assert len(wider.result["classes"]) == 6
    with pytest.raises(FileExistsError, match="exists and holds a run; give a new folder"):
        vtclip.extend(run, tmp_path / "more.npz", out=out, device="cpu")
