# SPDX-License-Identifier: Apache-2.0
"""How images are decided together was chosen by `python benchmarks/choose_together.py SOURCE...`

Fits methods on few-shot draws of each source, decides the images that are judged together with the
validation images (vtclip.train.transduction), and prints how many points of accuracy each rule
gains on what the head says of them one by one: for each source and number of shots, a cell, the
mean of its draws and of three ways to decide alone (takl, proker, their log-linear pool); then the
mean of all cells, that of one shot, the worst cell, and what the negative log-likelihood gains.

Judged are images that neither train nor validate nor test, by draws of seeds from 101 on; --on test
takes the test halves of seeds from 1 on. --logits FOLDER: as of benchmarks/choose_auto.py.

--batch N: what `vtclip predict --together` says of N judged images at a time, without validation
images among them, by the share and the temperature of the fit. --of K draws each batch from K
classes alone, which the rule does not know.
"""

from __future__ import annotations

import argparse
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from choose_auto import Draw, Way, draw, judged_rows, log_linear, mean, single
from torch import Tensor

from vtclip.data import open_source
from vtclip.train import transduction
from vtclip.train.transduction import Weights, fitted_weights, mixed, transduce

ALONE: dict[str, Way] = {
    "takl": single("takl"),
    "proker": single("proker"),
    "pool": log_linear({"takl": 1.0, "proker": 1.0}),
}
METHODS = ("takl", "proker")
STRENGTHS, ENOUGH = (5.0, 20.0, 80.0), (0.0, 8.0, 12.0, 16.0)
BATCHES = 10


class Gain(NamedTuple):
    """Of one rule over deciding one by one: points of accuracy, and nats of likelihood."""

    accuracy: float
    nll: float


def gain(alone: Tensor, together: Tensor, label: Tensor) -> Gain:
    """alone and together: log p [N, K]."""
    hits = [(rows.argmax(dim=1) == label).double().mean() for rows in (together, alone)]
    true = [rows.gather(1, label[:, None]).mean() for rows in (together, alone)]
    return Gain(100 * float(hits[0] - hits[1]), float(true[0] - true[1]))


def rules(at: Draw, way: Way) -> Iterator[tuple[str, Gain]]:
    """What each rule gains on one draw; ENOUGH = 0 takes g = 1 however few images there are."""
    val, judged = (rows.double().log_softmax(dim=1) for rows in way(at))
    count = len(val)
    z = transduce(torch.cat([val, judged]), torch.cat([at.val_image, at.image]))
    usual = transduction.STRENGTH, transduction.ENOUGH
    for strength, enough in itertools.product(STRENGTHS, ENOUGH):
        transduction.STRENGTH, transduction.ENOUGH = strength, enough
        weights = fitted_weights(val, z[:count], at.val_label)
        both = mixed(torch.cat([val, judged]), z, weights)[count:]
        transduction.STRENGTH, transduction.ENOUGH = usual
        yield f"strength {strength:g}, enough {enough:g}", gain(judged, both, at.label)


def batches(at: Draw, way: Way, size: int, classes: int | None) -> Iterator[tuple[str, Gain]]:
    """What `size` images at a time gain by the rule in use, of all classes or of a few."""
    val, judged = (rows.double().log_softmax(dim=1) for rows in way(at))
    z = transduce(torch.cat([val, judged]), torch.cat([at.val_image, at.image]))
    weights: Weights = fitted_weights(val, z[: len(val)], at.val_label)
    generator = torch.Generator().manual_seed(at.seed)
    for _ in range(BATCHES):
        order = torch.randperm(len(at.label), generator=generator)
        if classes is not None:
            few = torch.randperm(judged.shape[1], generator=generator)[:classes]
            order = order[torch.isin(at.label[order], few)]
        rows = order[:size]
        alone = judged[rows]
        both = mixed(alone, transduce(alone, at.image[rows]), weights)
        name = f"{size} at a time" + ("" if classes is None else f" of {classes} classes")
        yield name, gain(alone, both, at.label[rows])


def table(found: dict[str, dict[tuple[str, int], list[Gain]]]) -> Iterator[str]:
    """Lines: of each rule its mean gains, the worst cell, then every cell."""
    for name, cells in found.items():
        accuracy = {cell: mean([one.accuracy for one in gains]) for cell, gains in cells.items()}
        nll = mean([mean([one.nll for one in gains]) for gains in cells.values()])
        first = [value for (_, shots), value in accuracy.items() if shots == 1]
        worst = min(accuracy, key=lambda cell: accuracy[cell])
        yield (
            f"{name:<28} mean {mean(list(accuracy.values())):+.2f}, "
            + (f"1 shot {mean(first):+.2f}, " if first else "")
            + f"worst {accuracy[worst]:+.2f} ({worst[0]}, {worst[1]}), log-likelihood {nll:+.3f}"
        )
        for source in dict.fromkeys(source for source, _ in accuracy):
            row = [f"{shots}: {value:+.2f}" for (one, shots), value in accuracy.items()
                   if one == source]  # fmt: skip
            yield f"    {source:<32} {', '.join(row)}"


def collect(
    args: argparse.Namespace, sources: Sequence[Path]
) -> dict[str, dict[tuple[str, int], list[Gain]]]:
    found: dict[str, dict[tuple[str, int], list[Gain]]] = defaultdict(lambda: defaultdict(list))
    first = 1 if args.on == "test" else 101
    for source in sources:
        records = open_source(source, progress=False)
        for shots, number in itertools.product(args.shots, range(args.draws)):
            if not len(judged_rows(records, shots, first + number, args.on)):
                print(f"{source.stem}, {shots} shots, seed {first + number}: no image to judge")
                continue
            at = draw(args, source, records, shots, first + number)
            for way in ALONE.values():
                gains = rules(at, way) if args.batch is None else batches(
                    at, way, args.batch, args.of
                )  # fmt: skip
                for name, value in gains:
                    found[name][source.stem, shots].append(value)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="+", type=Path)
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--on", choices=["held-out", "test"], default="held-out")
    parser.add_argument("--logits", type=Path, help="folder of what methods said, kept and reused")
    parser.add_argument("--batch", type=int, help="images that are decided at a time")
    parser.add_argument("--of", type=int, metavar="K", help="classes that each batch is drawn from")
    parser.add_argument("--threads", type=int, default=1)
    parser.set_defaults(methods=METHODS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for line in table(collect(args, args.sources)):
        print(line, flush=True)


if __name__ == "__main__":
    main()
