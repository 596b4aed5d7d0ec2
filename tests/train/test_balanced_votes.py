# SPDX-License-Identifier: Apache-2.0
"""A fit of up to N images per class lets each class vote alike; an exact one each image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tables import animal_features

import vtclip
from vtclip.runs.adapter import load_adapter
from vtclip.runs.result import Run

VOTERS = ("tip-adapter", "tip-adapter-f", "tip-x", "proker", "takl")
FEW = {"tip-adapter-f": {"epochs": 3}}


def uneven(path: Path) -> Path:
    """24 images of the classes 0 and 2, 6 of 1 and 3."""
    arrays = animal_features(lean=1.0)
    label = arrays["label"]
    place = np.arange(len(label)) % 24
    rows = np.flatnonzero((label % 2 == 0) | (place < 6))
    kept = {name: arrays[name][rows] for name in ("image", "label")}
    np.savez(path, **{**arrays, **kept, "spatial": arrays["spatial"][rows]})
    return path


def fit(source: Path, method: str, out: Path, shots: int | str, **options: Any) -> Run:
    options = {"overrides": FEW.get(method), **options}
    return vtclip.fit(source, method=method, shots=shots, out=out, device="cpu", **options)


@pytest.mark.parametrize("method", VOTERS)
def test_up_to_n_images_set_the_mean_number_and_the_run_keeps_it(method, tmp_path):
    run = fit(uneven(tmp_path / "t.npz"), method, tmp_path / "run", "all")
    train = [row["train"] for row in run.result["images_per_class"].values()]
    assert min(train) < max(train)
    head: Any = load_adapter(run.folder).head
    assert head.votes_per_class == sum(train) / len(train)
    votes = head.class_weights() * torch.bincount(head.label)
    torch.testing.assert_close(votes, torch.full_like(votes, head.votes_per_class))
    again = vtclip.repeat(run)
    assert again["verdict"] == "MATCH"


@pytest.mark.parametrize("method", VOTERS)
def test_exact_shots_and_pseudo_labels_let_each_image_vote(method, tmp_path):
    source = uneven(tmp_path / "t.npz")
    for name in ("exact_shots", "pseudo_labels"):
        run = fit(source, method, tmp_path / name, 2, **{name: True})
        head: Any = load_adapter(run.folder).head
        assert head.votes_per_class is None


@pytest.mark.parametrize("method", VOTERS)
def test_equal_classes_give_the_head_of_an_exact_draw(method, npz, tmp_path):
    heads: list[Any] = []
    for exact in (False, True):
        run = fit(npz, method, tmp_path / str(exact), 8, exact_shots=exact)
        heads.append(load_adapter(run.folder).head)
    one, two = heads
    assert one.votes_per_class == 8.0
    assert torch.equal(one.keys, two.keys)
    assert torch.equal(one.label, two.label)
    image = torch.randn(9, one.text.shape[1])
    assert {**one.options(), "votes_per_class": None} == two.options()
    assert torch.equal(one(image), two(image))


def test_a_final_fit_keeps_the_size_of_the_votes_that_alpha_was_chosen_for(tmp_path):
    source = uneven(tmp_path / "t.npz")
    heads: list[Any] = [
        load_adapter(fit(source, "tip-adapter", tmp_path / name, "all", final=final).folder).head
        for name, final in (("a", False), ("b", True))
    ]
    assert len(heads[1].keys) > len(heads[0].keys)
    assert heads[0].votes_per_class == heads[1].votes_per_class
    assert (heads[0].alpha, heads[0].beta) == (heads[1].alpha, heads[1].beta)


@pytest.mark.parametrize("method", VOTERS)
def test_a_refit_of_an_exact_draw_keeps_the_size_too(method, npz, tmp_path):
    """With twice the images each counts half."""
    run = fit(npz, method, tmp_path / "run", 4, exact_shots=True, refit=True)
    head: Any = load_adapter(run.folder).head
    assert len(head.keys) == 2 * 4 * len(head.text)
    assert head.votes_per_class == 4.0
    assert set(head.class_weights().tolist()) == {0.5}


def test_a_number_that_is_asked_for_stays(tmp_path):
    overrides = {"head": {"votes_per_class": 3.0}}
    run = fit(uneven(tmp_path / "t.npz"), "tip-x", tmp_path / "run", "all", overrides=overrides)
    head: Any = load_adapter(run.folder).head
    assert head.votes_per_class == 3.0


def test_members_of_an_average_vote_alike_too(tmp_path):
    run = fit(uneven(tmp_path / "t.npz"), "auto", tmp_path / "run", "all")
    head: Any = load_adapter(run.folder).head
    voters = [member for member in head.member_heads if member.method in VOTERS]
    train = [row["train"] for row in run.result["images_per_class"].values()]
    assert voters
    for member in voters:
        assert member.votes_per_class == sum(train) / len(train)
