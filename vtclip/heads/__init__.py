# SPDX-License-Identifier: Apache-2.0
"""Heads: parameters plus calls to ops; one image record and the class texts in, logits out.

A new method of the package is a file like the others, its import here and its place in `_ALL`;
docs/adding.md has the few lines elsewhere. A method of yours is a subclass of `ImageHead` (image
features [B, C] to logits [B, K]) or of `Head` (spatial features, too) and one line:

    class Centroid(vtclip.heads.ImageHead):
        def __init__(self, text, *, logit_scale=100.0):  # text [K, C], the class texts
            super().__init__(text, logit_scale=logit_scale)
            self.register_buffer("mean", self.text.clone())  # buffers and parameters are saved

        def fit_support(self, support):  # image [N, C] of length 1, label [N]
            one_hot = F.one_hot(support.label, self.num_classes).to(self.text)
            self.mean = F.normalize(one_hot.mT @ support.image + self.text, dim=-1)

        def image_logits(self, image):  # [B, C] -> [B, K]
            return self.logit_scale * F.normalize(image, dim=-1) @ self.mean.mT

    vtclip.register_method("centroid", Centroid)

`HEADS` holds every method by its name. `Head` says what else a head may do: be trained by its
`recipe`, `choose` by validation images, `extend` to new classes, explain its `contributions`.
"""

from vtclip.heads._contributions import Contributions as Contributions
from vtclip.heads._head import Head as Head
from vtclip.heads._head import ImageHead as ImageHead
from vtclip.heads._head import NewClasses as NewClasses
from vtclip.heads._head import Support as Support
from vtclip.heads._head import TextModel as TextModel
from vtclip.heads._register import HEADS as HEADS
from vtclip.heads._register import method_from as method_from
from vtclip.heads._register import register_method as register_method
from vtclip.heads.ape import APE as APE
from vtclip.heads.ape import APET as APET
from vtclip.heads.auto import Auto as Auto
from vtclip.heads.autoclip import AutoCLIP as AutoCLIP
from vtclip.heads.calip import CALIP as CALIP
from vtclip.heads.clap import CLAP as CLAP
from vtclip.heads.clip_adapter import ClipAdapter as ClipAdapter
from vtclip.heads.config import FitConfig as FitConfig
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
HEADS.builtin.update({head.method: head for head in _ALL})
