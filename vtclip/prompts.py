# SPDX-License-Identifier: Apache-2.0
"""A frozen text transformer run from token embeddings, and prompts with places for learned vectors.

`TextTower.encode` of the embeddings of a prompt's tokens is the model's own encode_text of that
prompt. Under a causal mask the positions after the one that is read change nothing and are left
out: a prompt of 24 tokens costs 24 positions, not the model's 77.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from .clip import Clip
    from .data.records import Records

POSITIONS = ("end", "middle", "front")
# What autograd keeps of the text tower, beside the token embeddings of all classes, is at most
# this: above it classes are taken in chunks, each computed again in the backward pass.
BYTE_BUDGET = 2**30


class Prompts(NamedTuple):
    """ids [K, L] of the tokens; slots [K, M], where the learned vectors go; read [K], the place of
    each prompt's feature."""

    ids: Tensor
    slots: Tensor
    read: Tensor


class TextTower:
    """The text transformer of `clip`, not a module of whatever holds it: its weights stay frozen.

    ValueError where the model's text side is not one of open_clip's own transformers, or is one
    that mixes a class token or a padding mask into its attention.
    """

    def __init__(self, clip: Clip) -> None:
        tower: Any = getattr(clip.model, "text", clip.model)
        parts = ("token_embedding", "positional_embedding", "transformer", "ln_final")
        self.pool = str(getattr(tower, "pool_type", getattr(tower, "text_pool_type", "none")))
        plain = all(hasattr(tower, part) for part in parts)
        plain = plain and getattr(tower, "cls_emb", None) is None
        plain = plain and not getattr(tower, "use_pad_mask", False)
        if not plain or self.pool not in ("argmax", "eos", "first", "last"):
            raise ValueError(
                f"learned prompts: model {clip.name!r} must have open_clip's plain text "
                f"transformer, got {type(tower).__name__}"
            )
        self._tower = tower
        self._tokenizer = clip.tokenizer
        self.context_length = int(tower.positional_embedding.shape[0])
        self.width = int(tower.positional_embedding.shape[1])
        self.device = tower.positional_embedding.device
        empty = [int(token) for token in clip.tokenizer([""])[0]]
        self._pad = empty[-1]
        edges = _without_tail(empty, self._pad)
        self._start, self._end = edges[: len(edges) // 2], edges[len(edges) // 2 :]

    def words(self, text: str) -> list[int]:
        """Token ids of `text` without the tokenizer's own start and end."""
        row = [int(token) for token in self._tokenizer([text])[0]]
        row = _without_tail(row, self._pad)
        return row[len(self._start) : len(row) - len(self._end)]

    def embed(self, ids: Tensor) -> Tensor:
        """[..., L] -> [..., L, W]."""
        rows: Tensor = self._tower.token_embedding(ids.to(self.device)).detach()
        return rows

    def encode(self, embedded: Tensor, read: Tensor) -> Tensor:
        """embedded [K, L, W], read [K] -> features [K, C], not normalised."""
        tower, L = self._tower, embedded.shape[1]
        mask = tower.attn_mask
        x = embedded + tower.positional_embedding[:L]
        x = tower.transformer(x, attn_mask=None if mask is None else mask[:L, :L])
        x = tower.ln_final(x[torch.arange(len(x), device=x.device), read])
        project = tower.text_projection
        if project is None:
            return x  # type: ignore[no-any-return]
        return project(x) if isinstance(project, nn.Linear) else x @ project  # type: ignore[no-any-return]

    def room(self, class_names: Sequence[str]) -> int:
        """How many learned vectors fit beside the longest class name."""
        return self.context_length - max(len(self._parts(name)) for name in class_names)

    def prompts(self, class_names: Sequence[str], M: int, position: str) -> Prompts:
        """ "V.. name .", "V.. name V.. ." or "name V.. ." with M places V, per class name."""
        rows, slots, read = [], [], []
        for name in class_names:
            row, free = self._prompt(name, M, position)
            rows.append(row)
            slots.append(free)
            read.append(len(row) - 1)
        L = max(len(row) for row in rows)
        if self.pool in ("first", "last") or self._tower.attn_mask is None:
            L = self.context_length
        if self.pool in ("first", "last"):
            read = [0 if self.pool == "first" else L - 1] * len(rows)
        ids = torch.full((len(rows), L), self._pad)
        for k, row in enumerate(rows):
            ids[k, : len(row)] = torch.tensor(row)
        self._check_read(class_names[0])
        return Prompts(
            ids.to(self.device),
            torch.tensor(slots, device=self.device).view(len(rows), M),
            torch.tensor(read, device=self.device),
        )

    def class_texts(self, context: Tensor, prompts: Prompts) -> Tensor:
        """context [M, W] or [K, M, W] in the places of `prompts` -> unit rows [K, C].

        Differentiable in `context`; memory as BYTE_BUDGET says.
        """
        K, M = prompts.slots.shape
        every = context.expand(K, M, self.width)
        step = max(1, BYTE_BUDGET // self.bytes_kept(prompts.ids.shape[1]))
        chunks = range(0, K, step)
        again = torch.is_grad_enabled() and len(chunks) > 1
        parts = []
        for first in chunks:
            part = Prompts(*(rows[first : first + step] for rows in prompts))
            rows = every[first : first + step]
            if again:
                parts.append(checkpoint(self._texts, rows, part, use_reentrant=False))
            else:
                parts.append(self._texts(rows, part))
        return torch.cat(parts)

    def bytes_kept(self, L: int) -> int:
        """What autograd keeps of one prompt of L tokens: 22 rows and two score maps per block."""
        blocks = self._tower.transformer.resblocks
        heads = int(getattr(blocks[0].attn, "num_heads", 1))
        return 4 * len(blocks) * (22 * L * self.width + 2 * heads * L * L)

    def _texts(self, context: Tensor, prompts: Prompts) -> Tensor:
        at = prompts.slots[..., None].expand(context.shape)
        x = self.embed(prompts.ids).scatter(1, at, context)
        return F.normalize(self.encode(x, prompts.read), dim=-1)

    def _parts(self, name: str) -> list[int]:
        return self._start + self.words(f"{_words(name)}.") + self._end

    def _prompt(self, name: str, M: int, position: str) -> tuple[list[int], list[int]]:
        """The ids of one prompt, 0 in its M places, and those places."""
        whole, alone = self.words(f"{_words(name)}."), self.words(_words(name))
        n = len(alone) if whole[: len(alone)] == alone else len(whole)
        length = len(self._start) + M + len(whole) + len(self._end)
        if length > self.context_length:
            raise ValueError(
                f"learned prompts: {M} vectors and class {name!r} take {length} places, the text "
                f"encoder has {self.context_length}; num_context can be at most "
                f"{self.context_length - length + M}"
            )
        before = {"end": M, "middle": M // 2, "front": 0}[position]
        row = self._start + [0] * before + whole[:n] + [0] * (M - before) + whole[n:] + self._end
        first = len(self._start)
        second = first + before + n
        return row, [*range(first, first + before), *range(second, second + M - before)]

    def _check_read(self, name: str) -> None:
        """The model must read its feature at the prompt's last token."""
        if self.pool in ("first", "last"):
            return
        ids = torch.tensor(self._parts(name))
        end = int(ids.argmax())
        if self.pool == "eos":
            end = int((ids == self._tower.eos_id).int().argmax())
        if end != len(ids) - 1:
            raise ValueError(
                f"learned prompts: the tokenizer's last token must be the one the text encoder "
                f"reads, got place {end} of {len(ids)}"
            )


def text_encoder(records: Records, device: torch.device) -> Clip:
    """The model that made the class texts of `records`, by name and by digest of its weights."""
    from .clip import load_clip

    clip = load_clip(records.info["model_name"], device)
    wanted = records.info.get("digests", {}).get("weights")
    if clip.weights_digest != wanted:
        raise ValueError(
            f"model {clip.name!r} has weights {clip.weights_digest[:12]}, the features were made "
            f"by {str(wanted)[:12]}"
        )
    return clip


def check_text_encoder(method: str, records: Records) -> None:
    """Refuse features without a model for a method that trains through its text encoder."""
    from .heads import HEADS

    if not getattr(HEADS[method], "needs_text_encoder", False):
        return
    if not (records.info.get("model") and records.info.get("model_name")):
        kind = records.info.get("kind")
        what = "an .npz table" if kind == "npz" else "a table of features"
        raise ValueError(
            f"method {method} needs the text encoder, which {what} does not have; give a folder "
            "of images, a data set or a features folder"
        )


def _words(name: str) -> str:
    return name.replace("_", " ")


def _without_tail(row: list[int], pad: int) -> list[int]:
    end = len(row)
    while end and row[end - 1] == pad:
        end -= 1
    return row[:end]
