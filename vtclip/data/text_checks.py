# SPDX-License-Identifier: Apache-2.0
"""Warnings of class names that a text encoder can make little of: ids, cut prompts, equal texts."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from vtclip.clip.texts import is_per_class, say_cut
from vtclip.data.class_names import look_like_ids, some
from vtclip.data.featureset import FeatureSet
from vtclip.files import printable
from vtclip.names import option

logger = logging.getLogger(__name__)
SAME = 1 - 1e-6  # cosine of two texts that no image tells apart
ROWS = 1024  # compared at a time


def warn_of_texts(features: FeatureSet, *, encoded: bool = False) -> None:
    """One warning, with counts and examples, of each thing that is wrong with the class texts.

    encoded: the texts were encoded just now, which said itself what was cut.
    """
    fields, texts = features.fields, features.manifest["text"]
    names: list[str] = fields["prompts"] if "prompts" in fields else fields["class_names"]
    if look_like_ids(names) and not is_per_class(fields["templates"][0]):
        logger.warning(
            "most of the %d class names look like ids (%s), which are no words for the text "
            "encoder; give their names with %s",
            len(names), some(names), "--class-names FILE"
            if option("class_names").startswith("-") else "class_names",
        )  # fmt: skip
    if "cut" in texts and not encoded:
        say_cut(logger, texts["cut"], texts["prompts"], texts["context"])
    pairs = same_texts(features.records().text)
    if pairs:
        shown = [f"{printable(names[a])!r} and {printable(names[b])!r}" for a, b in pairs]
        logger.warning(
            "%d pairs of classes have the same text features, so that their texts cannot tell them "
            "apart: %s" if len(pairs) > 1 else "%d pair of classes has the same text features, so "
            "that their texts cannot tell them apart: %s", len(pairs), some(shown),
        )  # fmt: skip


def same_texts(text: Tensor) -> list[tuple[int, int]]:
    """Pairs of rows of text [K, C], of unit length, that point into the same direction."""
    pairs: list[tuple[int, int]] = []
    for start in range(0, len(text), ROWS):
        part = text[start : start + ROWS]
        same = (part @ text.T > SAME).triu(start + 1)
        pairs += [(start + int(a), int(b)) for a, b in torch.nonzero(same).tolist()]
    return pairs
