# SPDX-License-Identifier: Apache-2.0
"""A head over more classes: as it was, with the texts and images of new classes added.

Without parameters to train the result is the head that a fit of all classes would give with the
same hyper-parameters: exact. With them it is a warm start that no training followed; its parameters
have not seen the new classes. `Head.class_specific` says which heads cannot be extended.
"""

from __future__ import annotations

import torch

from vtclip.heads import HEADS, Head
from vtclip.heads._head import NewClasses
from vtclip.heads.auto import Auto

__all__ = ["NewClasses", "check_extendable", "extended", "is_exact", "keeps_images", "note_of"]


def check_extendable(head: Head) -> None:
    """Refuse a head whose parameters belong to its classes, naming the methods that can."""
    for member in _members(head):
        if member.class_specific:
            able = ", ".join(name for name, kind in HEADS.items() if not kind.class_specific)
            holder = "this run of auto averages" if member is not head else "this run is of method"
            raise ValueError(
                f"extend: {holder} {member.method}, whose parameters belong to its classes; "
                f"methods that can be extended: {able}"
            )


def keeps_images(head: Head) -> bool:
    """Whether an extended head takes in labelled images of the new classes."""
    return any(member.keeps_images for member in _members(head))


def is_exact(head: Head) -> bool:
    """Whether extending gives what fitting all classes with the same hyper-parameters would."""
    return not any(True for _ in head.parameters())


def note_of(head: Head) -> str:
    """One sentence on what the logits of an extended head are."""
    if is_exact(head):
        return "exact: the same head as fitted to all classes with the same hyper-parameters"
    names = [member.method for member in _members(head) if member.mixes_classes]
    note = "warm start: parameters as trained on the old classes, no training followed"
    if names:
        note += f"; the logits of a class under {' and '.join(names)} depend on the others shown"
    return note


@torch.no_grad()
def extended(head: Head, new: NewClasses) -> Head:
    """The head over its K classes and the K' of `new` behind them, in evaluation mode."""
    return head.with_new_classes(new).to(head.text.device).eval()


def _members(head: Head) -> list[Head]:
    return head.member_heads if isinstance(head, Auto) else [head]
