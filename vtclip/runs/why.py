# SPDX-License-Identifier: Apache-2.0
"""Why an image is taken for one class and not for another: what each training image adds to that.

The log-odds of two classes are the difference of their logits at the run's temperature, and that is
a sum over the prompts and the training images (vtclip.heads._contributions):

    log p_a - log p_b  =  prompts + members + shared + sum over rows i

shared: what the training images give to any image. A row counts by how much more it is like the
image than training images are like it; what it gives is positive where it speaks for a.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from vtclip.files import Json, escape, several
from vtclip.heads import HEADS, VTCLIP, Auto, Head
from vtclip.heads._contributions import PROMPTS, Contributions
from vtclip.heads.auto import EVERY_CLASS
from vtclip.names import in_order, index_of
from vtclip.runs.adapter import Adapter
from vtclip.runs.training_images import TrainingImages

if TYPE_CHECKING:
    from vtclip.runs.classifier import Classifier

ALIKE = 1 - 1e-5  # cosine from which features are those of one picture, in float32
IMAGE, TEXT = "image", "prompts"  # kinds of rows


@dataclass(frozen=True)
class Row:
    """A training image, or the prompts of a class as a training row: what it is, what it adds.

    number: among the training images; of prompts their class. label: its class. cosine: with the
    image. nats: what it adds to the log-odds.
    """

    kind: str
    number: int
    name: str
    label: str
    cosine: float
    nats: float


@dataclass(frozen=True)
class Why:
    """The log-odds of class `label` over `other`, in nats, as a sum.

    probability, other_probability: of the two, by the run. terms: name to nats: "prompts", what the
    class texts say by zero-shot; of a pool each member that is no sum; "shared". rows: those that
    weigh most, for `label` and then against it, each largest first. rest: what all others add, and
    rest_images and rest_texts how many those are. temperature: that the logits were divided by.
    notes: what is to be said of it.
    """

    label: str
    other: str
    probability: float
    other_probability: float
    terms: dict[str, float]
    rows: list[Row]
    rest: float
    rest_images: int
    rest_texts: int
    temperature: float
    notes: list[str]

    @property
    def log_odds(self) -> float:
        return sum(self.terms.values()) + sum(row.nats for row in self.rows) + self.rest

    def to_json(self) -> Json:
        """What `vtclip explain --json` prints of it."""
        return {
            "label": self.label,
            "probability": self.probability,
            "other": self.other,
            "other_probability": self.other_probability,
            "log_odds": self.log_odds,
            "temperature": self.temperature,
            "terms": self.terms,
            "rows": [
                {
                    "kind": row.kind,
                    "name": row.name,
                    "label": row.label,
                    "cosine": row.cosine,
                    "log_odds": row.nats,
                }
                for row in self.rows
            ],
            "rest": {
                "images": self.rest_images,
                "prompts": self.rest_texts,
                "log_odds": self.rest,
            },
            "notes": self.notes,
        }


def has_heat_map(adapter: Adapter) -> bool:
    """Whether the run is explained by a heat map alone."""
    return isinstance(adapter.head, VTCLIP)


def check_explainable(adapter: Adapter) -> None:
    """Refuse a run whose log-odds are no sum over training images that could be shown."""
    head = adapter.head
    if "multi_label" in adapter.features:
        raise ValueError(
            "the run has several labels per image, each decided by itself; explain says why one "
            "class is preferred to another"
        )
    whole = not isinstance(head, Auto) or head.is_sum
    if not any(one.has_contributions for one in ([head] if whole else head.member_heads)):
        able = ", ".join(in_order(n for n, kind in HEADS.items() if kind.has_contributions))
        raise ValueError(
            f"method {head.method} cannot be explained, its logits are no sum over training "
            f"images; those of {able} are, and vtclip has a heat map"
        )
    if head.num_classes < 2:
        raise ValueError("the run has one class, which is preferred to no other")


@dataclass(frozen=True)
class Explained:
    """The head that is explained, at which temperature, and what is to be said of that."""

    head: Head
    temperature: float
    notes: list[str]


def explained(adapter: Adapter) -> Explained:
    """The run's head, or of a mixture the heaviest member that is a sum."""
    head, T = adapter.head, adapter.temperature or 1.0
    notes = (
        [] if adapter.temperature else ["the run has no temperature; the logits are as they are"]
    )
    if not isinstance(head, Auto) or head.is_sum:
        return Explained(head, T, notes)
    every = zip(head.weights, head.temperatures, head.member_heads, strict=True)
    able = [member for member in every if member[2].has_contributions]
    weight, T, member = max(able, key=lambda one: one[0])
    return Explained(
        member,
        T,
        [
            f"the run is a mixture of {several(len(head.heads), 'head')}, which is no sum over "
            f"training images; what follows is its heaviest member that is one, {member.method}, "
            f"of weight {weight:.2f}, alone"
        ],
    )


