# SPDX-License-Identifier: Apache-2.0
"""One head, or the average of several: what `vtclip fit --method auto` keeps.

logits = log(sum_i w_i softmax(logits_i / T_i))
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vtclip.heads._check import check_text
from vtclip.heads.zeroshot import ZeroShot


class Auto(nn.Module):
    """Weighted mean of the members' probabilities, each at its own temperature.

    members: for each {"method", "options", "temperature", "weight"}; the weights are brought to a
        sum of 1. None means the zero-shot decision alone.
    The logits are logarithms of probabilities, so that their softmax is the average itself.
    """

    method = "auto"
    needs_spatial = False
    text: Tensor

    def __init__(
        self,
        text: Tensor,
        *,
        members: Sequence[Mapping[str, Any]] = (),
        logit_scale: float = 100.0,
    ) -> None:
        from vtclip.heads import HEADS

        super().__init__()
        check_text("Auto", text)
        self.logit_scale = float(logit_scale)
        self.register_buffer("text", text.detach().clone(memory_format=torch.contiguous_format))
        self.heads = nn.ModuleList()
        self.temperatures: list[float] = []
        self.weights: list[float] = []
        for number, member in enumerate(members):
            name = member["method"]
            if name not in HEADS or name == self.method:
                raise ValueError(f"Auto: member {number} must be another method, got {name!r}")
            self.heads.append(HEADS[name](text, **member["options"]))
            for value, kept in (
                (member["temperature"], self.temperatures),
                (member.get("weight", 1.0), self.weights),
            ):
                if not (math.isfinite(value) and value > 0):
                    raise ValueError(
                        f"Auto: temperature and weight of member {number} must be finite and above "
                        f"0, got {value}"
                    )
                kept.append(float(value))
        if not self.heads:
            self.heads.append(ZeroShot(text, logit_scale=logit_scale))
            self.temperatures, self.weights = [1.0], [1.0]
        self.weights = [weight / sum(self.weights) for weight in self.weights]
        self.needs_spatial = any(bool(head.needs_spatial) for head in self.heads)

    @property
    def num_classes(self) -> int:
        return self.text.shape[0]

    @property
    def members(self) -> list[str]:
        """Their methods."""
        return [str(head.method) for head in self.heads]

    def options(self) -> dict[str, object]:
        """What the constructor needs beside `text`, as plain numbers and strings."""
        every = zip(self.heads, self.temperatures, self.weights, strict=True)
        members = [
            {
                "method": head.method,
                "options": head.options(),  # type: ignore[operator]
                "temperature": temperature,
                "weight": weight,
            }
            for head, temperature, weight in every
        ]
        return {"members": members, "logit_scale": self.logit_scale}

    def forward(
        self, image: Tensor, spatial: Tensor | None = None, spatial_mask: Tensor | None = None
    ) -> Tensor:
        """image [B, C], spatial [B, L, Cs] where a member needs it -> logits [B, K]."""
        parts = []
        every = zip(self.heads, self.temperatures, self.weights, strict=True)
        for head, temperature, weight in every:
            logits = head(image, spatial, spatial_mask) if head.needs_spatial else head(image)
            parts.append((logits.float() / temperature).log_softmax(dim=-1) + math.log(weight))
        return torch.stack(parts).logsumexp(dim=0)
