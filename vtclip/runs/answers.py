# SPDX-License-Identifier: Apache-2.0
"""What `Classifier` says of one image: classes, whether it is unknown, a set with a coverage."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from vtclip.names import option
from vtclip.runs.predictions import Prediction as Prediction
from vtclip.train import conformal

if TYPE_CHECKING:
    from vtclip.runs.adapter import Adapter
    from vtclip.train.conformal import Calibration

UNKNOWN = "unknown"


class Answer(NamedTuple):
    """Of one image: its most probable classes, best first, and what else was asked for, or None.

    unknown: whether it is none of the classes; p_value: the share of images of known classes that
    look as unlike them or more, by the validation images. set: the classes that hold the true one
    with the coverage asked for, best first; all of them, however many `predictions` has.
    """

    predictions: list[Prediction]
    unknown: bool | None = None
    p_value: float | None = None
    set: list[Prediction] | None = None


class Rule:
    """Whether an image is unknown, and which classes its set has, by the scores a run keeps.

    unknown and coverage are as in `Classifier.predict` and `predict_sets`, None where not asked.
    """

    def __init__(self, adapter: Adapter, unknown: float | None, coverage: float | None) -> None:
        self.class_names, self.temperature = adapter.class_names, adapter.temperature
        self.kept: Calibration | None = None
        self.threshold: float | None = None
        self.largest_loss: float | None = None
        if unknown is not None:
            if any(name.casefold() == UNKNOWN for name in self.class_names):
                raise ValueError(
                    f"{option('unknown')}: a class of the run is called {UNKNOWN!r} itself"
                )
            self.kept = _kept(adapter, "unknown")
            self.threshold = conformal.unknown_threshold(self.kept.known, unknown, self.kept.weight)
        if coverage is not None:
            kept = _kept(adapter, "coverage")
            self.largest_loss = conformal.coverage_threshold(kept.loss, coverage, kept.weight)

    def answers(
        self, rows: list[list[Prediction]], logits: Tensor, evidence: Tensor
    ) -> list[Answer]:
        """rows: the best classes of B images; logits and evidence [B, K] of the same."""
        answers = [Answer(row) for row in rows]
        if self.kept is not None and self.threshold is not None:
            scores = conformal.known_score(evidence)
            p_values = conformal.p_values(self.kept.known, scores, self.kept.weight).tolist()
            refused = (scores < self.threshold).tolist()
            answers = [
                answer._replace(unknown=below, p_value=p)
                for answer, below, p in zip(answers, refused, p_values, strict=True)
            ]
        if self.largest_loss is not None:
            losses = conformal.class_losses(logits, self.temperature)
            inside = conformal.prediction_sets(losses, self.largest_loss)
            sets = [self._set(*row) for row in zip(losses, inside, strict=True)]
            answers = [answer._replace(set=row) for answer, row in zip(answers, sets, strict=True)]
        return answers

    def _set(self, losses: Tensor, inside: Tensor) -> list[Prediction]:
        """Of losses [K] the classes that are `inside`, best first."""
        order = losses.argsort(stable=True)[: int(inside.sum())].tolist()
        chosen = zip(order, (-losses[order]).exp().tolist(), strict=True)
        return [Prediction(self.class_names[k], probability) for k, probability in chosen]


def _kept(adapter: Adapter, asked: str) -> Calibration:
    if adapter.features.get("multi_label"):
        raise ValueError(
            f"{option(asked)}: the run has several labels per image, and it takes one only"
        )
    if adapter.calibration is None:
        raise ValueError(
            f"{option(asked)} needs the scores of validation images, and the run holds none: "
            "it had no "
            "such images, was fitted on all of them in the end, was extended, or was written by an "
            "earlier version"
        )
    return adapter.calibration
