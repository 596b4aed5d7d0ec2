# SPDX-License-Identifier: Apache-2.0
"""Thresholds with a stated error rate: by hand, by simulation, and on real features."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from commands import python
from hypothesis import given, settings
from hypothesis import strategies as st

import vtclip
from vtclip.data.records import Records
from vtclip.data.splits import few_shot_split
from vtclip.heads import HEADS
from vtclip.train import conformal, engine, metrics
from vtclip.train.calibration import decide, unseen
from vtclip.train.conformal import Calibration
from vtclip.train.fit_head import choose_by, fit_head, refit_head, refit_rows
from vtclip.train.steps import TrainingRun

CPU = torch.device("cpu")
ONE_TO_19 = torch.arange(1.0, 20.0)
numbers = st.lists(st.integers(-5, 5), min_size=1, max_size=30).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)


@pytest.mark.parametrize(("rate", "k"), [(0.05, 1), (0.0999, 1), (0.1, 2), (0.5, 10), (0.96, 19)])
def test_the_kth_smallest_score_by_hand(rate, k):
    shuffled = ONE_TO_19[torch.randperm(19)]
    assert conformal.unknown_threshold(shuffled, rate) == k


@pytest.mark.parametrize(("coverage", "k"), [(0.05, 1), (0.5, 10), (0.9, 18), (0.901, 19)])
def test_the_kth_smallest_loss_by_hand(coverage, k):
    assert conformal.coverage_threshold(ONE_TO_19.flip(0), coverage) == k


def test_a_rate_is_the_decimal_number_it_is_written_as():
    """29 of 100, which is 28.999... as a product of floats."""
    assert 0.29 * 100 < 29
    assert conformal.unknown_threshold(torch.arange(1.0, 100.0), 0.29) == 29
    assert 0.07 * 100 > 7
    assert conformal.coverage_threshold(torch.arange(1.0, 100.0), 0.07) == 7


def test_too_few_images_are_counted():
    message = r"unknown must be at least 1/20 = 0.05 with 19 validation images, got 0.049"
    with pytest.raises(ValueError, match=message):
        conformal.unknown_threshold(ONE_TO_19, 0.049)
    message = r"coverage must be at most 19/20 = 0.95 with 19 validation images, got 0.951"
    with pytest.raises(ValueError, match=message):
        conformal.coverage_threshold(ONE_TO_19, 0.951)
    one = torch.tensor([3.0])
    assert conformal.unknown_threshold(one, 0.5) == conformal.coverage_threshold(one, 0.5) == 3
    with pytest.raises(ValueError, match=r"at least 1/2 = 0.5 with 1 validation"):
        conformal.unknown_threshold(one, 0.49)


@pytest.mark.parametrize("value", [0, 1, -0.1, 1.5, math.nan, math.inf])
def test_a_rate_lies_between_0_and_1(value):
    for threshold in (conformal.unknown_threshold, conformal.coverage_threshold):
        with pytest.raises(ValueError, match="must lie between 0 and 1"):
            threshold(ONE_TO_19, value)


def test_wrong_scores_and_kinds_are_named():
    with pytest.raises(TypeError, match="unknown must be a number, got str"):
        conformal.unknown_threshold(ONE_TO_19, "0.1")
    with pytest.raises(ValueError, match="there must be validation images"):
        conformal.unknown_threshold(torch.empty(0), 0.1)
    with pytest.raises(ValueError, match="got NaN"):
        conformal.coverage_threshold(torch.tensor([math.nan]), 0.1)


@settings(deadline=None)
@given(numbers, st.integers(1, 99), st.integers(1, 99))
def test_thresholds_grow_with_the_rate_and_ignore_the_order(scores, first, second):
    low, high = sorted((first / 100, second / 100))
    n = len(scores)
    if low >= 1 / (n + 1):
        a, b = (conformal.unknown_threshold(scores, rate) for rate in (low, high))
        assert a <= b
        assert a == conformal.unknown_threshold(scores.flip(0), low)
    if high <= n / (n + 1):
        a, b = (conformal.coverage_threshold(scores, level) for level in (low, high))
        assert a <= b


@settings(deadline=None)
@given(numbers, numbers, st.integers(1, 99))
def test_an_image_is_unknown_where_its_p_value_is_at_most_the_rate(scores, new, percent):
    """With ties too: the two ways to say it agree."""
    rate = percent / 100
    if rate < 1 / (len(scores) + 1):
        return
    below = new < conformal.unknown_threshold(scores, rate)
    counts = conformal.p_values(scores, new) * (len(scores) + 1)
    share = Fraction(percent, 100) * (len(scores) + 1)
    assert below.tolist() == [round(float(count)) <= share for count in counts]


def test_equal_scores_refuse_nothing_and_cover_everything():
    same = torch.full((30,), 2.5)
    assert not bool((same < conformal.unknown_threshold(same, 0.9)).any())
    sets = conformal.prediction_sets(same[:, None], conformal.coverage_threshold(same, 0.1))
    assert bool(sets.all())


@pytest.mark.parametrize("n", [1, 5, 19, 76])
@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("ties", [False, True])
def test_exchangeable_scores_are_refused_at_the_rate(n, rate, ties):
    """5,000 draws of n calibration scores and a new one, of a skewed distribution."""
    if rate * (n + 1) < 1:
        rate = 0.2 if n == 5 else 0.5
    draws, generator = 5_000, torch.Generator().manual_seed(n)
    scores = torch.randn(draws, n + 1, generator=generator).exp()
    scores = scores.mul(3).round() if ties else scores
    refused = covered = 0
    for row in scores:
        refused += float(row[n]) < conformal.unknown_threshold(row[:n], rate)
        covered += float(row[n]) <= conformal.coverage_threshold(row[:n], 1 - rate)
    spread = 4 * math.sqrt(rate * (1 - rate) / draws)
    assert refused / draws <= rate + spread
    assert covered / draws >= 1 - rate - spread
    if not ties:  # and no better than promised: the promise is exact
        exact = math.floor(Fraction(repr(rate)) * (n + 1)) / (n + 1)
        assert refused / draws == pytest.approx(exact, abs=spread)
        exact = math.ceil(Fraction(repr(1 - rate)) * (n + 1)) / (n + 1)
        assert covered / draws == pytest.approx(exact, abs=spread)


def test_weights_bring_classes_to_their_share_of_the_source():
    """30 images of class 0 and 10 of class 1, of which 2 each validate."""
    every, label = torch.tensor([0] * 30 + [1] * 10), torch.tensor([0, 0, 1, 1])
    weight = conformal.class_weights(label, every)
    assert weight.tolist() == [1.5, 1.5, 0.5, 0.5]
    assert conformal.class_weights(label, label.repeat(7)).tolist() == [1.0] * 4
    scores = torch.tensor([1.0, 2.0, 3.0, 4.0])
    # W = 1.5, S = 4: before s_(1), s_(2), ... are weights of 1.5, 3, 4.5, 5 of 5.5
    assert conformal.unknown_threshold(scores, 0.28, weight) == 1
    assert conformal.unknown_threshold(scores, 0.55, weight) == 2
    assert conformal.unknown_threshold(scores, 0.9, weight) == 3
    assert conformal.unknown_threshold(scores, 0.95, weight) == 4
    with pytest.raises(ValueError, match="least 0.2728 with 4 .* of unequal sizes, got 0.27"):
        conformal.unknown_threshold(scores, 0.27, weight)
    assert conformal.coverage_threshold(scores, 0.27, weight) == 1
    assert conformal.coverage_threshold(scores, 0.54, weight) == 2
    assert conformal.coverage_threshold(scores, 0.72, weight) == 4
    with pytest.raises(ValueError, match="most 0.7272 with 4 .* of unequal sizes, got 0.73"):
        conformal.coverage_threshold(scores, 0.73, weight)
    found = conformal.p_values(scores, torch.tensor([0.0, 1.0, 3.5, 9.0]), weight)
    torch.testing.assert_close(found, torch.tensor([1.5, 3.0, 5.0, 5.5]).double() / 5.5)


@pytest.mark.parametrize("rate", [0.1, 0.3])
def test_classes_of_unequal_size_keep_the_promise(rate):
    """Class 1 has 9 of 10 images and scores lower; as many images of either class validate."""
    generator, refused, covered, plain, draws = torch.Generator().manual_seed(5), 0, 0, 0, 4000
    label = torch.tensor([0] * 10 + [1] * 10)
    weight = conformal.class_weights(label, torch.tensor([0] + [1] * 9))
    for _ in range(draws):
        scores = torch.randn(20, generator=generator).double() - 2.0 * label
        frequent = float(torch.rand((), generator=generator)) < 0.9
        new = float(torch.randn((), generator=generator)) - 2.0 * frequent
        refused += new < conformal.unknown_threshold(scores, rate, weight)
        covered += -new <= conformal.coverage_threshold(-scores, 1 - rate, weight)
        plain += new < conformal.unknown_threshold(scores, rate)
    spread = 4 * math.sqrt(rate * (1 - rate) / draws)
    assert refused / draws <= rate + spread
    assert covered / draws >= 1 - rate - spread
    assert plain / draws > rate + spread  # what the weights are for


def test_scores_and_sets_go_with_the_classes():
    z, order = torch.randn(50, 7) * 5, torch.randperm(7)
    scores = (conformal.known_score, conformal.energy, conformal.max_logit)
    for score in (*scores, conformal.max_log_probability):
        torch.testing.assert_close(score(z[:, order]), score(z))
    losses = conformal.class_losses(z, 2.0)
    sets = conformal.prediction_sets(losses, 1.0)
    assert torch.equal(conformal.prediction_sets(conformal.class_losses(z[:, order], 2.0), 1.0),
                       sets[:, order])  # fmt: skip


def test_a_constant_on_all_logits_of_an_image_is_no_evidence():
    z = torch.randn(20, 5, dtype=torch.float64)
    torch.testing.assert_close(conformal.known_score(z + 7), conformal.known_score(z))
    assert bool((conformal.energy(z + 7) > conformal.energy(z) + 6).all())


def test_a_loss_keeps_apart_what_is_probability_1():
    losses = conformal.class_losses(torch.tensor([[60.0, 0.0], [90.0, 0.0]]))
    assert float(losses[0, 0]) >= float(losses[1, 0])
    assert losses.dtype == torch.float64
    torch.testing.assert_close(
        conformal.class_losses(torch.tensor([[2.0, 4.0]]), 2.0).neg().exp().sum().float(),
        torch.tensor(1.0),
    )


def test_calibrations_are_kept_as_json():
    kept = Calibration(*(torch.rand(5, dtype=torch.float64) for _ in Calibration._fields))
    back = Calibration.from_json(kept.to_json())
    for one, other in zip(kept, back, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=0)
    for change in ({"score": "energy"}, {"images": 4}, {"loss": None}, {"known": [1.0]}):
        with pytest.raises(ValueError, match="calibration must hold the score 'centred'"):
            Calibration.from_json({**kept.to_json(), **change})


def test_a_head_that_chooses_is_judged_by_what_it_did_not_see(records):
    split = few_shot_split(records.label, records.names, shots=4, seed=1)
    head = fit_head("proker", records, split, HEADS["proker"].recipe(4), TrainingRun(CPU, 1),
                    choose=False)  # fmt: skip
    before = {name: value.clone() for name, value in head.state_dict().items()}
    found = unseen(head, records, split.val, CPU)
    assert found is not None
    for name, value in head.state_dict().items():
        assert torch.equal(value, before[name])  # the copies chose, the head did not
    choose_by(head, records, split.val, CPU)
    after, label = engine.all_logits(head, records, split.val, device=CPU)
    assert torch.equal(found.label, label)
    assert not torch.equal(found.logits, after)
    assert unseen(head, records, split.val[:1], CPU) is None
    zero_shot = fit_head("zeroshot", records, split, HEADS["zeroshot"].recipe(4),
                         TrainingRun(CPU, 1))  # fmt: skip
    assert unseen(zero_shot, records, split.val, CPU) is None


def beta_binomial(n: int, a: int, b: int, share: float) -> tuple[int, int]:
    """The central interval of that share, of n draws with a chance that is Beta(a, b)."""

    def log_beta(x: float, y: float) -> float:
        return math.lgamma(x) + math.lgamma(y) - math.lgamma(x + y)

    low = high = None
    total = 0.0
    for x in range(n + 1):
        choose = math.lgamma(n + 1) - math.lgamma(x + 1) - math.lgamma(n - x + 1)
        total += math.exp(choose + log_beta(x + a, n - x + b) - log_beta(a, b))
        low = x if low is None and total >= (1 - share) / 2 else low
        high = x if high is None and total >= 1 - (1 - share) / 2 else high
    assert low is not None
    assert total == pytest.approx(1)
    return low, n if high is None else high


def test_the_interval_of_the_tests_by_hand():
    """Beta(1, 1) chances make every count 0..n equally likely."""
    assert beta_binomial(9, 1, 1, 0.5) == (2, 7)


def check_real_coverage(records: Records, method: str, shots: int) -> None:
    """20 random splits: every count within its 99.99 % interval, their mean within 99.9 %.

    The chance that a set covers is itself random over validation images, Beta(k, n + 1 - k).
    """
    found: dict[tuple[str, float], list[float]] = {}
    n = N = 0
    for seed in range(1, 21):
        names = [f"{seed} {name}" for name in records.names]
        split = few_shot_split(records.label, names, shots=shots, seed=seed, test_fraction=0.4)
        recipe = HEADS[method].recipe(shots)
        head = fit_head(method, records, split, recipe, TrainingRun(CPU, seed), choose=False)
        kept = unseen(head, records, split.val, CPU)
        choose_by(head, records, split.val, CPU)
        val, test = (decide(head, records, rows, CPU) for rows in (split.val, split.test))
        T = metrics.fit_temperature(val.logits, val.label)
        kept = kept or val
        losses = conformal.true_losses(conformal.class_losses(kept.logits, T), kept.label)
        of_test = conformal.true_losses(conformal.class_losses(test.logits, T), test.label)
        n, N = len(split.val), len(split.test)
        for level in (0.9, 0.95):
            inside = of_test <= conformal.coverage_threshold(losses, level)
            found.setdefault(("coverage", level), []).append(int(inside.sum()))
        for rate in (0.05, 0.1):
            known = conformal.known_score(kept.evidence)
            accepted = conformal.known_score(test.evidence) >= conformal.unknown_threshold(
                known, rate
            )
            found.setdefault(("accepted", 1 - rate), []).append(int(accepted.sum()))
    for (what, level), counts in found.items():
        k = math.ceil(round(level * (n + 1), 6))
        low, high = beta_binomial(N, k, n + 1 - k, 0.9999)
        assert all(low <= count <= high for count in counts), (what, level, low, high, counts)
        share = k / (n + 1)
        spread = 3.3 * math.sqrt(share * (1 - share) * (1 / (n + 2) + 1 / N) / len(counts))
        mean = sum(counts) / len(counts) / N
        assert abs(mean - share) <= spread, (what, level, share, mean, spread)


@pytest.mark.parametrize("source", ["whurs19_CLIP_ViT-B-32", "whurs19_CLIP_RN50"])
def test_sets_cover_and_known_images_are_kept_on_satellite_photos(shared_data: Path, source):
    check_real_coverage(vtclip.open_source(shared_data / f"{source}.npz"), "proker", 16)


@pytest.mark.slow
def test_sets_cover_and_known_images_are_kept_on_a_folder_of_photos(shared_data, tmp_path):
    """The bundled model was trained on drawings: a poor model, whose promise holds all the same."""
    records = vtclip.open_source(shared_data / "photos", cache_dir=tmp_path)
    check_real_coverage(records, "proker", 8)


def test_a_second_fit_errs_to_the_safe_side(shared_data):
    """Of 10 splits, by thresholds of the first fit: more of the true classes are in their sets and
    more images of known classes are accepted.
    """
    records = vtclip.open_source(shared_data / "whurs19_CLIP_RN50.npz")
    covered, accepted = ([0, 0], [0, 0])
    for seed in range(1, 11):
        names = [f"{seed} {name}" for name in records.names]
        split = few_shot_split(records.label, names, shots=4, seed=seed, test_fraction=0.4)
        recipe, run = HEADS["proker"].recipe(4), TrainingRun(CPU, seed, balanced=True)
        first = fit_head("proker", records, split, recipe, run, choose=False)
        kept = unseen(first, records, split.val, CPU)
        assert kept is not None
        choose_by(first, records, split.val, CPU)
        second = refit_head(first, records, refit_rows(split), recipe, run)
        losses = conformal.true_losses(conformal.class_losses(kept.logits), kept.label)
        largest = conformal.coverage_threshold(losses, 0.9)
        least = conformal.unknown_threshold(conformal.known_score(kept.evidence), 0.1)
        for place, head in enumerate((first, second)):
            test = decide(head, records, split.test, CPU)
            of_test = conformal.true_losses(conformal.class_losses(test.logits), test.label)
            covered[place] += int((of_test <= largest).sum())
            accepted[place] += int((conformal.known_score(test.evidence) >= least).sum())
    assert covered[1] > covered[0]
    assert accepted[1] > accepted[0]


def test_the_benchmark_of_a_second_fit_prints_its_gain(npz, root):
    words = ["--method", "proker", "--shots", "1,2", "--seeds", "1"]
    done = python(root / "benchmarks" / "refit.py", npz, *words)
    assert done.returncode == 0, done.stderr
    head, one, two, own, every, worst = done.stdout.splitlines()
    assert head.split()[:4] == ["proker", "first", "second", "gain"]
    first, second, gain = (float(cell) for cell in one.split()[2:5])
    assert one.startswith("animals 1 ")
    assert two.startswith("animals 2 ")
    assert abs(first + gain - second) < 0.02
    assert own.split()[2:] == every.split()[2:]
    assert worst.startswith("worst cell ")


def test_the_benchmark_prints_both_tables(npz, root):
    words = ["--methods", "proker", "--shots", "4", "--seeds", "1", "--coverage", "0.8", "--refit"]
    done = python(root / "benchmarks" / "unknown.py", npz, *words)
    assert done.returncode == 0, done.stderr
    unknown, first, coverage, second = done.stdout.splitlines()
    assert "AUROC / known / hidden refused" in unknown
    assert first.startswith("animals proker 4 at 0.112: centred ")
    assert "; probability " in first
    assert "; refit centred " in first
    assert "coverage in percent" in coverage
    assert second.startswith("animals proker 4 (16 validation): unseen 0.8 ")
    assert "; as seen 0.8 " in second
    assert "; refit 0.8 " in second
