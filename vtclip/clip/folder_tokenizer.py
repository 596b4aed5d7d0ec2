# SPDX-License-Identifier: Apache-2.0
"""The tokenizer that lies in a folder: tokenizer.json, or SigLIP's sentencepiece model.

It runs by the small libraries that read these files (tokenizers, sentencepiece), not by all of
transformers.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import string
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vtclip.files import Json

FILES = ("tokenizer.json", "spiece.model", "tokenizer.model")
INSTALL = "pip install 'vtclip[siglip]'"
_CLEANS: dict[str, Callable[[str], str]] = {
    "canonicalize": lambda text: " ".join(
        text.replace("_", " ").lower().translate(str.maketrans("", "", string.punctuation)).split()
    ),
    "lower": str.lower,
    "none": str,
}


class FolderTokenizer:
    """Texts to ids [n, context_length]: cleaned, cut so that the end token stays, then padded.

    facts: what it is, JSON-able and without paths.
    """

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        *,
        context_length: int,
        end: int,
        pad: int,
        clean: str = "none",
        digest: str = "",
    ) -> None:
        self.context_length = context_length
        self._encode, self._end, self._pad, self._clean = encode, end, pad, _CLEANS[clean]
        self.facts: Json = {"vocab_digest": digest, "end": end, "pad": pad, "clean": clean}

    def encode(self, text: str) -> list[int]:
        """Ids of one text, the end token last, of any length."""
        ids = self._encode(self._clean(text))
        return ids if ids and ids[-1] == self._end else [*ids, self._end]

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        rows = [texts] if isinstance(texts, str) else list(texts)
        length = context_length or self.context_length
        out = torch.full((len(rows), length), self._pad, dtype=torch.long)
        for row, text in enumerate(rows):
            ids = self.encode(text)
            if len(ids) > length:
                ids = [*ids[: length - 1], self._end]
            out[row, : len(ids)] = torch.tensor(ids)
        return out


def read_tokenizer(folder: Path, *, context_length: int, vocab_size: int) -> FolderTokenizer | None:
    """The tokenizer in `folder`, or None where it has none; ValueError, in one line, if unusable.

    SigLIP's texts are lowered and lose their punctuation, as it was trained; those of SigLIP 2
    (Gemma's tokenizer) are lowered; CLIP's are left to tokenizer.json.
    """
    present = [folder / name for name in FILES if (folder / name).is_file()]
    if not present:
        return None
    path = next((path for path in present if _library(path) is not None), None)
    if path is None:
        needs = " or ".join(sorted({_NEEDS[path.suffix] for path in present}))
        raise ValueError(
            f"{present[0]} needs the library {needs}, which is not installed: {INSTALL}"
        )
    special = _special_tokens(folder)
    read = _from_json if path.suffix == ".json" else _from_sentencepiece
    try:
        encode, size, end, pad = read(path, special)
    except Exception as error:  # the libraries raise plain Exception
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ValueError(f"{path} is not a readable tokenizer: {reason}") from None
    if size > vocab_size:
        raise ValueError(f"{path} has {size} tokens, the model's vocabulary has {vocab_size}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return FolderTokenizer(
        encode,
        context_length=context_length,
        end=end,
        pad=pad,
        clean=_clean_of(special, path),
        digest=digest,
    )


_NEEDS = {".json": "tokenizers", ".model": "sentencepiece"}


def _library(path: Path) -> object:
    return importlib.util.find_spec(_NEEDS[path.suffix])


def _special_tokens(folder: Path) -> dict[str, str]:
    """tokenizer_class, eos_token and pad_token as the folder's configs name them."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        config = json.loads((folder / name).read_text(encoding="utf-8"))
        for key in ("tokenizer_class", "eos_token", "pad_token"):
            value = config.get(key)
            if isinstance(value, dict):
                value = value.get("content")
            if isinstance(value, str):
                found[key] = value
    return found


def _clean_of(special: dict[str, str], path: Path) -> str:
    kind = special.get("tokenizer_class", "")
    if (
        kind.startswith("Siglip2")
        or kind.startswith("Gemma")
        or special.get("eos_token") == "<eos>"
    ):
        return "lower"
    if kind.startswith("CLIP") or special.get("eos_token") == "<|endoftext|>":
        return "none"
    return (
        "canonicalize" if kind.startswith(("Siglip", "T5")) or path.suffix == ".model" else "none"
    )


_Read = tuple[Callable[[str], list[int]], int, int, int]  # encode, number of tokens, end, pad


def _from_json(path: Path, special: dict[str, str]) -> _Read:
    from tokenizers import Tokenizer as Fast

    fast = Fast.from_file(str(path))
    fast.no_padding()
    fast.no_truncation()

    def identity(*names: str | None) -> int | None:
        ids = (fast.token_to_id(name) for name in names if name)
        return next((found for found in ids if found is not None), None)

    end = identity(special.get("eos_token"), "<|endoftext|>", "</s>", "<eos>")
    if end is None:
        raise ValueError("it names no end token")
    pad = identity(special.get("pad_token"))
    return (
        lambda text: list(fast.encode(text).ids),
        fast.get_vocab_size(),
        end,
        end if pad is None else pad,
    )


def _from_sentencepiece(path: Path, special: dict[str, str]) -> _Read:
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(path))
    end = pieces.eos_id()
    if end < 0:
        raise ValueError("it names no end token")
    pad = pieces.piece_to_id(special["pad_token"]) if "pad_token" in special else end
    return lambda text: list(pieces.encode(text)), pieces.get_piece_size(), end, pad
