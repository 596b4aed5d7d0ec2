# SPDX-License-Identifier: Apache-2.0
"""A fit that ends while it writes: the same command finishes it, and nothing looks finished."""

from __future__ import annotations

import pytest
from pictures import dots

import vtclip
from vtclip.runs import folder
from vtclip.runs.result import RESULT


@pytest.mark.parametrize(
    ("method", "encoders"), [("proker", False), ("rada", False), ("rada", True)]
)
def test_a_run_that_is_half_replaced_is_not_finished(method, encoders, tmp_path, monkeypatch):
    """The adapter of the new run beside the result of the old one would be neither of them."""
    dots(tmp_path / "dots")
    how = {"method": method, "out": tmp_path / "run", "cache_dir": tmp_path / "cache",
           "device": "cpu", "train_encoders": encoders,
           "overrides": {"epochs": 2} if method == "rada" else None}  # fmt: skip
    vtclip.fit(tmp_path / "dots", shots=1, **how)

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(folder, "write_decisions", killed)  # the adapter is written by then
        with pytest.raises(KeyboardInterrupt):
            vtclip.fit(tmp_path / "dots", shots=3, overwrite=True, **how)
    assert not (tmp_path / "run" / RESULT).exists()
    with pytest.raises((ValueError, OSError), match="result.json"):
        vtclip.evaluate(tmp_path / "run", cache_dir=tmp_path / "cache")
    again = vtclip.fit(tmp_path / "dots", shots=3, resume=True, **how)
    whole = vtclip.fit(tmp_path / "dots", shots=3, **{**how, "out": tmp_path / "whole"})
    assert again.result["digests"] == whole.result["digests"]
    assert again.accuracy == whole.accuracy
