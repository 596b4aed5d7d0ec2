# SPDX-License-Identifier: Apache-2.0
"""Heads: parameters plus calls to ops; one image record and the class texts in, logits out."""

from typing import Any

from torch import nn

from vtclip.heads.auto import Auto
from vtclip.heads.coop import CoOp
from vtclip.heads.proker import ProKeR
from vtclip.heads.rada import RAda
from vtclip.heads.tip_adapter import TipAdapter, TipAdapterF
from vtclip.heads.vtclip import VTCLIP
from vtclip.heads.zeroshot import ZeroShot

_HEADS: tuple[Any, ...] = (
    VTCLIP,
    RAda,
    TipAdapter,
    TipAdapterF,
    ProKeR,
    CoOp,
    ZeroShot,
    Auto,
)
HEADS: dict[str, type[nn.Module]] = {head.method: head for head in _HEADS}

__all__ = ["HEADS", "Auto", "CoOp", "ProKeR", "TipAdapter", "TipAdapterF", "RAda", "VTCLIP", "ZeroShot"]