@torch.no_grad()
def explain_choice(
    classifier: Classifier,
    picture: Image.Image,
    images_of: Callable[[list[str]], TrainingImages],
    class_name: str | None = None,
    top: int = 5,
) -> tuple[Why, TrainingImages]:
    """Why `classifier` takes `picture` for `class_name`, by default the predicted class.

    The other class is the most probable of the others. images_of: from the classes of the head's
    training rows to the images that they are. top: rows for and rows against, at most so many each.
    """
    adapter = classifier.adapter
    check_explainable(adapter)
    names = classifier.class_names
    pixels = classifier.clip.preprocess(picture)
    probability = classifier.probabilities(pixels[None])[0]
    a = int(probability.argmax()) if class_name is None else index_of(class_name, names)
    others = probability.clone()
    others[a] = -1.0
    b = int(others.argmax())
    what = explained(adapter)
    image, spatial = classifier.encode(pixels[None])
    parts = what.head.contributions(image, spatial)
    images = images_of([names[k] for k in parts.label.tolist()])
    notes = list(what.notes)
    if images.names is None and len(parts.label):
        notes.append(f"training images have numbers in place of names: {images.why}")
    if images.pseudo_labels:
        notes.append("the run was trained on pseudo-labels: classes of images are zero-shot's")
    keeping = [one for one in what.head.member_heads if getattr(one, "num_support", 0)]
    if keeping and all(one.trains_keys for one in keeping):
        fact = "cosines are with what training made of each image"
        notes.append(f"{keeping[0].method} trains the features of its images; {fact}")
    elif parts.cosine.numel() and float(parts.cosine.max()) > ALIKE:
        row = int(parts.cosine.argmax())
        name = escape(images.name(row, names[int(parts.label[row])]))
        notes.append(f"the run was trained on this image or a copy of it, {name}")
    terms, rows, counts = _parts(parts, a, b, what.temperature)
    listed = [_row(row, nats, parts, images, names) for row, nats in _heaviest(rows, top)]
    shown = sum(row.kind == IMAGE for row in listed)
    return Why(
        label=names[a],
        other=names[b],
        probability=float(probability[a]),
        other_probability=float(probability[b]),
        terms=terms,
        rows=listed,
        rest=float(rows.sum()) - sum(row.nats for row in listed),
        rest_images=counts[0] - shown,
        rest_texts=counts[1] - (len(listed) - shown),
        temperature=what.temperature,
        notes=notes,
    ), images


def _parts(
    parts: Contributions, a: int, b: int, temperature: float
) -> tuple[dict[str, float], Tensor, tuple[int, int]]:
    """Nats of the terms, nats [N + K] of the rows, and how many images and texts these are."""
    terms = {
        name: float(values[0, a] - values[0, b]) / temperature
        for name, values in sorted(parts.terms.items(), key=lambda term: term[0] != PROMPTS)
        if name != EVERY_CLASS
    }
    N, K = len(parts.label), parts.text_cosine.shape[1]
    if parts.sums:
        shared = parts.shared()
        terms["shared"] = float(shared[a] - shared[b]) / temperature
    both = parts.rows([a, b], centred=True)[0].cpu()
    texts = K if any(len(one.A) > N for one in parts.sums) else 0
    return terms, (both[:, 0] - both[:, 1]) / temperature, (N, texts)


def _heaviest(nats: Tensor, top: int) -> list[tuple[int, float]]:
    """Up to `top` rows above 0, largest first, and up to `top` below; the first row wins a tie."""
    order = nats.abs().argsort(descending=True, stable=True).tolist()
    values = nats.tolist()
    above = [(row, values[row]) for row in order if values[row] > 0]
    below = [(row, values[row]) for row in order if values[row] < 0]
    return above[:top] + below[:top]


def _row(
    row: int, nats: float, parts: Contributions, images: TrainingImages, names: Sequence[str]
) -> Row:
    N = len(parts.label)
    if row >= N:
        label = names[row - N]
        cosine = float(parts.text_cosine[0, row - N])
        return Row(TEXT, row - N, f"prompts of class {label}", label, cosine, nats)
    label = names[int(parts.label[row])]
    name = images.name(row, label)
    return Row(IMAGE, row, name, label, float(parts.cosine[0, row]), nats)
