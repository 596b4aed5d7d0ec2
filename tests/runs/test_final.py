# SPDX-License-Identifier: Apache-2.0
"""Runs whose adapter trained on its test images at last: what they can still be used for."""

from __future__ import annotations

import pytest
from commands import call, json_of, refused
from pictures import dots

import vtclip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("final")
    dots(root / "dots")
    vtclip.fit(root / "dots", method="proker", shots=2, final=True, out=root / "run", device="cpu",
               cache_dir=root / "cache")  # fmt: skip
    return root


def test_its_own_test_images_are_refused_and_others_count(place, tmp_path, capsys):
    cache = ["--cache-dir", place / "cache", "--device", "cpu"]
    line = refused(capsys, "evaluate", place / "run", *cache)
    assert "was fitted with --final, so that its adapter has trained on its test images" in line
    assert "give other images as SOURCE" in line
    with pytest.raises(ValueError, match=r"fitted with final, .* give other images as source"):
        vtclip.evaluate(place / "run")
    line = refused(capsys, "evaluate", place / "run", place / "dots", *cache)
    assert "no image is left to count; 24 of 24 images left out: 24 " in line
    # one picture that it has not seen
    other = dots(tmp_path / "other", spoiled=["red dot/3.png"])
    values = json_of(capsys, "evaluate", place / "run", other, *cache)
    assert (values["test"]["images"], values["left_out"]["trained"]) == (1, 23)


def test_an_official_list_that_it_trained_on_is_refused(tmp_path, trees):
    root = trees.make_split(tmp_path / "root", "caltech101")
    run = vtclip.fit("caltech101", data=root, method="proker", shots=1, out=tmp_path / "run",
                     final=True, cache_dir=tmp_path / "cache", device="cpu")  # fmt: skip
    for source in (None, "caltech101"):
        with pytest.raises(ValueError, match="was fitted with final"):
            vtclip.evaluate(run, source, data=root, cache_dir=tmp_path / "cache")


def test_it_predicts_exports_and_repeats(place, tmp_path, capsys):
    out = json_of(capsys, "predict", place / "run", place / "dots" / "red dot", "--device", "cpu")[
        "images"
    ]
    assert len(out) == 8
    assert call("repeat", place / "run", "--cache-dir", place / "cache") == 0
    assert "MATCH" in capsys.readouterr().out
