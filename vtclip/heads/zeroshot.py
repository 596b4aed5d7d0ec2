# SPDX-License-Identifier: Apache-2.0
"""The frozen model's own decision: logits = s * cos(image, text)."""

import torch
from torch import Tensor, nn

from vtclip import ops
from vtclip.heads._check import check_image, check_text


class ZeroShot(nn.Module):
    """Class texts [K, C] against image features [B, C]; nothing to learn.

    `spatial` and `spatial_mask` are accepted and ignored, so that a loop can call any head alike.
    """

    method = "zeroshot"
    needs_spatial = False
    fixed = True  # learns nothing from labelled images
    text: Tensor

    def __init__(self, text: Tensor, *, logit_scale: float = 100.0) -> None:
        super().__init__()
        check_text("ZeroShot", text)
        self.logit_scale = float(logit_scale)
        self.register_buffer("text", text.detach().clone(memory_format=torch.contiguous_format))

    @property
    def num_classes(self) -> int:
        return self.text.shape[0]

    def options(self) -> dict[str, object]:
        """What the constructor needs beside `text`, as plain numbers and strings."""
        return {"logit_scale": self.logit_scale}

    def forward(
        self, image: Tensor, spatial: Tensor | None = None, spatial_mask: Tensor | None = None
    ) -> Tensor:
        """image [B, C] -> logits [B, K]."""
        check_image("ZeroShot", image, self.text)
        return ops.cosine_logits(image, self.text, scale=self.logit_scale)

    def with_text(self, text: Tensor) -> "ZeroShot":
        """The same decision over other classes [K', C]."""
        return ZeroShot(text.to(self.text), logit_scale=self.logit_scale)
