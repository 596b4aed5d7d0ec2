# SPDX-License-Identifier: Apache-2.0
"""Heads: parameters plus calls to ops; one image record and the class texts in, logits out."""

from typing import Any

from torch import nn

from vtclip.heads.auto import Auto
from vtclip.heads.autoclip import AutoCLIP
from vtclip.heads.calip import CALIP
from vtclip.heads.clip_adapter import ClipAdapter
from vtclip.heads.coop import CoOp
from vtclip.heads.linear_probe import LinearProbe
from vtclip.heads.mm_adapter import MMAdapter
from vtclip.heads.proker import ProKeR
from vtclip.heads.proto_clip import ProtoCLIP
from vtclip.heads.rada import RAda
from vtclip.heads.tip_adapter import TipAdapter, TipAdapterF
from vtclip.heads.tip_x import TipX
from vtclip.heads.vtclip import VTCLIP
from vtclip.heads.zeroshot import ZeroShot

_HEADS: tuple[Any, ...] = (
    VTCLIP,
    RAda,
    TipAdapter,
    TipAdapterF,
    ProKeR,
    TipX,
    ProtoCLIP,
    CoOp,
    ClipAdapter,
    LinearProbe,
    MMAdapter,
    AutoCLIP,
    CALIP,
    ZeroShot,
    Auto,
)
HEADS: dict[str, type[nn.Module]] = {head.method: head for head in _HEADS}

__all__ = [
    "Auto",
    "AutoCLIP",
    "CALIP",
    "ClipAdapter",
    "CoOp",
    "HEADS",
    "LinearProbe",
    "MMAdapter",
    "ProKeR",
    "ProtoCLIP",
    "RAda",
    "TipAdapter",
    "TipAdapterF",
    "TipX",
    "VTCLIP",
    "ZeroShot",
]
