# SPDX-License-Identifier: Apache-2.0
"""Several labels per image: probabilities, average precision, F1, and training with a sigmoid."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from vtclip.data.records import MemoryStore, Records
from vtclip.data.splits import few_shot_split
from vtclip.heads import HEADS
from vtclip.train import multi_label
from vtclip.train.fit_head import fit_head
from vtclip.train.methods import recipe_config, zero_shot_head
from vtclip.train.multi_label import (
    Said,
    all_metrics,
    average_precision,
    best_threshold,
    micro_f1,
    say,
)
from vtclip.train.rows import TrainingRows
from vtclip.train.sigmoid import Sigmoid, fit_sigmoid, sigmoid_loss
from vtclip.train.steps import TrainingRun

CPU = torch.device("cpu")
ABLE = ("zeroshot", "clip-adapter", "coop", "mm-adapter", "vtclip", "rada")


def scenes(count=60, K=4, width=16, seed=0):
    """Images [count, width] that are sums of their classes' directions, all near one mean."""
    draw = torch.Generator().manual_seed(seed)
    directions = F.normalize(torch.randn(K, width, generator=draw), dim=-1)
    targets = torch.rand(count, K, generator=draw) < 0.4
    targets[torch.arange(count), torch.arange(count) % K] = True
    image = targets.float() @ directions + 0.3 * torch.randn(count, width, generator=draw) + 2
    text = directions + 2.0 * F.normalize(torch.randn(K, width, generator=draw), dim=-1)
    label = torch.arange(count) % K
    return Records(
        MemoryStore(F.normalize(image, dim=-1)),
        class_names=[f"class {k}" for k in range(K)],
        text=text,
        label=label,
        names=[str(row) for row in range(count)],
        targets=targets,
    )


def test_the_methods_that_can_are_these():
    assert {name for name, head in HEADS.items() if head.multi_label} == set(ABLE)


def test_average_precision_by_hand_and_by_all_thresholds():
    score = torch.tensor([0.9, 0.8, 0.8, 0.3, 0.1])
    positive = torch.tensor([True, False, True, False, True])
    # thresholds 0.9: P 1 R 1/3; 0.8: P 2/3 R 2/3; 0.3: P 1/2 R 2/3; 0.1: P 3/5 R 1
    assert average_precision(score, positive) == pytest.approx(1 / 3 + 2 / 9 + 1 / 5)
    assert average_precision(score, ~positive & False) != average_precision(score, positive)
    assert math.isnan(average_precision(score, torch.zeros(5, dtype=torch.bool)))
    assert average_precision(score, torch.ones(5, dtype=torch.bool)) == pytest.approx(1)


def brute_precision(score, positive):
    """Average precision by its definition, a threshold at each score."""
    total, before, out = int(positive.sum()), 0.0, 0.0
    for at in sorted(set(score.tolist()), reverse=True):
        taken = score >= at
        recall = int((taken & positive).sum()) / total
        out += (recall - before) * int((taken & positive).sum()) / int(taken.sum())
        before = recall
    return out


@pytest.mark.parametrize("seed", range(20))
def test_average_precision_agrees_with_its_definition(seed):
    draw = torch.Generator().manual_seed(seed)
    score = torch.randint(0, 6, (25,), generator=draw).double()
    positive = torch.rand(25, generator=draw) < 0.4
    positive[3] = True
    assert average_precision(score, positive) == pytest.approx(brute_precision(score, positive))


@pytest.mark.parametrize("seed", range(5))
def test_metrics_agree_with_scikit_learn(seed):
    sklearn = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(40, 5, generator=draw)
    targets = torch.rand(40, 5, generator=draw) < 0.3
    targets[0] = True
    row = all_metrics(Said(logits, targets), Sigmoid(1.0, torch.zeros(5)), 0.4)
    p, y = logits.double().sigmoid().numpy(), targets.numpy()
    assert row["map"] == pytest.approx(sklearn.average_precision_score(y, p, average="macro"))
    assert row["micro_ap"] == pytest.approx(sklearn.average_precision_score(y, p, average="micro"))
    for average in ("macro", "micro"):
        wanted = sklearn.f1_score(y, p >= 0.4, average=average)
        assert row[f"{average}_f1"] == pytest.approx(wanted)
    assert row["bce"] == pytest.approx(5 * sklearn.log_loss(y.ravel(), p.ravel()))


