# SPDX-License-Identifier: Apache-2.0
"""A head over more classes: what it was, with the texts and images of new classes beside.

A head can be extended where it has
    extend(text_new, support)      it keeps labelled images, and takes those of the new classes too
    with_text(text)                its parameters do not belong to classes
    with_names(clip, class_names)  nor does its learned prompt, which the text encoder reads
    set_text_views(views)          and nothing to learn: it weighs the texts of several templates
and an average of several heads where each of them can. Without parameters to train the result is
the head that a fit of all classes would give with the same hyper-parameters: exact. With them it is
a warm start that no training followed; its parameters have not seen the new classes. The logits of
RAda and of VT-CLIP for one class depend on the classes shown beside it, so there those of the old
classes change as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .heads import HEADS
from .heads.auto import Auto
from .support import Support

if TYPE_CHECKING:
    from .clip import Clip

DEPEND_ON_OTHERS = ("rada", "vtclip")
WAYS = ("extend", "with_text", "with_names", "set_text_views")


@dataclass(frozen=True)
class NewClasses:
    """text [K', C] and text_views [K', M, C], of each of M templates apart.

    support: images of the new classes for heads that keep them, labels from K on. clip: the text
    encoder, asked for only by heads with a learned prompt.
    """

    class_names: list[str]
    text: Tensor
    text_views: Tensor
    support: Support | None
    clip: Callable[[], Clip]


def check_can(head: Any) -> None:
    """Refuse a head whose parameters belong to its classes, naming the methods that can."""
    for one in _members(head):
        if not _can(type(one)) or getattr(one, "class_specific", False):
            able = ", ".join(name for name, kind in HEADS.items() if kind is Auto or _can(kind))
            holder = "this run of auto averages" if one is not head else "this run is of method"
            raise ValueError(
                f"extend: {holder} {one.method}, whose parameters belong to its classes; methods "
                f"that can be extended: {able}"
            )


def keeps_images(head: Any) -> bool:
    """Whether an extended head takes in labelled images of the new classes."""
    return any(hasattr(one, "extend") for one in _members(head))


def is_exact(head: Any) -> bool:
    """Whether extending gives what fitting all classes with the same hyper-parameters would."""
    return not any(True for _ in head.parameters())


def note_of(head: Any) -> str:
    """One sentence on what the logits of an extended head are."""
    if is_exact(head):
        return "exact: the same head as fitted to all classes with the same hyper-parameters"
    names = [one.method for one in _members(head) if one.method in DEPEND_ON_OTHERS]
    note = "warm start: parameters as trained on the old classes, no training followed"
    if names:
        note += f"; the logits of a class under {' and '.join(names)} depend on the others shown"
    return note


@torch.no_grad()
def extended(head: Any, new: NewClasses) -> Any:
    """The head over its K classes and the K' of `new` behind them, in evaluation mode."""
    text = torch.cat([head.text, new.text.to(head.text)])
    if isinstance(head, Auto):
        larger: Any = _average(head, text, [extended(one, new) for one in head.heads])
    elif hasattr(head, "extend"):
        larger = head.extend(new.text.to(head.text), new.support)
    elif hasattr(head, "with_text"):
        larger = head.with_text(text)
    elif hasattr(head, "with_names"):
        fresh = head.with_names(new.clip(), new.class_names)
        larger = type(head)(torch.cat([head.text, fresh.text]), **head.options())
        larger.load_state_dict({**head.state_dict(), "text": larger.text})
    else:
        larger = _with_views(head, text, new.text_views)
    return larger.to(head.text.device).eval()


def _average(head: Auto, text: Tensor, heads: list[Any]) -> nn.Module:
    options: Any = head.options()
    options["members"] = [
        {**member, "options": one.options()}
        for member, one in zip(options["members"], heads, strict=True)
    ]
    larger = Auto(text, **options)
    for place, one in zip(larger.heads, heads, strict=True):
        place.load_state_dict(one.state_dict())
    return larger


def _with_views(head: Any, text: Tensor, views_new: Tensor) -> nn.Module:
    if views_new.shape[1] != head.views.shape[1]:
        raise ValueError(
            f"extend: the new classes must have texts of {head.views.shape[1]} templates, as the "
            f"run has, got {views_new.shape[1]}"
        )
    larger: Any = type(head)(text, **head.options())
    larger.set_text_views(torch.cat([head.views, views_new.to(head.views)]))
    answer: nn.Module = larger
    return answer


def _members(head: Any) -> list[Any]:
    return list(head.heads) if isinstance(head, Auto) else [head]


def _can(kind: type[nn.Module]) -> bool:
    return any(hasattr(kind, way) for way in WAYS)
