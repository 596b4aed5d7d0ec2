# SPDX-License-Identifier: Apache-2.0
"""A frozen text transformer run from token embeddings, and prompts with places for learned vectors.

`TextTower.encode` of the embeddings of a prompt's tokens is the model's encode_text of that
prompt. Two things make it cheaper under a causal mask, and neither changes a feature. The places
after the one that is read are left out: a prompt of 24 tokens costs 24 places, not the model's 77.
And vectors that all classes share before the name are encoded once for many classes, which follow
one another in one row and whose mask hides them from each other.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vtclip.heads._head import TextModel
from vtclip.names import option

# What autograd keeps of the text tower, next to the token embeddings of all classes, is at most
# this: above it classes are taken in chunks, each recomputed in the backward pass.
TOWER_BYTES = 2**30


class Prompts(NamedTuple):
    """The prompts of K classes, c of them in each of R rows of L places (c = 1: one prompt a row).

    ids [R, L]; place [L], which of the model's positions each is; mask [L, L] or None;
    slots [R, lead + c (M - lead)], where the vectors go: the first `lead` once, the others in each
    prompt; read [R, c], where the features are. Prompts beyond K repeat the last one.
    """

    ids: Tensor
    slots: Tensor
    read: Tensor
    place: Tensor
    mask: Tensor | None
    lead: int
    num_classes: int


class TextTower:
    """The text transformer of `clip`, not a module of whatever holds it: its weights stay frozen.

    ValueError where the model's text side is not one of open_clip's own transformers, or is one
    that mixes a class token or a padding mask into its attention.
    """

    def __init__(self, clip: TextModel) -> None:
        tower: Any = getattr(clip.model, "text", clip.model)
        needed = ("token_embedding", "positional_embedding", "transformer", "ln_final")
        self.pool = str(getattr(tower, "pool_type", getattr(tower, "text_pool_type", "none")))
        plain = all(hasattr(tower, name) for name in needed)
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

    def encode(self, embedded: Tensor, read: Tensor, place: Tensor, mask: Tensor | None) -> Tensor:
        """embedded [R, L, W], read [R, c] -> features [R * c, C], not normalised."""
        tower = self._tower
        x = tower.transformer(embedded + tower.positional_embedding[place], attn_mask=mask)
        x = tower.ln_final(x.gather(1, read[..., None].expand(-1, -1, self.width)).flatten(0, 1))
        project = tower.text_projection
        if project is None:
            return x  # type: ignore[no-any-return]
        return project(x) if isinstance(project, nn.Linear) else x @ project  # type: ignore[no-any-return]

    def room(self, class_names: Sequence[str]) -> int:
        """How many learned vectors fit next to the longest class name."""
        return self.context_length - max(len(self._parts(name)) for name in class_names)

    def prompts(
        self, class_names: Sequence[str], M: int, position: str, *, shared: bool = True
    ) -> Prompts:
        """ "V.. name .", "V.. name V.. ." or "name V.. ." with M places V, per class name.

        shared: all classes have the same vectors.
        """
        self._check_read(class_names[0])
        lead = _before(M, position)
        rows = [self._prompt(name, M, lead) for name in class_names]
        causal = self.pool in ("argmax", "eos") and self._tower.attn_mask is not None
        longest = max(len(row) for row, _ in rows)
        if not causal:
            longest = self.context_length
        packed = causal and shared and lead > 0
        P = len(self._start) + lead if packed else 0
        c = self._together(P, longest - P, len(rows)) if packed else 1
        if c == 1:
            P = lead = 0
        return self._laid_out(rows, P, longest - P, c, lead)

    def class_texts(self, context: Tensor, prompts: Prompts) -> Tensor:
        """context [M, W] or [K, M, W] in the places of `prompts` -> unit rows [K, C].

        Differentiable in `context`; memory as TOWER_BYTES says.
        """
        R, c = prompts.read.shape
        first, rest = context[..., : prompts.lead, :], context[..., prompts.lead :, :]
        vectors = torch.cat([first, *[rest] * c], dim=-2).expand(R, -1, -1)
        step = max(1, TOWER_BYTES // self.bytes_kept(prompts.ids.shape[1]))
        chunks = range(0, R, step)
        recompute = torch.is_grad_enabled() and len(chunks) > 1
        texts = []
        for start in chunks:
            rows = slice(start, start + step)
            chunk = prompts._replace(
                ids=prompts.ids[rows], slots=prompts.slots[rows], read=prompts.read[rows]
            )
            if recompute:
                texts.append(checkpoint(self._texts, vectors[rows], chunk, use_reentrant=False))
            else:
                texts.append(self._texts(vectors[rows], chunk))
        return torch.cat(texts)[: prompts.num_classes]

    def bytes_kept(self, L: int) -> int:
        """What autograd keeps of one row of L places: 22 rows of W and two score maps per block."""
        blocks = self._tower.transformer.resblocks
        heads = int(getattr(blocks[0].attn, "num_heads", 1))
        return 4 * len(blocks) * (22 * L * self.width + 2 * heads * L * L)

    def _texts(self, vectors: Tensor, prompts: Prompts) -> Tensor:
        at = prompts.slots[..., None].expand(vectors.shape)
        x = self.embed(prompts.ids).scatter(1, at, vectors)
        return F.normalize(self.encode(x, prompts.read, prompts.place, prompts.mask), dim=-1)

    def _together(self, P: int, S: int, K: int) -> int:
        """How many prompts of S places share P before them, at the least arithmetic per prompt.

        A place costs 24 W^2 in the linear maps and 4 W with each place it meets, so that c prompts
        cost (P + c S) (24 W^2 + 4 W (P + c S)), per prompt least at c = sqrt(6 W P + P^2) / S. The
        prompts are spread evenly over the rows.
        """
        best = max(1, min(K, round(math.sqrt(6 * self.width * P + P * P) / S)))
        return math.ceil(K / math.ceil(K / best))

    def _laid_out(
        self, rows: list[tuple[list[int], list[int]]], P: int, S: int, c: int, lead: int
    ) -> Prompts:
        """`rows` as (ids, slots), c to a row: their first P places once, the other S of each."""
        K = len(rows)
        R = math.ceil(K / c)
        ids = torch.full((R, P + c * S), self._pad)
        slots: list[list[int]] = []
        read = torch.empty(R, c, dtype=torch.long)
        for r in range(R):
            slots.append(rows[0][1][:lead])
            for i in range(c):
                row, free = rows[min(r * c + i, K - 1)]
                ids[r, :P] = torch.tensor(row[:P])
                ids[r, P + i * S : i * S + len(row)] = torch.tensor(row[P:])
                slots[r] = slots[r] + [i * S + at for at in free[lead:]]
                last = {"first": 0, "last": S - 1}.get(self.pool, len(row) - 1)
                read[r, i] = i * S + last
        place = torch.cat([torch.arange(P), torch.arange(P, P + S).repeat(c)])
        mask = self._tower.attn_mask
        if mask is not None:
            block = torch.cat([torch.zeros(P), torch.arange(1, c + 1).repeat_interleave(S)])
            visible = (block == 0) | (block[:, None] == block)
            mask = mask[: P + S, : P + S][place][:, place]
            mask = mask.masked_fill(~visible.to(mask.device), -math.inf)
        at = torch.tensor(slots, dtype=torch.long).view(R, -1)
        ids, at, read, place = (x.to(self.device) for x in (ids, at, read, place))
        return Prompts(ids, at, read, place, mask, lead, K)

    def _parts(self, name: str) -> list[int]:
        return self._start + self.words(f"{_words(name)}.") + self._end

    def _prompt(self, name: str, M: int, before: int) -> tuple[list[int], list[int]]:
        """The ids of one prompt, 0 in its M places, and those places; `before` come before it."""
        whole, alone = self.words(f"{_words(name)}."), self.words(_words(name))
        n = len(alone) if whole[: len(alone)] == alone else len(whole)
        length = len(self._start) + M + len(whole) + len(self._end)
        if length > self.context_length:
            raise ValueError(
                f"learned prompts: {M} vectors and class {name!r} take {length} places, the text "
                f"encoder has {self.context_length}; {option('num_context')} can be at most "
                f"{self.context_length - length + M}"
            )
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


def _before(M: int, position: str) -> int:
    """How many of M vectors come before the class name."""
    return {"end": M, "middle": M // 2, "front": 0}[position]


def _words(name: str) -> str:
    return name.replace("_", " ")


def _without_tail(row: list[int], pad: int) -> list[int]:
    end = len(row)
    while end and row[end - 1] == pad:
        end -= 1
    return row[:end]
