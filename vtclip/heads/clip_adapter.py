# SPDX-License-Identifier: Apache-2.0
"""CLIP-Adapter: a bottleneck after the image encoder, blended with what it was given.

    v'     = ratio * relu(W2 relu(W1 v)) + (1 - ratio) * v     no biases, v as the encoder gave it
    logits = s * cos(v', T)

Without biases v' grows with v, so that rows of length 1 and rows as long as an encoder makes them
have the same logits and the same gradients. arXiv 2110.04544, eq. 3, on the image side alone, which
is what its authors released.
"""

from typing import Any

import torch
from torch import Tensor, nn

from vtclip import ops
from vtclip.heads._check import check_image, check_share, check_text


class ClipAdapter(nn.Module):
    """Two matrices C -> C / reduction -> C between image [B, C] and class texts [K, C].

    ratio: share of the adapted feature, in 0..1; at 0 the logits are zero-shot's to the last bit.
    """

    method = "clip-adapter"
    needs_spatial = False
    text: Tensor

    def __init__(
        self, text: Tensor, *, ratio: float = 0.2, reduction: int = 4, logit_scale: float = 100.0
    ) -> None:
        super().__init__()
        check_text("ClipAdapter", text)
        check_share("ClipAdapter", "ratio", ratio)
        if reduction < 1:
            raise ValueError(f"ClipAdapter: reduction must be at least 1, got {reduction}")
        self.ratio = float(ratio)
        self.reduction = int(reduction)
        self.logit_scale = float(logit_scale)
        self.register_buffer("text", text.detach().clone(memory_format=torch.contiguous_format))
        C = text.shape[1]
        width = max(1, C // self.reduction)
        self.down = nn.Linear(C, width, bias=False)
        self.up = nn.Linear(width, C, bias=False)
        self.to(device=text.device, dtype=text.dtype)

    @property
    def num_classes(self) -> int:
        return self.text.shape[0]

    def options(self) -> dict[str, Any]:
        """What the constructor needs beside `text`, as plain numbers and strings."""
        return {name: getattr(self, name) for name in ("ratio", "reduction", "logit_scale")}

    def forward(
        self, image: Tensor, spatial: Tensor | None = None, spatial_mask: Tensor | None = None
    ) -> Tensor:
        """image [B, C] -> logits [B, K]; spatial features are accepted and ignored."""
        check_image("ClipAdapter", image, self.text)
        adapted = self.up(self.down(image).relu()).relu()
        blended = self.ratio * adapted + (1 - self.ratio) * image
        return ops.cosine_logits(blended, self.text, scale=self.logit_scale)

    def with_text(self, text: Tensor) -> "ClipAdapter":
        """A head of the same parameters, copied, over other classes [K', C]."""
        head = ClipAdapter(text.to(self.text), **self.options())
        head.load_state_dict({**self.state_dict(), "text": head.text})
        return head
