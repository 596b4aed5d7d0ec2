# SPDX-License-Identifier: Apache-2.0
"""`--method auto`: fit several methods on the same shots, and pool what they say.

The pool is log-linear, its weights are those that validation images make likely near a prior
(vtclip.train.pool). Members, prior and strength were chosen by benchmarks/choose_auto.py on images
that neither train nor test.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from vtclip.data.records import Records
from vtclip.data.splits import Split
from vtclip.files import Json
from vtclip.heads import HEADS, Head
from vtclip.heads.auto import Auto
from vtclip.names import option
from vtclip.train import cost, engine, metrics
from vtclip.train.calibration import Decisions
from vtclip.train.fit_head import chosen_without, fifths, fit_head, refit_head
from vtclip.train.pool import PoolWeights, log_probabilities, pool_weights
from vtclip.train.rows import TrainingRows
from vtclip.train.steps import TrainingRun

RULE = "log-linear"  # of a run's config: what fitted it
CANDIDATES = ("zeroshot", "proker", "takl", "clip-adapter", "vtclip")
BUDGET_CANDIDATES = ("tip-adapter-f", "rada")  # where their seconds are allowed
PRIOR = {"zeroshot": 0.5}  # weight before validation speaks; 1 of the others
MAX_FOLDS = 4
REPORTED = ("accuracy", "nll_scaled", "temperature", "count")


class Candidates(NamedTuple):
    """Methods to fit, and those that are left out for the budget with their expected seconds."""

    fitted: list[str]
    left_out: dict[str, float]


def candidates(
    records: Records, split: Split, shots: int, budget: float | None = None
) -> Candidates:
    """The methods that these features and so many seconds allow.

    budget: seconds of one processor, as `vtclip.train.cost` expects them and not as the clock shows
        them, so that a fit is the same on every machine; None: CANDIDATES, whatever they cost, and
        no others. In the order of CANDIDATES and then BUDGET_CANDIDATES each method is taken that
        fits in what is left of it. Zero-shot always is.
    """
    able = [name for name in (*CANDIDATES, *BUDGET_CANDIDATES)
            if records.has_spatial or not HEADS[name].needs_spatial]  # fmt: skip
    if budget is None:
        return Candidates([name for name in able if name not in BUDGET_CANDIDATES], {})
    rows = folds(records, split) if len(split.val) == 0 else []
    taken, left_out, rest = [], {}, budget
    for name in able:
        seconds = sum(cost.expected_seconds(name, records, part, shots) for part in [split, *rows])
        if name == "zeroshot" or seconds <= rest:
            taken.append(name)
            rest -= seconds
        else:
            left_out[name] = seconds
    return Candidates(taken, left_out)


class Judged(NamedTuple):
    """A fitted candidate, and what it says of images that it chose nothing by: [N, K] and [N]."""

    head: Head
    logits: Tensor
    label: Tensor
    seconds: float


def judged_candidate(
    name: str, records: Records, split: Split, shots: int, run: TrainingRun
) -> Judged:
    """The method fitted as it would be by its own name.

    Where there are no validation images, a cross-validation over the shots (`folds`) takes their
    place, and what is kept is then fitted on all of them. N is 0 where there are no folds either.
    """
    started = time.perf_counter()
    named = dataclasses.replace(run, log=partial(_log_member, run, name), checkpoint=None)

    def fitted(rows: Split) -> Head:
        recipe, judged = HEADS[name].recipe(shots), len(rows.val) > 1  # by copies that choose
        return fit_head(name, records, rows, recipe, named, choose=False, solve=not judged)

    head = fitted(split)
    logits, label = torch.empty(0, len(records.class_names)), torch.empty(0, dtype=torch.long)
    if len(split.val):
        head, logits, label = chosen_and_unseen(head, records, split.val, run.device)
    else:
        judged = [chosen_and_unseen(fitted(rows), records, rows.val, run.device)[1:]
                  for rows in folds(records, split)]  # fmt: skip
        if judged:
            logits, label = (torch.cat(column) for column in zip(*judged, strict=True))
    return Judged(head, logits, label, time.perf_counter() - started)


def fit_auto(
    records: Records,
    split: Split,
    shots: int,
    run: TrainingRun,
    budget: float | None = None,
) -> tuple[Auto, list[Json], Decisions | None]:
    """The pool; for each candidate what validation images say of it and what it cost; and the
    pool's decisions on the validation images, which no member's hyper-parameters saw.

    Candidates that `budget` leaves out have "left_out", the seconds expected of them.
    """
    chosen = candidates(records, split, shots, budget)
    every = {name: judged_candidate(name, records, split, shots, run)
             for name in run.each(chosen.fitted, "candidates")}  # fmt: skip
    pool = pooled(every)
    rows: list[Json] = []
    members = []
    for (name, judged), weight in zip(every.items(), pool.weights, strict=True):
        row: Json = {"method": name, "seconds": judged.seconds, "weight": weight}
        if len(judged.label):
            temperature = metrics.fit_temperature(judged.logits, judged.label)
            values = metrics.all_metrics(judged.logits, judged.label, temperature)
            row |= {key: values[key] for key in REPORTED}
        rows.append(row)
        members.append(
            {
                "method": name,
                "options": judged.head.options(),
                "temperature": row.get("temperature", 1.0),
                "weight": weight,
            }
        )
    rows += [{"method": name, "weight": 0.0, "left_out": seconds}
             for name, seconds in chosen.left_out.items()]  # fmt: skip
    head = Auto(
        records.text.to(run.device),
        members=members,
        pool=RULE,
        sharpness=pool.sharpness,
        logit_scale=records.logit_scale,
    )
    for member, judged in zip(head.heads, every.values(), strict=True):
        member.load_state_dict(judged.head.state_dict())
    unseen = unseen_decisions(head, list(every.values())) if len(split.val) else None
    return head.to(run.device).eval(), rows, unseen


def pooled(every: Mapping[str, Judged]) -> PoolWeights:
    """Weights of the candidates, in their order, by what they say of images unseen."""
    label = next(iter(every.values())).label
    logits = {name: judged.logits for name, judged in every.items()}
    log_p = torch.stack([*logits.values()])  # without images nothing is left of it
    if len(label):
        log_p = log_probabilities(logits, label)
    return pool_weights(log_p, label, [PRIOR.get(name, 1.0) for name in every])


def unseen_decisions(head: Auto, every: Sequence[Judged]) -> Decisions:
    """What the pool says of the images that its members were judged by."""
    scaled = [judged.logits.float() / temperature
              for judged, temperature in zip(every, head.temperatures, strict=True)]  # fmt: skip
    return Decisions(head.averaged(scaled), head.evidence(scaled), every[0].label)


def check_budget(budget: float | None, method: str) -> None:
    """Refuse seconds that are no number above 0, or given to a method that has no candidates."""
    if budget is None:
        return
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not budget > 0:
        raise ValueError(f"{option('budget')} must be seconds above 0, got {budget!r}")
    if method != "auto":
        raise ValueError(f"{option('budget')} is for {option('method')} auto, got {method!r}")


def refit_auto(head: Auto, records: Records, index: Tensor, shots: int, run: TrainingRun) -> Auto:
    """The pool with the same members, weights and temperatures, each fitted to rows `index`."""
    fitted, members = [], {member.method: member for member in head.member_heads}
    for name in run.each([*members], "members"):
        member = members[name]
        named = dataclasses.replace(run, log=partial(_log_member, run, member.method))
        recipe = HEADS[member.method].recipe(shots)
        fitted.append(refit_head(member, records, index, recipe, named))
    options = head.options()
    for member_options, fresh in zip(options["members"], fitted, strict=True):
        member_options["options"] = fresh.options()
    average = Auto(records.text.to(run.device), **options)
    for place, fresh in zip(average.heads, fitted, strict=True):
        place.load_state_dict(fresh.state_dict())
    return average.to(run.device).eval()


def _log_member(run: TrainingRun, method: str, row: Mapping[str, object]) -> None:
    run.log({"candidate": method, **row})


def folds(records: Records, split: Split) -> list[Split]:
    """Up to MAX_FOLDS splits of the training rows: each row validates once; none for one shot.

    Rows go round by their order within their class, so that every fold has every class to train on.
    """
    label = records.label[split.train]
    counts = torch.bincount(label)
    order = torch.zeros_like(label)
    for k in counts.nonzero().flatten().tolist():
        order[label == k] = torch.arange(int(counts[k]))
    smallest = int(counts[counts > 0].min()) if len(label) else 0
    number = min(MAX_FOLDS, smallest)
    if number < 2:
        return []
    masks = [(order % number) == i for i in range(number)]
    return [
        dataclasses.replace(split, train=split.train[~mask], val=split.train[mask])
        for mask in masks
    ]


def chosen_and_unseen(
    head: Head, records: Records, val: Tensor, device: torch.device
) -> tuple[Head, Tensor, Tensor]:
    """The head chosen by the rows `val`; logits and labels of them unseen by hyper-parameters.

    A head that chooses by validation images does so for each fifth of them by the others: judged by
    the rows that it chose by, it would look better than it is. One search serves these choices and
    that by all rows. `head` has not chosen yet, and does not here.
    """
    rows = TrainingRows(records, val)
    if not head.chooses or len(val) < 2:
        logits, label = engine.all_logits(head, rows, val, device=device)
        if head.chooses and len(val):
            (head,) = chosen_without(head, records, val, [val[:0]], device)
        return head.eval(), logits, label
    parts = [*fifths(len(val)), val[:0]]  # the last copy chooses by all rows
    said = []
    for copied, part in zip(chosen_without(head, records, val, parts, device), parts, strict=True):
        if len(part):
            said.append(engine.all_logits(copied, rows, val[part], device=device))
    logits, label = (torch.cat(column) for column in zip(*said, strict=True))
    back = torch.cat(parts).argsort()
    return copied.eval(), logits[back], label[back]
