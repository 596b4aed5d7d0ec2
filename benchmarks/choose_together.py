# SPDX-License-Identifier: Apache-2.0
"""How unlabelled images are decided together was chosen: `python benchmarks/choose_together.py SOURCE...`

Fits methods on few-shot draws of each source, decides the images that are judged together
(vtclip.train.transduction), and prints how many points of accuracy each rule gains on the head's
own decisions: by source and shots, the mean of all cells, that of one shot, and the worst cell. A
cell is a source with a number of shots, mean of the draws and of the ways to decide alone (takl,
proker and their pool). Judged are images that neither train nor validate nor test, by draws of
seeds from 101 on; --on test takes the test halves of seeds 1 to 3.

--logits FOLDER: as of benchmarks/choose_auto.py. --batch N decides N judged images at a time, as
`vtclip predict --together` may be given them, with the share and the temperature of all of them;
--classes K takes each batch from K classes alone.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from choose_auto import Draw, Way, draw, judged_rows, log_linear, mean, single
from torch import Tensor

from vtclip.data import open_source
from vtclip.train import metrics, transduction

ALONE: dict[str, Way] = {
    "takl": single("takl"),
    "proker": single("proker"),
    "pool": log_linear({"takl": 1.0, "proker": 1.0}),
}


class Case(NamedTuple):
    """One draw decided by one way: what the head says of validation and of judged images."""

    source: str
    shots: int
    val: Tensor
    judged: Tensor
    at: Draw


def cases(draws: Sequence[Draw]) -> Iterator[Case]:
    for at, way in itertools.product(draws, ALONE.values()):
        val, judged = (rows.double().log_softmax(dim=1) for rows in way(at))
        yield Case(at.source, at.shots, val, judged, at)


Rule = Callable[[Case], Tensor]  # log-probabilities of the judged images


def rule(strength: float, prior: float = 0.5, neighbours: int = transduction.NEIGHBOURS) -> Rule:
    """The mixture of vtclip.train.transduction with another prior of its share."""

    def decide(case: Case) -> Tensor:
        count = len(case.val)
        z = transduction.transduce(
            torch.cat([case.val, case.judged]), torch.cat([case.at.val_image, case.at.image]),
            neighbours,
        )  # fmt: skip
        return mixed(case, z[:count], z[count:], strength, prior)

    return decide


def mixed(case: Case, val: Tensor, judged: Tensor, strength: float, prior: float) -> Tensor:
    temperature = metrics.fit_temperature(val, case.at.val_label)
    val, judged = ((rows / temperature).log_softmax(dim=1) for rows in (val, judged))
    index = case.at.val_label[:, None]
    true = torch.stack([rows.gather(1, index)[:, 0].exp() for rows in (case.val, val)])
    share = likeliest(true, strength, prior)
    both = [(1 - share) * case.judged.exp(), share * judged.exp()]
    return sum(both).log()


def likeliest(true: Tensor, strength: float, prior: float) -> float:
    share = torch.tensor(prior, dtype=torch.float64)
    a, b = true.double().clamp(min=1e-30)
    for _ in range(200):
        mine = (share * b / (share * b + (1 - share) * a)).sum()
        share = (mine + strength * prior) / (len(a) + strength)
    return float(share)
