# SPDX-License-Identifier: Apache-2.0
"""Unknown images and prediction sets on real features: `python benchmarks/unknown.py SOURCE...`

Two tables, both over random splits in which every image of a class may train, validate or test.

Unknown: a random half of the classes (of those with enough images) is fitted, the other half is
hidden and shown to the head after it. For every score of vtclip.train.conformal: the area under the
ROC curve of known test images against hidden ones, the share of known test images that are refused
at --rate (at most the rate is promised), and the share of hidden ones that are.

Coverage: all classes are fitted; the share of test images whose set holds their class, and the mean
size of a set. "as seen" takes the validation scores of the finished head, which chose its
hyper-parameters by them; "unseen" those that are kept.

--refit adds the head that was fitted once more on training and validation images, as `vtclip fit`
does of images of one's own: the thresholds stay those of the first head's unseen scores.

The score in use was chosen by seeds from 101 on (--first-seed 101); docs/unknown.md shows seeds
from 1 on.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from vtclip.data import Records, few_shot_split, open_source
from vtclip.data.splits import Split
from vtclip.heads import HEADS, Head
from vtclip.heads.auto import Auto
from vtclip.train import conformal, metrics
from vtclip.train.auto import fit_auto, refit_auto
from vtclip.train.calibration import Decisions, decide, unseen
from vtclip.train.fit_head import choose_by, fit_head, refit_head, refit_rows
from vtclip.train.steps import TrainingRun

CPU = torch.device("cpu")
TEST_FRACTION = 0.4
Z_SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "centred": conformal.known_score,
    "max_logit": conformal.max_logit,
    "energy": conformal.energy,
}


def fitted(
    records: Records, split: Split, method: str, shots: int, seed: int
) -> tuple[Head, Decisions, Decisions]:
    """The head, and its decisions on validation images: as it had not seen them, and as it is."""
    run = TrainingRun(CPU, seed, balanced=True)
    kept: Decisions | None
    if method == "auto":
        head, _, kept = fit_auto(records, split, shots, run)
    else:
        recipe = HEADS[method].recipe(shots)
        head = fit_head(method, records, split, recipe, run, choose=False)
        kept = unseen(head, records, split.val, CPU)
        choose_by(head, records, split.val, CPU)
    seen = decide(head, records, split.val, CPU)
    return head, kept or seen, seen


def refitted(records: Records, split: Split, head: Head, shots: int, seed: int) -> Head:
    """The head fitted once more, on training and validation images."""
    run, rows = TrainingRun(CPU, seed, balanced=True), refit_rows(split)
    if isinstance(head, Auto):
        return refit_auto(head, records, rows, shots, run)
    return refit_head(head, records, rows, HEADS[head.method].recipe(shots), run)


def split_of(records: Records, shots: int, seed: int) -> Split:
    """A split in which the test images differ from seed to seed."""
    names = [f"{seed} {name}" for name in records.names]
    return few_shot_split(records.label, names, shots=shots, seed=seed, test_fraction=TEST_FRACTION)


def scores_of(found: Decisions, records: Records, rows: Tensor, T: float) -> dict[str, Tensor]:
    """Every score of the rows; probability is that at the run's temperature."""
    scores = {name: score(found.evidence) for name, score in Z_SCORES.items()}
    scores["probability"] = conformal.max_log_probability(found.logits.double() / T)
    scores["cosine"] = conformal.max_cosine(records.batch(rows).image, records.text)
    return scores


def auroc(known: Tensor, hidden: Tensor) -> float:
    """The probability that a known image scores higher than a hidden one, ties counted half."""
    ordered = hidden.sort().values
    below = torch.searchsorted(ordered, known) + torch.searchsorted(ordered, known, right=True)
    return float(below.double().mean()) / (2 * len(hidden))


