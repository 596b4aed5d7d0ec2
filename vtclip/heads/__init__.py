# SPDX-License-Identifier: Apache-2.0
"""Heads: parameters plus calls to ops; one image record and the class texts in, logits out."""

from torch import nn

from vtclip.heads.auto import Auto
from vtclip.heads.rada import RAda
from vtclip.heads.vtclip import VTCLIP
from vtclip.heads.zeroshot import ZeroShot

HEADS: dict[str, type[nn.Module]] = {head.method: head for head in (VTCLIP, RAda, ZeroShot, Auto)}

__all__ = ["HEADS", "Auto", "RAda", "VTCLIP", "ZeroShot"]
