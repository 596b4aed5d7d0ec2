# SPDX-License-Identifier: Apache-2.0
"""One head, or a pool of several: what `vtclip fit --method auto` keeps.

    mixture      logits = log sum_i w_i softmax(logits_i / T_i)
    log-linear   logits = t sum_i w_i log softmax(logits_i / T_i)

A mixture (linear opinion pool) is as unsure as its members disagree; a log-linear pool (logarithmic
opinion pool, the product of experts of Hinton 2002 with weights) adds their evidence, and t says
how far that evidence is independent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vtclip.heads._contributions import Contributions, zero_shot_alone
from vtclip.heads._head import Head, NewClasses, Options
from vtclip.heads._register import HEADS
from vtclip.heads.zeroshot import ZeroShot

EVERY_CLASS = "every class alike"  # the term of a pool that no difference of classes has
POOLS = ("mixture", "log-linear")


class Auto(Head):
    """A weighted pool of the members' probabilities, each member at its own temperature.

    members: for each {"method", "options", "temperature", "weight"}; the weights are brought to a
        sum of 1. None means the zero-shot decision alone.
    pool: "mixture" or "log-linear", see the module.
    sharpness: t of a log-linear pool; a mixture has none.
    The softmax of the logits is the pool itself; a mixture's logits are its log-probabilities.
    """

    method = "auto"

    def __init__(
        self,
        text: Tensor,
        *,
        members: Sequence[Options] = (),
        pool: str = "mixture",
        sharpness: float = 1.0,
        logit_scale: float = 100.0,
    ) -> None:
        super().__init__(text, logit_scale=logit_scale)
        if pool not in POOLS:
            raise ValueError(f"Auto: pool must be one of {', '.join(POOLS)}, got {pool!r}")
        if not (math.isfinite(sharpness) and sharpness > 0):
            raise ValueError(f"Auto: sharpness must be finite and above 0, got {sharpness}")
        if pool == "mixture" and sharpness != 1:
            raise ValueError(f"Auto: sharpness must be 1 of a mixture, got {sharpness}")
        self.pool, self.sharpness = pool, float(sharpness)
        self.heads = nn.ModuleList()
        self.temperatures: list[float] = []
        self.weights: list[float] = []
        for number, member in enumerate(members):
            name = member["method"]
            if name not in HEADS or name == self.method:
                raise ValueError(f"Auto: member {number} must be another method, got {name!r}")
            self.heads.append(HEADS[name](text, **member["options"]))
            self.temperatures.append(float(member["temperature"]))
            self.weights.append(float(member.get("weight", 1.0)))
            for value in (self.temperatures[-1], self.weights[-1]):
                if not (math.isfinite(value) and value > 0):
                    raise ValueError(
                        f"Auto: temperature and weight of member {number} must be finite and above "
                        f"0, got {value}"
                    )
        if not self.heads:
            self.heads.append(ZeroShot(text, logit_scale=logit_scale))
            self.temperatures, self.weights = [1.0], [1.0]
        total = math.fsum(self.weights)
        if not math.isclose(
            total, 1.0, rel_tol=1e-12
        ):  # what is 1 but for rounding is kept as it is
            self.weights = [weight / total for weight in self.weights]
        self.needs_spatial = any(head.needs_spatial for head in self.member_heads)

    @property
    def member_heads(self) -> list[Head]:
        return [head for head in self.heads if isinstance(head, Head)]

    @property
    def members(self) -> list[str]:
        """Their methods."""
        return [head.method for head in self.member_heads]

    def options(self) -> Options:
        every = zip(self.member_heads, self.temperatures, self.weights, strict=True)
        members = [
            {
                "method": head.method,
                "options": head.options(),
                "temperature": temperature,
                "weight": weight,
            }
            for head, temperature, weight in every
        ]
        return {
            "members": members,
            "pool": self.pool,
            "sharpness": self.sharpness,
            "logit_scale": self.logit_scale,
        }

    def with_new_classes(self, new: NewClasses) -> Auto:
        text = torch.cat([self.text, new.text.to(self.text)])
        heads = [head.with_new_classes(new) for head in self.member_heads]
        options = self.options()
        for member, head in zip(options["members"], heads, strict=True):
            member["options"] = head.options()
        average = type(self)(text, **options)
        for place, head in zip(average.heads, heads, strict=True):
            place.load_state_dict(head.state_dict())
        return average

    def member_logits(
        self, image: Tensor, spatial: Tensor | None = None, spatial_mask: Tensor | None = None
    ) -> list[Tensor]:
        """Logits [B, K] float32 of each member at its temperature."""
        scaled = []
        for head, temperature in zip(self.member_heads, self.temperatures, strict=True):
            logits = head(image, spatial, spatial_mask) if head.needs_spatial else head(image)
            scaled.append(logits.float() / temperature)
        return scaled

    def averaged(self, member_logits: Sequence[Tensor]) -> Tensor:
        """The logits [B, K] of the pool; see `member_logits`."""
        if self.pool == "log-linear":
            parts = [
                self.sharpness * weight * logits.log_softmax(dim=-1)
                for logits, weight in zip(member_logits, self.weights, strict=True)
            ]
            return torch.stack(parts).sum(dim=0)
        log_probs = [
            logits.log_softmax(dim=-1) + math.log(weight)
            for logits, weight in zip(member_logits, self.weights, strict=True)
        ]
        return torch.stack(log_probs).logsumexp(dim=0)

    @property
    def is_sum(self) -> bool:
        """Whether the logits are a sum over members and one number for all classes."""
        return self.pool == "log-linear" or len(self.heads) == 1

    @torch.no_grad()
    def contributions(
        self, image: Tensor, spatial: Tensor | None = None, spatial_mask: Tensor | None = None
    ) -> Contributions:
        """As `Head.contributions`, of a log-linear pool or a single member.

        logits = sum_i t w_i / T_i logits_i - sum_i t w_i log sum_k exp(logits_ik / T_i)

        so that the parts of each member count t w_i / T_i of what they are in it. A member whose
        logits are no sum over training images, or over others than the first such member's, is a
        term under its method's name; the second sum, one number for all classes, is the term "every
        class alike".
        """
        if not self.is_sum:
            fact = "a mixture of several members is no sum over them"
            raise NotImplementedError(f"Auto: contributions: {fact}")
        total = zero_shot_alone(image, image.new_zeros(len(image), self.num_classes), self.text)
        terms: dict[str, Tensor] = {}
        of_keys = False  # whether `total` has the cosines of images as they were

        def add(name: str, values: Tensor) -> None:
            terms[name] = terms[name] + values if name in terms else values

        every = zip(self.member_heads, self.temperatures, self.weights, strict=True)
        for head, temperature, weight in every:
            share = self.sharpness * weight / temperature
            logits = head(image, spatial, spatial_mask) if head.needs_spatial else head(image)
            level = (logits.double() / temperature).logsumexp(dim=1, keepdim=True)
            add(EVERY_CLASS, (-share * temperature * level).expand(logits.shape))
            if not head.has_contributions:
                add(head.method, share * logits.double())
                continue
            parts = head.contributions(image, spatial, spatial_mask)
            if total.sums and parts.sums and not torch.equal(parts.label, total.label):
                add(head.method, share * logits.double())
                continue
            for name, values in parts.terms.items():
                add(name, share * values)
            sums = [*total.sums, *(one._replace(A=share * one.A) for one in parts.sums)]
            if parts.sums and not of_keys:
                total, of_keys = parts, not head.trains_keys
            total = total._replace(sums=sums)
        return total._replace(terms=terms)

    def evidence(self, member_logits: Sequence[Tensor]) -> Tensor:
        """The weighted mean of the members' logits, [B, K].

        Unlike the logits of the pool, which come from probabilities with a sum of 1, it is low for
        an image that is like no class.
        """
        weighted = [
            weight * logits for logits, weight in zip(member_logits, self.weights, strict=True)
        ]
        return torch.stack(weighted).sum(dim=0)

    def forward(
        self, image: Tensor, spatial: Tensor | None = None, spatial_mask: Tensor | None = None
    ) -> Tensor:
        """image [B, C], spatial [B, L, Cs] where a member needs it -> logits [B, K]."""
        return self.averaged(self.member_logits(image, spatial, spatial_mask))
