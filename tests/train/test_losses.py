# SPDX-License-Identifier: Apache-2.0
"""The generalised cross-entropy (1 - p^q) / q: its limits, its gradient, its range."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

import vtclip
from vtclip.cli import main
from vtclip.heads.config import FitConfig
from vtclip.train.steps import class_loss

N, K = 6, 5


def batch(scale: float = 3.0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return scale * torch.randn(N, K, dtype=dtype), torch.arange(N) % K


def gce(logits: Tensor, label: Tensor, q: float) -> Tensor:
    return class_loss(logits, label, FitConfig(epochs=1, loss="gce", gce_q=q))


def true_share(logits: Tensor, label: Tensor) -> Tensor:
    """p of the true class [N], term by term."""
    shares = [row.exp()[k] / row.exp().sum() for row, k in zip(logits, label.tolist(), strict=True)]
    return torch.stack(shares)


@settings(deadline=None, max_examples=30)
@given(q=st.floats(0.01, 1.0), scale=st.floats(0.0, 20.0), seed=st.integers(0, 2**16))
def test_is_the_formula_and_lies_between_0_and_1_over_q(q: float, scale: float, seed: int) -> None:
    torch.manual_seed(seed)
    logits, label = batch(scale)
    wanted = ((1 - true_share(logits, label) ** q) / q).mean()
    found = gce(logits, label, q)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
    assert 0 <= float(found) <= 1 / q


def test_small_q_is_cross_entropy() -> None:
    logits, label = batch()
    wanted = F.cross_entropy(logits, label)
    near = [float((gce(logits, label, q) - wanted).abs()) for q in (1e-2, 1e-4, 1e-6)]
    assert near[2] < 1e-4 * float(wanted)
    assert near[0] > 50 * near[1] > 2500 * near[2]  # the distance falls as q
    # in float32 the difference 1 - p^q of numbers near 1 must not lose its digits
    single = gce(logits.float(), label, 1e-6)
    assert float(single) == pytest.approx(float(wanted), rel=1e-4)


def test_q_1_is_one_minus_p() -> None:
    logits, label = batch()
    wanted = (1 - true_share(logits, label)).mean()
    torch.testing.assert_close(gce(logits, label, 1.0), wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("q", [0.1, 0.5, 1.0])
def test_gradient_is_that_of_cross_entropy_weighed_by_p_to_the_q(q: float) -> None:
    logits, label = batch()
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gce(x, label, q), logits)
    (found,) = torch.autograd.grad(gce(logits, label, q), logits)
    (plain,) = torch.autograd.grad(F.cross_entropy(logits, label), logits)
    weight = true_share(logits.detach(), label) ** q
    torch.testing.assert_close(found, weight[:, None] * plain, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("q", [1e-3, 0.5, 1.0])
@pytest.mark.parametrize("size", [1e3, 1e30])
def test_extreme_logits_stay_finite(q: float, size: float) -> None:
    logits = torch.tensor([[size, 0.0, -size], [-size, size, 0.0]], requires_grad=True)
    right, wrong = torch.tensor([0, 1]), torch.tensor([2, 0])
    assert float(gce(logits.detach(), right, q)) == 0
    loss = gce(logits, wrong, q)
    (slope,) = torch.autograd.grad(loss, logits)
    assert bool(slope.isfinite().all())
    if q * size > 100:  # p^q is 0 there
        assert float(loss.detach()) == pytest.approx(1 / q)


def test_a_wrong_label_pulls_less_than_in_cross_entropy() -> None:
    logits = torch.tensor([[6.0, 0.0], [0.5, 0.0]], dtype=torch.float64, requires_grad=True)
    label = torch.tensor([1, 1])  # the first row is sure of the other class
    pulls = []
    for loss in (F.cross_entropy(logits, label), gce(logits, label, 0.7)):
        (slope,) = torch.autograd.grad(loss, logits)
        sure, unsure = slope.norm(dim=1).tolist()
        pulls.append(sure / unsure)
    assert pulls[0] > 1 > pulls[1]


def test_every_trained_head_takes_it(npz: Path, tmp_path: Path) -> None:
    seen = {}
    for loss in ("ce", "gce"):
        overrides = {"epochs": 1, "loss": loss, "gce_q": 0.3}
        run = vtclip.fit(
            npz, method="rada", shots=2, overrides=overrides, out=tmp_path / loss, threads=1
        )
        rows = [json.loads(line) for line in (run.folder / "log.jsonl").read_text().splitlines()]
        seen[loss] = rows[0]["loss"]
        assert run.result["config"]["fit"]["loss"] == loss
    assert 0 < seen["gce"] < seen["ce"]


def test_command_line(npz: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["fit", str(npz), "--method", "rada", "--shots", "2", "--epochs", "1", "--threads", "1"]
    out = tmp_path / "run"
    assert main([*args, "--loss", "gce", "--gce-q", "0.3", "--out", str(out)]) == 0
    fitted = json.loads((out / "result.json").read_text())["config"]["fit"]
    assert (fitted["loss"], fitted["gce_q"]) == ("gce", 0.3)
    for wrong, what in (
        (["--gce-q", "0.3"], "--gce-q is for --loss gce"),
        (["--loss", "mae"], "ce, gce"),
        (["--loss", "gce", "--gce-q", "0"], "--gce-q"),
        (["--loss", "gce", "--label-smoothing", "0.1"], "--label-smoothing must be 0"),
    ):
        assert what in refused(capsys, *args, *wrong, "--out", tmp_path / "none")
        assert not (tmp_path / "none").exists()
