# SPDX-License-Identifier: Apache-2.0
"""How the rule of `--method auto` was chosen: `python benchmarks/choose_auto.py SOURCE...`

Fits methods on few-shot draws of each source and prints, of each of them and of several ways to
make one decision of them, accuracy and calibration on images that neither train nor validate nor
test. All ways see the validation images only; the test half is never looked at. The draws are those
of seeds from 101 on, so that reported seeds are others.

--logits FOLDER keeps what each method says of each draw, so that another way, or another method
beside the others, needs no second fit; of a method that has changed, its files must be removed.
--on test compares on the test half instead, with seeds 1 to 3: what is reported, not what is chosen
by.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from choose_defaults import CPU, held_out
from torch import Tensor

from vtclip.data import few_shot_split, open_source
from vtclip.data.records import Records
from vtclip.data.splits import UP_TO
from vtclip.heads import HEADS
from vtclip.train import auto, engine, metrics, pool, transduction
from vtclip.train.fit_head import fit_head
from vtclip.train.steps import TrainingRun

MIXED = ("zeroshot", "proker", "tip-adapter-f", "clip-adapter", "rada", "vtclip")
TRUSTED = ("proker", "rada", "vtclip")  # of a mixture, where they have twice the others' prior
Tables = dict[str, Tensor]  # method -> log-probabilities [N, K]


class Said(NamedTuple):
    """What a method says of one draw: of validation images, unseen, and of the images judged."""

    val: Tensor
    judged: Tensor
    seconds: float


class Draw(NamedTuple):
    """One draw: its name, what each method says; labels and features of both kinds of images."""

    source: str
    shots: int
    seed: int
    said: dict[str, Said]
    val_label: Tensor
    label: Tensor
    val_image: Tensor
    image: Tensor


class Score(NamedTuple):
    """Of one way on one draw: accuracy and expected calibration error, in percent."""

    accuracy: float
    ece: float


Way = Callable[[Draw], tuple[Tensor, Tensor]]  # logits of validation and of judged images


def say(name: str, records: Records, shots: int, seed: int, judged: str) -> Said:
    """Fit one method to one draw."""
    started = time.perf_counter()
    split = few_shot_split(records.label, records.names, shots=shots, seed=seed, rule=UP_TO)
    index = judged_rows(records, shots, seed, judged)
    run = TrainingRun(CPU, seed, balanced=True)
    head = fit_head(name, records, split, HEADS[name].recipe(shots), run, choose=False)
    head, val, _ = auto.chosen_and_unseen(head, records, split.val, CPU)
    seconds = time.perf_counter() - started
    logits, _ = engine.all_logits(head, records, index, device=CPU)
    return Said(val, logits, seconds)


def judged_rows(records: Records, shots: int, seed: int, judged: str) -> Tensor:
    split = few_shot_split(records.label, records.names, shots=shots, seed=seed, rule=UP_TO)
    return split.test if judged == "test" else held_out(records, split.train, split.val, split.test)


def draw(args: argparse.Namespace, source: Path, records: Records, shots: int, seed: int) -> Draw:
    """What every method says of one draw, from the folder of logits where it is there."""
    said = {}
    for name in args.methods:
        if HEADS[name].needs_spatial and not records.has_spatial:
            continue
        file = None
        if args.logits is not None:
            images = records.info["digests"]["images"][:12]  # two sources may have one name
            file = args.logits / f"{source.stem}-{images}-{args.on}-{shots}-{seed}-{name}.pt"
        if file is not None and file.exists():
            said[name] = Said(*torch.load(file))
            continue
        said[name] = say(name, records, shots, seed, args.on)
        if file is not None:
            args.logits.mkdir(parents=True, exist_ok=True)
            torch.save(tuple(said[name]), file)
    split = few_shot_split(records.label, records.names, shots=shots, seed=seed, rule=UP_TO)
    index = judged_rows(records, shots, seed, args.on)
    images = [records.batch(rows).image for rows in (split.val, index)]
    labels = [records.label[rows] for rows in (split.val, index)]
    return Draw(source.stem, shots, seed, said, *labels, *images)


def scaled(at: Draw, names: Sequence[str]) -> tuple[Tables, Tables]:
    """Log-probabilities of validation and judged images, each method at its own temperature."""
    val, judged = {}, {}
    for name in names:
        temperature = metrics.fit_temperature(at.said[name].val, at.val_label)
        val[name], judged[name] = (
            (rows.double() / temperature).log_softmax(dim=1) for rows in at.said[name][:2]
        )
    return val, judged


def single(name: str) -> Way:
    def decide(at: Draw) -> tuple[Tensor, Tensor]:
        val, judged = scaled(at, [name])
        return val[name], judged[name]

    return decide


def mixture(names: Sequence[str]) -> Way:
    """The weighted mean of probabilities, with the weights of `mixture_weights`."""

    def decide(at: Draw) -> tuple[Tensor, Tensor]:
        val, judged = scaled(at, [name for name in names if name in at.said])
        weights = mixture_weights(val, at.val_label)
        both = []
        for table in (val, judged):
            logs = [table[name] + math.log(weight) for name, weight in weights.items()]
            both.append(torch.stack(logs).logsumexp(dim=0))
        return both[0], both[1]

    return decide


def mixture_weights(log_p: Mapping[str, Tensor], label: Tensor) -> dict[str, float]:
    """Method to weight w of a mixture, by expectation maximisation, the heaviest four of them.

        max over w  sum_n log sum_i w_i p_i(label_n) + pool.STRENGTH sum_i prior_i log w_i

    prior: 1 of ProKeR, RAda and VT-CLIP and 1/2 of the others, over their sum.
    """
    names = list(log_p)
    prior = torch.tensor([1.0 if name in TRUSTED else 0.5 for name in names]).double()
    prior /= prior.sum()
    every = torch.stack(list(log_p.values()))
    true = every[:, torch.arange(len(label)), label].exp().mT.clamp(min=1e-30)
    weight = prior
    for _ in range(500):
        share = weight * true
        weight = (share / share.sum(dim=1, keepdim=True)).sum(dim=0) + pool.STRENGTH * prior
        weight = weight / weight.sum()
    heaviest = weight.argsort(descending=True, stable=True)[:4].tolist()
    total = float(weight[heaviest].sum())
    return {names[i]: float(weight[i]) / total for i in heaviest}


def log_linear(prior: Mapping[str, float], strength: float = pool.STRENGTH) -> Way:
    """The pool of `vtclip.train.pool` of the methods of a prior."""

    def decide(at: Draw) -> tuple[Tensor, Tensor]:
        names = [name for name in prior if name in at.said]
        val, judged = scaled(at, names)
        found = pool.pool_weights(
            torch.stack(list(val.values())), at.val_label, [prior[name] for name in names], strength
        )
        weights = torch.tensor(found.weights, dtype=torch.float64) * found.sharpness
        both = [
            torch.einsum("m,mnk->nk", weights, torch.stack(list(table.values())))
            for table in (val, judged)
        ]
        return both[0], both[1]

    return decide


def together(way: Way) -> Way:
    """That decision and what the unlabelled images, all judged ones, say of each other."""

    def decide(at: Draw) -> tuple[Tensor, Tensor]:
        log_p, image = torch.cat(way(at)), torch.cat([at.val_image, at.image])
        count = len(at.val_label)
        blend = transduction.blended(log_p, image, torch.arange(count), at.val_label)
        return blend.log_p[:count], blend.log_p[count:]

    return decide


def ways(methods: Sequence[str], subsets: bool) -> Iterator[tuple[str, Way]]:
    """Everything that is compared; with `subsets` the pools of every set of methods too."""
    for name in methods:
        yield name, single(name)
    present = [name for name in MIXED if name in methods]
    yield "mixture", mixture(present)
    without = [name for name in present if name != "rada"]
    yield "mixture without rada", mixture(without)
    learned = [name for name in methods if subsets and name not in ("zeroshot", "vtclip")]
    for count in range(2, len(learned) + 1):
        for names in itertools.combinations(learned, count):
            if "takl" in methods and "takl" not in names:
                continue
            equal = {**dict.fromkeys(names, 1.0), "vtclip": 1.0}
            for share in (0.0, 0.25, 0.5, 1.0) if "zeroshot" in methods else (0.0,):
                prior = {**equal, **({"zeroshot": share} if share else {})}
                title = "pool " + "+".join(names) + (f"+zeroshot*{share:g}" if share else "")
                yield title, log_linear(prior)
    few = {name: auto.PRIOR.get(name, 1.0) for name in auto.CANDIDATES if name in methods}
    yield "auto", log_linear(few)
    for share in (0.25, 1.0, 2.0):
        yield f"auto, zeroshot*{share:g}", log_linear({**few, "zeroshot": share})
    for strength in (5.0, 10.0, 20.0, 40.0, 80.0):
        yield f"auto, strength {strength:g}", log_linear(few, strength)
    yield "auto, together", together(log_linear(few))
    yield "zeroshot, together", together(single("zeroshot"))


def score(way: Way, at: Draw) -> Score:
    _, logits = way(at)
    return Score(100 * metrics.accuracy(logits, at.label), 100 * metrics.ece(logits, at.label))


def table(draws: Sequence[Draw], methods: Sequence[str], top: int, subsets: bool) -> Iterator[str]:
    """Lines: a way's mean accuracy per source and shots, over all, its calibration, its worst loss
    to zero-shot in a column. Methods and mixtures first, then the `top` best pools."""
    columns = list(dict.fromkeys((at.source, at.shots) for at in draws))
    zero = single("zeroshot")
    base = {column: mean([score(zero, at).accuracy for at in draws if at[:2] == column])
            for column in columns}  # fmt: skip
    rows = []
    for name, way in ways(methods, subsets):
        usable = [at for at in draws if name in at.said] if name in methods else list(draws)
        if len(usable) < len(draws) and name in methods:
            continue  # not on every source: no mean to compare
        scores = {column: [score(way, at) for at in draws if at[:2] == column]
                  for column in columns}  # fmt: skip
        cells = [mean([one.accuracy for one in scores[column]]) for column in columns]
        ece = mean([one.ece for column in columns for one in scores[column]])
        worst = min(cell - base[column] for cell, column in zip(cells, columns, strict=True))
        rows.append((name, cells, mean(cells), ece, worst))
    yield f"{'':52}" + "".join(f"{source[-9:]:>10}-{shots:<2}" for source, shots in columns)
    fixed = [row for row in rows if not row[0].startswith("pool")]
    pools = sorted((row for row in rows if row[0].startswith("pool")), key=lambda row: -row[2])
    for name, cells, middle, ece, worst in [*fixed, *pools[:top]]:
        text = "".join(f"{cell:>13.2f}" for cell in cells)
        yield f"{name:<52}{text} mean {middle:.2f} ECE {ece:.2f} worst {worst:+.2f}"


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="+", type=Path)
    parser.add_argument("--methods", nargs="+", default=[*auto.CANDIDATES, *auto.BUDGET_CANDIDATES])
    parser.add_argument("--spatial", action="store_true", help="only rows with spatial features")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--on", choices=["held-out", "test"], default="held-out")
    parser.add_argument("--logits", type=Path, help="folder of what methods said, kept and reused")
    parser.add_argument("--subsets", action="store_true", help="compare all pools, of every set")
    parser.add_argument("--top", type=int, default=20, help="pools to print")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    first = 1 if args.on == "test" else 101
    draws = []
    for source in args.sources:
        records = open_source(source, need_spatial=args.spatial, progress=False)
        for shots, number in itertools.product(args.shots, range(args.draws)):
            if len(judged_rows(records, shots, first + number, args.on)):
                draws.append(draw(args, source, records, shots, first + number))
            else:
                print(
                    f"{source.stem}, {shots} shots, seed {first + number}: no image left to judge"
                )
    for line in table(draws, args.methods, args.top, args.subsets):
        print(line, flush=True)
    for name in args.methods:
        seconds = [at.said[name].seconds for at in draws if name in at.said]
        if seconds:
            print(f"{name:<20} fit {mean(seconds):.2f} s, at most {max(seconds):.2f} s")


if __name__ == "__main__":
    main()
