# SPDX-License-Identifier: Apache-2.0
"""Heads: parameters plus calls to ops; one image record and the class texts in, logits out.

A new method is a file like the others, its import here and its place in `_ALL`; docs/adding.md has
the few lines elsewhere.
"""

from vtclip.heads._head import HEADS as HEADS
from vtclip.heads._head import Head as Head
from vtclip.heads._head import Support as Support
from vtclip.heads.ape import APE as APE
from vtclip.heads.ape import APET as APET
from vtclip.heads.auto import Auto as Auto
from vtclip.heads.autoclip import AutoCLIP as AutoCLIP
from vtclip.heads.calip import CALIP as CALIP
from vtclip.heads.clap import CLAP as CLAP
from vtclip.heads.clip_adapter import ClipAdapter as ClipAdapter
from vtclip.heads.coop import CoOp as CoOp
from vtclip.heads.cross_modal import CrossModal as CrossModal
from vtclip.heads.gda import GDA as GDA
from vtclip.heads.linear_probe import LinearProbe as LinearProbe
from vtclip.heads.lp_plus_plus import LPPlusPlus as LPPlusPlus
from vtclip.heads.mm_adapter import MMAdapter as MMAdapter
from vtclip.heads.proker import ProKeR as ProKeR
from vtclip.heads.prolip import ProLIP as ProLIP
from vtclip.heads.proto_clip import ProtoCLIP as ProtoCLIP
from vtclip.heads.rada import RAda as RAda
from vtclip.heads.takl import TAKL as TAKL
from vtclip.heads.taskres import TaskRes as TaskRes
from vtclip.heads.tip_adapter import TipAdapter as TipAdapter
from vtclip.heads.tip_adapter import TipAdapterF as TipAdapterF
from vtclip.heads.tip_x import TipX as TipX
from vtclip.heads.vtclip import VTCLIP as VTCLIP
from vtclip.heads.zeroshot import ZeroShot as ZeroShot
from vtclip.heads.zs_lp import ZSLP as ZSLP

_ALL: tuple[type[Head], ...] = (
    *(VTCLIP, RAda, TipAdapter, TipAdapterF, ProKeR, TAKL, TipX, ProtoCLIP, CoOp, ClipAdapter),
    *(CrossModal, GDA, LPPlusPlus, TaskRes, ZSLP, CLAP, APE, APET, ProLIP),
    *(LinearProbe, MMAdapter, AutoCLIP, CALIP, ZeroShot, Auto),
)
HEADS.update({head.method: head for head in _ALL})
