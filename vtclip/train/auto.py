# SPDX-License-Identifier: Apache-2.0
"""`--method auto`: fit several methods on the same shots, keep what validation images prefer."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from vtclip.data.records import Records
from vtclip.data.splits import Split
from vtclip.files import Json
from vtclip.heads import HEADS, Head
from vtclip.heads.auto import Auto
from vtclip.train import engine, metrics
from vtclip.train.calibration import Decisions
from vtclip.train.fit_head import choose_by, chosen_without, fifths, fit_head, refit_head
from vtclip.train.rows import TrainingRows
from vtclip.train.steps import TrainingRun

CANDIDATES = ("zeroshot", "proker", "tip-adapter-f", "clip-adapter", "rada", "vtclip")
# Chosen by benchmarks/choose_auto.py on images that neither train nor test.
TRUSTED = ("proker", "rada", "vtclip")  # share the weight equally before validation speaks
DOUBTED = 0.5  # of a trusted method's prior weight, for each of the others
STRENGTH = 20.0  # images that the prior weighs as much as
MAX_MEMBERS = 4
MAX_FOLDS = 4
REPORTED = ("accuracy", "nll_scaled", "temperature", "count")


def candidates(records: Records) -> list[str]:
    """The methods that these features allow."""
    able = records.has_spatial
    return [name for name in CANDIDATES if able or not HEADS[name].needs_spatial]


def fit_auto(
    records: Records, split: Split, shots: int, run: TrainingRun
) -> tuple[Auto, list[Json], Decisions | None]:
    """The average; for each candidate what validation images say of it and what it cost; and the
    average's decisions on the validation images, which no member's hyper-parameters saw.

    Every candidate is fitted as it would be by its own name. Where there are no validation images,
    a cross-validation over the shots (`folds`) takes their place, and what it chose is then fitted
    on all of them.
    """

    def fit_candidate(name: str, rows: Split) -> Head:
        def log(row: Mapping[str, object]) -> None:
            run.log({"candidate": name, **row})

        named = dataclasses.replace(run, log=log, checkpoint=None)
        return fit_head(name, records, rows, HEADS[name].recipe(shots), named, choose=False)

    heads: dict[str, Head] = {}
    logits: dict[str, Tensor] = {}
    label = torch.empty(0, dtype=torch.long)
    rows: dict[str, Json] = {}
    for name in candidates(records):
        started = time.perf_counter()
        heads[name] = fit_candidate(name, split)
        judged = []
        for fold in folds(records, split) if len(split.val) == 0 else [split]:
            head = heads[name] if fold is split else fit_candidate(name, fold)
            judged.append(unseen_logits(head, records, fold.val, run.device))
        rows[name] = {"method": name}
        if judged:
            logits[name], label = (torch.cat(column) for column in zip(*judged, strict=True))
            temperature = metrics.fit_temperature(logits[name], label)
            values = metrics.all_metrics(logits[name], label, temperature)
            rows[name] |= {key: values[key] for key in REPORTED}
        choose_by(heads[name], records, split.val, run.device)
        rows[name]["seconds"] = time.perf_counter() - started
    chosen = choose_weights(logits or {name: torch.empty(0, 1) for name in heads}, label)
    for name, row in rows.items():
        row["weight"] = chosen.get(name, 0.0)
    members = [
        {
            "method": name,
            "options": heads[name].options(),
            "temperature": rows[name].get("temperature", 1.0),
            "weight": weight,
        }
        for name, weight in chosen.items()
    ]
    average = Auto(records.text.to(run.device), members=members, logit_scale=records.logit_scale)
    for member, name in zip(average.heads, chosen, strict=True):
        member.load_state_dict(heads[name].state_dict())
    unseen = None
    if len(split.val):
        scaled = [
            logits[name].float() / T for name, T in zip(chosen, average.temperatures, strict=True)
        ]
        unseen = Decisions(average.averaged(scaled), average.evidence(scaled), label)
    return average.to(run.device).eval(), list(rows.values()), unseen


def refit_auto(head: Auto, records: Records, index: Tensor, shots: int, run: TrainingRun) -> Auto:
    """The average with the same members, weights and temperatures, each fitted to rows `index`."""
    fitted = []
    for member in head.member_heads:
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


def unseen_logits(
    head: Head, records: Records, val: Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Logits and labels of the rows `val`, none of which its own hyper-parameters saw.

    A head that chooses by validation images does so for each fifth of them by the
    others: judged by the rows that it chose by, it would look better than it is. `head` has not
    chosen yet, and does not here.
    """
    rows = TrainingRows(records, val)
    logits, label = engine.all_logits(head, rows, val, device=device)
    if not head.chooses or len(val) < 2:
        return logits, label
    parts = fifths(len(val))
    copies = chosen_without(head, records, val, parts, device)
    for copied, part in zip(copies, parts, strict=True):
        logits[part] = engine.all_logits(copied, rows, val[part], device=device)[0]
    return logits, label


def choose_weights(logits: Mapping[str, Tensor], label: Tensor) -> dict[str, float]:
    """Method to weight w: what makes the average most likely, held near a prior.

        max over w  sum_n log sum_i w_i p_i(label_n) + STRENGTH * sum_i prior_i log w_i

    by expectation maximisation, and of the result the MAX_MEMBERS heaviest. logits: of each
    candidate [N, K] on the N validation images, each at the temperature that suits it there
    (metrics.fit_temperature). The prior is what 20 images could outweigh: few validation images
    rank methods badly, and the average of methods that err differently is better than most.
    """
    names = list(logits)
    prior = torch.tensor([1.0 if name in TRUSTED else DOUBTED for name in names]).double()
    prior /= prior.sum()
    true = torch.ones(len(label), len(names), dtype=torch.float64)
    if len(label):
        for i, rows in enumerate(logits.values()):
            log_p = (rows.double() / metrics.fit_temperature(rows, label)).log_softmax(dim=1)
            true[:, i] = log_p.gather(1, label[:, None])[:, 0].exp()
    weight = prior
    for _ in range(500):
        share = weight * true.clamp(min=1e-30)
        weight = (share / share.sum(dim=1, keepdim=True)).sum(dim=0) + STRENGTH * prior
        weight = weight / weight.sum()
    heaviest = weight.argsort(descending=True, stable=True)[:MAX_MEMBERS].tolist()
    total = float(weight[heaviest].sum())
    return {names[i]: float(weight[i]) / total for i in heaviest}
