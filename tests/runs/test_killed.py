# SPDX-License-Identifier: Apache-2.0
"""A fit that ends while it writes: the run before stays whole, and the same command goes on."""

from __future__ import annotations

import pytest
from pictures import dots

import vtclip
from vtclip.runs import folder
from vtclip.runs.folder import CHECKPOINT, LOG


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
