# SPDX-License-Identifier: Apache-2.0
"""The frozen model's own decision, the baseline of every run: logits = s * cos(image, text)."""

import torch
from torch import Tensor

from vtclip import ops
from vtclip.heads._check import check_image
from vtclip.heads._contributions import Contributions, zero_shot_alone
from vtclip.heads._head import ImageHead


class ZeroShot(ImageHead):
    """Class texts [K, C] against image features [B, C]; nothing to learn.

    `spatial` and `spatial_mask` are accepted and ignored, so that a loop can call any head alike.

    Expected: the accuracy of the model's own zero-shot decision.
    Cost: one matrix product per image.
    Command: vtclip fit SOURCE --method zeroshot --test-fraction 1
    """

    method = "zeroshot"
    multi_label = True
    learns = False
    any_classes = True

    def image_logits(self, image: Tensor) -> Tensor:
        return ops.cosine_logits(image, self.text, scale=self.logit_scale)

    @torch.no_grad()
    def contributions(
        self, image: Tensor, spatial: Tensor | None = None, spatial_mask: Tensor | None = None
    ) -> Contributions:
        check_image("ZeroShot", image, self.text)
        return zero_shot_alone(image, self.image_logits(image), self.text)
