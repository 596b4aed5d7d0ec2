# SPDX-License-Identifier: Apache-2.0
"""Metrics against values worked out by hand and against loops that follow the definitions."""

from __future__ import annotations

import math

import pytest
import torch

from vtclip.train import metrics

# three classes; predictions 0, 0, 1, 2, 0 for labels 0, 1, 1, 2, 2
LOGITS = torch.tensor(
    [[2.0, 0.0, 0.0], [1.0, 0.5, 0.0], [0.0, 3.0, 1.0], [0.0, 0.0, 1.0], [4.0, 0.0, 0.0]]
)
LABEL = torch.tensor([0, 1, 1, 2, 2])


def test_hand_values() -> None:
    assert metrics.accuracy(LOGITS, LABEL) == pytest.approx(3 / 5)
    assert metrics.per_class_accuracy(LOGITS, LABEL) == pytest.approx([1.0, 0.5, 0.5])
    # F1: class 0 TP 1 FP 2 FN 0 -> 2/4; class 1 TP 1 FP 0 FN 1 -> 2/3; class 2 the same
    assert metrics.macro_f1(LOGITS, LABEL) == pytest.approx((0.5 + 2 / 3 + 2 / 3) / 3)
    assert metrics.confusion(LOGITS, LABEL).tolist() == [[1, 0, 0], [1, 1, 0], [1, 0, 1]]


def test_nll_by_hand() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    # probabilities of the labels: 3/4 and 1/2
    assert metrics.nll(logits, torch.tensor([0, 1])) == pytest.approx(
        -(math.log(3 / 4) + math.log(1 / 2)) / 2
    )