@pytest.mark.parametrize("seed", range(10))
def test_the_threshold_is_the_best_of_all(seed):
    draw = torch.Generator().manual_seed(seed)
    p = torch.randint(1, 9, (12, 3), generator=draw).double() / 10
    y = torch.rand(12, 3, generator=draw) < 0.5
    best = micro_f1(p >= best_threshold(p, y), y)
    assert best == pytest.approx(max(micro_f1(p >= at, y) for at in torch.arange(0, 1, 0.01)))


def test_the_sigmoid_finds_the_levels_it_was_drawn_from():
    draw = torch.Generator().manual_seed(0)
    s = 25 + torch.randn(20_000, 3, generator=draw, dtype=torch.float64)
    offset = torch.tensor([-50.0, -49.0, -52.0], dtype=torch.float64)
    y = torch.rand(s.shape, generator=draw, dtype=torch.float64) < (2 * s + offset).sigmoid()
    found = fit_sigmoid(s.float(), y)
    assert found.scale == pytest.approx(2, rel=0.05)
    z, wanted = found(s), 2 * s + offset
    assert (z - wanted).abs().mean() < 0.1
    assert Sigmoid.from_json(found.to_json())(s).equal(z)


def test_the_sigmoid_stays_finite_where_classes_are_separated_or_absent():
    s = torch.tensor([[30.0, 20.0, 25.0], [20.0, 30.0, 25.0], [30.0, 20.0, 25.0]])
    y = torch.tensor([[True, False, False], [False, True, False], [True, False, False]])
    found = fit_sigmoid(s, y)
    assert math.isfinite(found.scale)
    assert found.offset.isfinite().all()
    assert ((found(s.double()) > 0) == y).all()
    with pytest.raises(ValueError, match=r"must be \[N, K\], got"):
        fit_sigmoid(s, y[:, :2])


def test_the_loss_is_siglips():
    logits = torch.tensor([[1.0, -2.0], [0.5, 3.0]], dtype=torch.float64)
    targets = torch.tensor([[True, False], [True, True]])
    sigmoid = Sigmoid(2.0, torch.tensor([-1.0, 0.5], dtype=torch.float64))
    z = 2 * logits + torch.tensor([-1.0, 0.5])
    sign = 2 * targets.double() - 1
    wanted = -torch.log(1 / (1 + torch.exp(-sign * z))).sum() / 2
    assert sigmoid_loss(logits, targets, sigmoid) == pytest.approx(wanted.item())


def test_records_keep_their_targets():
    records = scenes()
    part = records.select(torch.tensor([5, 2]))
    assert part.targets.equal(records.targets[[5, 2]])
    assert part.batch(torch.tensor([1])).targets.equal(records.targets[[2]])
    few = records.subset_classes([2, 0])
    rows = [int(name) for name in few.names]
    assert few.targets.equal(records.targets[rows][:, [2, 0]])
    table = {"class_names": records.class_names, "text": records.text, "label": records.label}
    with pytest.raises(ValueError, match=r"bool \[60, 4\], got torch.bool \[60, 3\]"):
        Records(records.store, **table, names=records.names, targets=records.targets[:, :3])


@pytest.mark.parametrize(
    ("method", "rows", "overrides"),
    [
        ("clip-adapter", "test", {"lr": 1e-2}),
        ("rada", "test", {}),
        ("mm-adapter", "train", {}),  # of so few and so simple images it learns no more
    ],
)
def test_training_beats_zero_shot_and_repeats(method, rows, overrides):
    records = scenes(count=240)
    split = few_shot_split(records.label, records.names, shots=16, seed=1)
    config = recipe_config(method, 16, {"epochs": 30, **overrides})
    lines = []
    run = TrainingRun(CPU, 1, log=lines.append)
    heads = [fit_head(method, records, split, config, run) for _ in range(2)]
    states = [head.state_dict() for head in heads]
    assert all(states[0][name].equal(states[1][name]) for name in states[0])
    precision = [
        multi_label.mean_precision(say(head, records, getattr(split, rows), CPU))
        for head in (zero_shot_head(records, CPU), heads[0])
    ]
    assert precision[1] > precision[0] + 0.02
    assert 0 < lines[-1]["val_map"] <= 1
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_one_label_per_image_trains_as_before():
    records = scenes(count=80)
    single = Records(records.store, class_names=records.class_names, text=records.text,
                     label=records.label, names=records.names)  # fmt: skip
    split = few_shot_split(records.label, records.names, shots=4, seed=1)
    config = dataclasses.replace(recipe_config("clip-adapter", 4, {}), epochs=2)
    lines = []
    fit_head("clip-adapter", single, split, config, TrainingRun(CPU, 1, log=lines.append))
    assert "val_accuracy" in lines[-1]
    assert not TrainingRows(single, split.train).several
