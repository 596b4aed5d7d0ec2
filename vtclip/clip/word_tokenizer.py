# SPDX-License-Identifier: Apache-2.0
"""A word-level tokenizer for the demonstration's CLIP.

Lower-case words without punctuation; a word outside the vocabulary falls into one of a few
`<unk*>` buckets by its checksum, so that two unknown class names usually differ. `<end>` has
the largest id because CLIP text towers read the feature at the position of the largest id.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

PAD, START, END = "<pad>", "<start>", "<end>"
UNKNOWN = tuple(f"<unk{i}>" for i in range(8))

_WORD = re.compile(r"[^\W_]+")


def build_vocab(words: Iterable[str]) -> dict[str, int]:
    """Ids for the special tokens and `words`: pad 0, end the largest."""
    names = [PAD, START, *UNKNOWN, *sorted(set(words)), END]
    return {name: index for index, name in enumerate(names)}


def split_words(text: str) -> list[str]:
    """The lower-case words of `text`; punctuation and underscores separate words."""
    return _WORD.findall(text.lower().replace("'", ""))


class WordTokenizer:
    """Texts to ids [n, context_length], padded with 0; long texts lose their last words."""

    def __init__(self, vocab: dict[str, int], context_length: int = 77) -> None:
        missing = [name for name in (PAD, START, END) if name not in vocab]
        if missing:
            raise ValueError(f"WordTokenizer: vocab must hold {PAD} {START} {END}, lacks {missing}")
        if vocab[END] != max(vocab.values()):
            raise ValueError(
                f"WordTokenizer: vocab[{END!r}] must be the largest id {max(vocab.values())}, "
                f"got {vocab[END]}"
            )
        if context_length < 2:
            raise ValueError(f"WordTokenizer: context_length must be >= 2, got {context_length}")
        self.vocab = dict(vocab)
        self.context_length = context_length
        self._unknown = [vocab[name] for name in UNKNOWN if name in vocab] or [vocab[PAD]]

    def _id(self, word: str) -> int:
        known = self.vocab.get(word)
        if known is not None:
            return known
        return self._unknown[zlib.crc32(word.encode("utf-8", "surrogatepass")) % len(self._unknown)]

    def encode(self, text: str) -> list[int]:
        """Ids of one text with `<start>` and `<end>`, at most `context_length` of them."""
        ids = [self._id(word) for word in split_words(text)][: self.context_length - 2]
        return [self.vocab[START], *ids, self.vocab[END]]

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        rows = [texts] if isinstance(texts, str) else list(texts)
        out = torch.zeros(len(rows), context_length or self.context_length, dtype=torch.long)
        out.fill_(self.vocab[PAD])
        for row, text in enumerate(rows):
            ids = self.encode(text)[: out.shape[1]]
            ids[-1] = self.vocab[END]
            out[row, : len(ids)] = torch.tensor(ids)
        return out