def ece_loop(logits: torch.Tensor, label: torch.Tensor, bins: int) -> float:
    """The definition, one image and one bin at a time."""
    rows = []
    for row, true in zip(logits.double(), label.tolist(), strict=True):
        probability = torch.softmax(row, dim=0)
        confidence = float(probability.max())
        rows.append((min(int(confidence * bins), bins - 1), confidence, int(row.argmax()) == true))
    total = 0.0
    for number in range(bins):
        inside = [row for row in rows if row[0] == number]
        if inside:
            mean_confidence = sum(row[1] for row in inside) / len(inside)
            mean_accuracy = sum(row[2] for row in inside) / len(inside)
            total += len(inside) / len(rows) * abs(mean_accuracy - mean_confidence)
    return total


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0, 100.0])
def test_ece_follows_the_definition(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(300, 7, generator=generator) * scale
    label = torch.randint(0, 7, (300,), generator=generator)
    # both in float64: a sum of 300 terms below 1 agrees to well under 1e-12
    assert metrics.ece(logits, label) == pytest.approx(ece_loop(logits, label, 15), abs=1e-12)


def test_confidence_of_exactly_one_is_counted_in_the_last_bin() -> None:
    logits = torch.tensor([[1000.0, 0.0], [1000.0, 0.0], [0.0, 1000.0], [0.0, 1000.0]])
    assert float(logits.double().softmax(1).max()) == 1.0
    assert metrics.ece(logits, torch.tensor([0, 0, 1, 1])) == 0.0
    assert metrics.ece(logits, torch.tensor([0, 1, 1, 1])) == pytest.approx(0.25)


def test_bins_by_hand() -> None:
    # confidences 3/4, 3/4, 1/2 and, rounded, 1: bins 11, 11, 7 and 14 of 15
    three, far = math.log(3.0), 1000.0
    logits = torch.tensor([[three, 0.0], [0.0, three], [0.0, 0.0], [far, 0.0]]).double()
    bins = metrics.reliability(logits, torch.tensor([0, 0, 1, 0]))
    assert len(bins) == metrics.NUM_BINS == 15
    filled = {i: found for i, found in enumerate(bins) if found[2]}
    assert filled == {
        7: (pytest.approx(0.5), 0.0, 1),
        11: (pytest.approx(0.75), 0.5, 2),
        14: (1.0, 1.0, 1),
    }
    assert {bins[i] for i in range(15) if i not in filled} == {(None, None, 0)}


@pytest.mark.parametrize("temperature", [None, 3.0])
def test_report_holds_the_bins_of_its_calibration_errors(temperature: float | None) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(200, 6, generator=generator) * 8
    label = torch.randint(0, 6, (200,), generator=generator)
    values = metrics.all_metrics(logits, label, temperature)
    found = values["reliability"]
    parts = {"raw": "ece"} if temperature is None else {"raw": "ece", "scaled": "ece_scaled"}
    assert (found["scaled"] is None) == (temperature is None)
    for part, key in parts.items():
        bins = found[part]
        assert sum(count for _, _, count in bins) == 200
        hits = sum(share * count for _, share, count in bins if count)
        assert hits == pytest.approx(200 * values["accuracy"])
        for number, (confidence, _, count) in enumerate(bins):
            assert confidence is None or number / 15 <= confidence <= (number + 1) / 15
            assert (confidence is None) == (count == 0)
        divided = logits / (1.0 if part == "raw" else temperature)
        assert values[key] == pytest.approx(ece_loop(divided, label, 15), abs=1e-6)
    if temperature is not None:
        assert found["raw"] != found["scaled"]


def test_wilson_interval_against_published_values() -> None:
    # 15 of 20: the interval is [0.531, 0.888] in the usual tables
    low, high = metrics.wilson_interval(0.75, 20)
    assert (round(low, 3), round(high, 3)) == (0.531, 0.888)
    low, high = metrics.wilson_interval(1.0, 10)
    assert high == pytest.approx(1.0)
    assert low == pytest.approx(10 / (10 + 1.959963984540054**2))
    assert metrics.wilson_interval(0.0, 10)[0] == 0.0


def test_temperature_is_recovered_from_overconfident_logits() -> None:
    generator = torch.Generator().manual_seed(1)
    honest = torch.randn(4000, 5, generator=generator, dtype=torch.float64) * 2
    label = torch.multinomial(honest.softmax(1), 1, generator=generator)[:, 0]
    temperature = metrics.fit_temperature(honest * 3, label)
    # the standard error of log T with 4,000 labels is about 0.02; 0.1 is five of them
    assert math.log(temperature / 3) == pytest.approx(0, abs=0.1)
    before, after = (
        metrics.all_metrics(honest * 3, label),
        metrics.all_metrics(honest * 3, label, temperature),
    )
    assert after["nll_scaled"] < before["nll"]
    assert after["ece_scaled"] < before["ece"] / 2
    assert before["nll_scaled"] is None
    assert before["temperature"] is None


def test_temperature_is_the_optimum_of_its_objective() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(50, 4, generator=generator, dtype=torch.float64) * 4
    label = torch.randint(0, 4, (50,), generator=generator)

    def objective(log_t: float) -> float:
        return metrics.nll(logits / math.exp(log_t), label) * 50 + log_t**2 / 2

    found = math.log(metrics.fit_temperature(logits, label))
    grid = min((i / 1000 for i in range(-3000, 3001)), key=objective)
    assert found == pytest.approx(grid, abs=2e-3)  # two steps of the grid


def test_perfect_validation_keeps_a_finite_temperature() -> None:
    logits = torch.eye(6).repeat(4, 1) * 10
    temperature = metrics.fit_temperature(logits, torch.arange(6).repeat(4))
    assert 0.02 < temperature < 1.5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    logits = LOGITS.clone()
    logits[3, 1] = bad
    with pytest.raises(FloatingPointError, match=r"1 of 5 rows are not \(first: row 3\)"):
        metrics.all_metrics(logits, LABEL)
    logits[1, 2] = bad
    with pytest.raises(FloatingPointError, match=r"2 of 5 rows are not \(first: row 1\)"):
        metrics.all_metrics(logits, LABEL)


@pytest.mark.parametrize(
    ("logits", "label", "message"),
    [
        (LOGITS, LABEL[:4], r"\[5, 3\] and \[4\]"),
        (LOGITS, torch.tensor([0, 1, 3, 0, 0]), r"in 0..2, got 0..3"),
        (LOGITS, torch.tensor([0, -1, 2, 0, 0]), r"in 0..2, got -1..2"),
        (LOGITS[:0], LABEL[:0], "no images"),
    ],
)
def test_wrong_tables_are_refused(logits: torch.Tensor, label: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        metrics.all_metrics(logits, label)


def test_a_class_without_images_is_nan_and_outside_the_mean() -> None:
    logits = torch.tensor([[5.0, 0.0, 0.0], [0.0, 5.0, 0.0]])
    values = metrics.all_metrics(logits, torch.tensor([0, 1]))
    assert math.isnan(values["per_class"][2])
    assert values["macro_f1"] == 1.0
    assert values["accuracy"] == 1.0


def test_a_single_class_is_allowed() -> None:
    values = metrics.all_metrics(torch.zeros(3, 1), torch.zeros(3, dtype=torch.long), 1.0)
    assert values["accuracy"] == 1.0
    assert values["nll"] == 0.0
    assert values["ece"] == 0.0
