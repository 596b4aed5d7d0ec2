# SPDX-License-Identifier: Apache-2.0
"""Low-rank changes of the attention weights of both towers: which layers, and how they are added.

    W' = W + scale * B A                  W, W' [C, C] of the queries, keys or values of one layer
                                          A [r, C], B [C, r]

The layers are the self-attentions of open_clip's transformer blocks, nn.MultiheadAttention, whose
in_proj_weight [3 C, C] is the three W one below the other. Sums are taken in float64 in a fixed
order: products of two float32 numbers are exact there, so that every machine gets the same W'.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from vtclip.names import option

PARTS = ("q", "k", "v")  # in the order of in_proj_weight


class Towers(Protocol):
    """What is used of a `vtclip.clip.Clip`."""

    model: nn.Module
    name: str


class LowRank(NamedTuple):
    """Factors "LAYER.q.A" [r, C] and "LAYER.q.B" [C, r], of k and v alike, and their scale.

    LAYER: the name of the layer in the model.
    """

    factors: Mapping[str, Tensor]
    scale: float


def attention_layers(clip: Towers) -> dict[str, nn.MultiheadAttention]:
    """The self-attentions of both towers by name; ValueError where a tower has none."""
    from open_clip.transformer import ResidualAttentionBlock

    layers: dict[str, nn.MultiheadAttention] = {}
    for name, block in clip.model.named_modules():
        if isinstance(block, ResidualAttentionBlock) and not name.startswith("text_decoder."):
            layers[f"{name}.attn"] = block.attn
    towers = {"image": True, "text": False}
    for tower, visual in towers.items():
        if not any(name.startswith("visual.") == visual for name in layers):
            raise ValueError(
                f"{option('lora')}: {clip.name!r} must have transformer blocks of open_clip in "
                f"both towers, its {tower} tower has none"
            )
    return layers


@torch.no_grad()
def add_low_rank(clip: Towers, change: LowRank) -> None:
    """Add the change to the weights of `clip`, in place; ValueError where it does not fit."""
    layers = attention_layers(clip)
    wanted = {f"{name}.{part}.{factor}" for name in layers for part in PARTS for factor in "AB"}
    differ = sorted(wanted ^ set(change.factors))
    if differ:
        raise ValueError(f"low-rank weights do not fit {clip.name!r}: {differ[0]}")
    for name, layer in layers.items():
        weight = layer.in_proj_weight
        for part, rows in zip(PARTS, weight.chunk(3), strict=True):
            A, B = (change.factors[f"{name}.{part}.{factor}"] for factor in "AB")
            if A.ndim != 2 or (B.shape[0], A.shape[1]) != rows.shape or B.shape[1:] != A.shape[:1]:
                shapes = f"{list(A.shape)} and {list(B.shape)}"
                raise ValueError(f"low-rank weights do not fit {clip.name!r}: {name}, got {shapes}")
            total = torch.zeros(rows.shape, dtype=torch.float64)
            for a, b in zip(A.detach().cpu().double(), B.detach().cpu().double().mT, strict=True):
                total += b[:, None] * a
            rows.copy_(rows.cpu().double() + change.scale * total)