def unknown_rows(
    records: Records, method: str, shots: int, seed: int, rate: float, again: bool
) -> dict[str, list[float]]:
    """Of each score: AUROC, share of known images refused, share of hidden ones refused, rate.

    The rate is `rate` or the least that the validation images allow. again: also of the head after
    `refitted`.
    """
    K = len(records.class_names)
    order = torch.randperm(K, generator=torch.Generator().manual_seed(seed)).tolist()
    known = records.subset_classes(sorted(order[: K // 2]))
    hidden = records.subset_classes(sorted(order[K // 2 :]))
    split, every = split_of(known, shots, seed), torch.arange(len(hidden))
    head, kept, seen = fitted(known, split, method, shots, seed)
    T = metrics.fit_temperature(seen.logits, seen.label)
    val = scores_of(kept, known, split.val, T)
    heads = {"": head}
    if again:
        heads["refit "] = refitted(known, split, head, shots, seed)
    weight = conformal.class_weights(kept.label, known.label)
    least = float(weight.max() / (weight.sum() + weight.max()))
    rate = max(rate, math.ceil(1000 * least) / 1000)
    found = {}
    for label, one in heads.items():
        test = scores_of(decide(one, known, split.test, CPU), known, split.test, T)
        other = scores_of(decide(one, hidden, every, CPU), known_texts(hidden, known), every, T)
        for name, scores in val.items():
            threshold = conformal.unknown_threshold(scores, rate, weight)
            refused = [float((part[name] < threshold).double().mean()) for part in (test, other)]
            found[label + name] = [auroc(test[name], other[name]), *refused, rate]
    return found


def known_texts(hidden: Records, known: Records) -> Records:
    """The hidden images beside the class texts of the known classes, for their cosines."""
    return Records(
        hidden.store,
        class_names=known.class_names,
        text=known.text,
        label=torch.zeros(len(hidden), dtype=torch.long),
        names=hidden.names,
        logit_scale=hidden.logit_scale,
        row=hidden._row,
    )


def coverage_rows(
    records: Records, method: str, shots: int, seed: int, levels: list[float], again: bool
) -> dict[str, list[float]]:
    """For each way to score validation images and each level: coverage and mean size of a set.

    again: also of the head after `refitted`, by the scores "unseen".
    """
    split = split_of(records, shots, seed)
    head, kept, seen = fitted(records, split, method, shots, seed)
    T = metrics.fit_temperature(seen.logits, seen.label)
    ways = [("unseen", kept, head), ("as seen", seen, head)]
    if again:
        ways.append(("refit", kept, refitted(records, split, head, shots, seed)))
    found: dict[str, list[float]] = {}
    for name, val, judge in ways:
        test = decide(judge, records, split.test, CPU)
        losses = conformal.class_losses(test.logits, T)
        scores = conformal.true_losses(conformal.class_losses(val.logits, T), val.label)
        weight = conformal.class_weights(val.label, records.label)
        for level in levels:
            if level > float(weight.sum() / (weight.sum() + weight.max())):
                continue
            threshold = conformal.coverage_threshold(scores, level, weight)
            sets = conformal.prediction_sets(losses, threshold)
            inside = sets.gather(1, test.label[:, None]).double().mean()
            found[f"{name} {level:g}"] = [
                float(inside), float(sets.sum(1).double().mean()), float(len(scores)),
            ]  # fmt: skip
    return found


def mean_of(rows: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    return {
        name: torch.tensor([row[name] for row in rows], dtype=torch.float64).mean(0).tolist()
        for name in rows[0]
    }


def enough(records: Records, shots: int) -> Records:
    """The classes that have `shots` training and 4 validation images beside their test share."""
    counts = torch.bincount(records.label, minlength=len(records.class_names)).tolist()
    rest = [count - math.floor(count * TEST_FRACTION) for count in counts]
    return records.subset_classes([k for k, n in enumerate(rest) if n >= shots + min(shots, 4)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="+", type=Path)
    parser.add_argument("--methods", default="auto,proker,tip-adapter-f,rada,zeroshot")
    parser.add_argument("--shots", default="16,4", help="images per class, with commas")
    parser.add_argument("--seeds", type=int, default=5, help="splits")
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--rate", type=float, default=0.1)
    parser.add_argument("--coverage", default="0.9,0.95", help="levels, with commas")
    parser.add_argument("--only", choices=("unknown", "coverage"))
    parser.add_argument("--refit", action="store_true", help="also the head after a second fit")
    args = parser.parse_args()
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    levels = [float(level) for level in args.coverage.split(",")]
    cells = [
        (source, method, int(shots))
        for source in args.sources
        for method in args.methods.split(",")
        for shots in args.shots.split(",")
    ]
    if args.only != "coverage":
        print(f"unknown, rate {args.rate:g}, {args.seeds} halves: AUROC / known / hidden refused")
    for source, method, shots in cells if args.only != "coverage" else []:
        records = enough(open_source(source).without_spatial(), shots)
        rows = [unknown_rows(records, method, shots, seed, args.rate, args.refit) for seed in seeds]
        shown = [
            f"{name} " + " / ".join(f"{100 * value:.1f}" for value in values[:3])
            for name, values in mean_of(rows).items()
        ]
        used = mean_of(rows)["centred"][3]
        print(f"{source.stem} {method} {shots} at {used:.3g}: {'; '.join(shown)}", flush=True)
    if args.only != "unknown":
        print(f"coverage in percent / mean set size, {args.seeds} splits")
    for source, method, shots in cells if args.only != "unknown" else []:
        records = enough(open_source(source).without_spatial(), shots)
        rows = [coverage_rows(records, method, shots, seed, levels, args.refit) for seed in seeds]
        shown = [
            f"{name} {100 * values[0]:.1f} / {values[1]:.2f}"
            for name, values in mean_of(rows).items()
        ]
        count = int(next(iter(mean_of(rows).values()))[2])
        print(
            f"{source.stem} {method} {shots} ({count} validation): {'; '.join(shown)}", flush=True
        )


if __name__ == "__main__":
    main()
