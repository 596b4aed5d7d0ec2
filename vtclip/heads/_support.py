# SPDX-License-Identifier: Apache-2.0
"""What heads that keep labelled images share: their rows, their checks, their search."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtclip import ops
from vtclip.heads._check import check_image, check_text
from vtclip.support import Support


class SupportHead(nn.Module):
    """text [K, C], and the support: `keys` [N, C] of length 1 with their classes `label` [N].

    num_support: N. The rows are zeros until `fit_support` or a loaded state brings them; without
        any the logits are zero-shot's.
    """

    needs_spatial = False
    text: Tensor
    keys: Tensor
    label: Tensor

    def __init__(self, text: Tensor, *, num_support: int = 0, logit_scale: float = 100.0) -> None:
        super().__init__()
        name = type(self).__name__
        check_text(name, text)
        if num_support < 0:
            raise ValueError(f"{name}: num_support must be at least 0, got {num_support}")
        self.logit_scale = float(logit_scale)
        self.register_buffer("text", text.detach().clone(memory_format=torch.contiguous_format))
        self.register_buffer("keys", text.new_zeros(num_support, text.shape[1]))
        self.register_buffer(
            "label", torch.zeros(num_support, dtype=torch.long, device=text.device)
        )

    @property
    def num_classes(self) -> int:
        return self.text.shape[0]

    def options(self) -> dict[str, Any]:
        """What the constructor needs beside `text`, as plain numbers and strings."""
        return {"num_support": len(self.keys), "logit_scale": self.logit_scale}

    def fit_support(self, support: Support) -> None:
        """Keep the labelled images."""
        self.keys, self.label = self.checked(support)

    def checked(self, support: Support) -> tuple[Tensor, Tensor]:
        """Rows of length 1 in the dtype of `text`, and their labels."""
        name, C = type(self).__name__, self.text.shape[1]
        image, label = support.image, support.label
        if image.ndim != 2 or image.shape[1] != C or label.shape != image.shape[:1]:
            raise ValueError(
                f"{name}: support must be image [N, {C}] and label [N], got {list(image.shape)} "
                f"and {list(label.shape)}"
            )
        if len(label) and not 0 <= int(label.min()) <= int(label.max()) < self.num_classes:
            raise ValueError(
                f"{name}: support labels must lie in 0..{self.num_classes - 1}, "
                f"got {int(label.min())}..{int(label.max())}"
            )
        rows = F.normalize(image.to(self.text), dim=-1)
        return rows, label.to(self.text.device, torch.long)

    def zero_shot(self, image: Tensor) -> Tensor:
        """image [B, C] -> logits [B, K] of the class texts alone."""
        check_image(type(self).__name__, image, self.text)
        return ops.cosine_logits(image, self.text, scale=self.logit_scale)

    def one_hot(self) -> Tensor:
        """Y [N, K] of the support."""
        return F.one_hot(self.label, self.num_classes).to(self.text)


def extended(
    head: SupportHead, text_new: Tensor, support: Support, build: Callable[[Tensor], SupportHead]
) -> SupportHead:
    """`build(all texts)` with the head's own rows and those of new classes K..K+K'-1 after them."""
    text = torch.cat([head.text, text_new.to(head.text)])
    larger = build(text).to(head.text.device)
    image, label = larger.checked(support)
    old = head.num_classes
    if len(label) and int(label.min()) < old:
        raise ValueError(
            f"{type(head).__name__}: support labels of new classes must be {old} or more, "
            f"got {int(label.min())}"
        )
    larger.fit_support(Support(torch.cat([head.keys, image]), torch.cat([head.label, label])))
    return larger


def grid(**values: Sequence[float]) -> Iterator[dict[str, float]]:
    """Every combination, the first name slowest."""
    for row in itertools.product(*values.values()):
        yield dict(zip(values, row, strict=True))


def best(
    choices: Iterator[dict[str, float]],
    logits_of: Callable[[Mapping[str, float]], Tensor],
    label: Tensor,
) -> dict[str, float]:
    """The first choice whose logits [N, K] give the labels [N] the least mean NLL.

    Each choice is taken at the better of a few temperatures, so that it is judged by what it tells
    apart and not by how loud it is. Accuracy would leave most choices of a few images tied.
    """
    found, least = {}, math.inf
    for choice in choices:
        nll = scaled_nll(logits_of(choice), label)
        if nll < least - 1e-9:
            found, least = choice, nll
    return found


TEMPERATURES = (0.35, 0.5, 0.71, 1.0, 1.41, 2.0, 2.83)


def scaled_nll(logits: Tensor, label: Tensor) -> float:
    """The least mean NLL of logits / T over TEMPERATURES, each weighed as by one more image.

    log T has a standard normal prior, as in `metrics.fit_temperature`.
    """
    scores = [
        F.cross_entropy(logits / T, label) + math.log(T) ** 2 / (2 * len(label))
        for T in TEMPERATURES
    ]
    return float(torch.stack(scores).min())


def options_above_zero(head: str, **values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{head}: {name} must be finite and above 0, got {value}")
