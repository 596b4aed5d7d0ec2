# SPDX-License-Identifier: Apache-2.0
"""A head with parameters of its own for every image: [N, ...] stacks, batched products.

A kernel takes any batch, so the attention and the mask run on N * m views at once; only the
projections differ between images, and become one `torch.baddbmm` per matrix.
"""

from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor

from vtclip import ops
from vtclip.heads._head import Head
from vtclip.heads.rada import RAda

# per view and class: tensors of width D that forward keeps and backward computes
ROWS_KEPT = 14
# of every stacked parameter: itself, its gradient, AdamW's two moments
COPIES = 4


def can_stack(head: Head) -> TypeGuard[RAda]:
    """Whether `StackedRAda` takes this head; adapters would make texts differ between images."""
    return isinstance(head, RAda) and not head.adapters


def bytes_per_image(head: RAda, views: int) -> int:
    """About what one image needs for one step on `views` views."""
    K, D = head.text.shape
    numbers = COPIES * sum(p.numel() for p in head.parameters()) + ROWS_KEPT * views * K * D
    return numbers * head.text.element_size()


class StackedRAda:
    """RAda for N images: image [N, m, D], m views of each -> logits [N, m, K].

    `stacks` holds the stacks [N, ...] of the trainable parameters, copies of the head's; `shared`
    the rest as they are. While out.weight is 0 no gradient passes it: the first step's gradient
    of every other parameter but out's is exactly 0. With first_step_only those are not stacked,
    and nothing of them is kept for a backward; `decay` applies weight decay to them.
    """

    def __init__(self, head: RAda, images: int, *, first_step_only: bool = False) -> None:
        self.head = head
        self.num_images = images
        out_only = first_step_only and not bool(head.out.weight.any())
        self.stacks: dict[str, Tensor] = {}
        self.shared: dict[str, Tensor] = {}
        self._unstacked: list[str] = []
        for name, parameter in head.named_parameters():
            value = parameter.detach()
            if parameter.requires_grad and not (out_only and not name.startswith("out.")):
                stack = value.expand(images, *value.shape).clone()
                self.stacks[name] = stack.requires_grad_()
                continue
            self.shared[name] = value
            if parameter.requires_grad:
                self._unstacked.append(name)

    def decay(self, factor: float) -> None:
        """Multiply the trainable parameters that are not stacked, as AdamW does at gradient 0."""
        for name in self._unstacked:
            self.shared[name] = self.shared[name] * factor

    def __call__(self, image: Tensor) -> Tensor:
        head, (N, m) = self.head, image.shape[:2]
        K, D = head.text.shape
        v, t = F.normalize(image, dim=-1), F.normalize(head.text, dim=-1)
        root = head.logit_scale**0.5
        X = ((head.logit_scale * v)[:, :, None] * t).view(N, m * K, D)
        queries: list[Tensor | None] = [None, None]
        if "image" in head.queries:
            queries[0] = self._heads(self._project("image_query", root * v), 1)
        if "text" in head.queries:
            query = self._project("text_query", (root * t)[None])  # [N|1, K, D]
            if len(query) == N > 1 or m == 1:
                query = query[:, None].expand(-1, m, -1, -1).flatten(1, 2)
            queries[1] = self._heads(query, K)
        pairs = self._project("pairs", X)  # [N, m * K, n * D]
        context = ops.rational_attn_packed(
            queries[0],
            queries[1],
            head.of_heads(pairs.view(N * m, K, pairs.shape[2])),
            temperature=head.temperature,
        )
        rows = context.transpose(1, 2).reshape(N, m * K, D)  # heads are inner in memory: a view
        mask = self._project("out", rows).view(N * m, K, D)
        logits = ops.rational_logits(v.flatten(0, 1), t, mask, scale=head.logit_scale)
        return logits.view(N, m, K) + head.logit_bias

    def _project(self, name: str, x: Tensor) -> Tensor:
        """x [N|1, rows, D] -> [N, rows, D], or [1, rows, D] where x and parameters are shared."""
        weight, bias = self._get(f"{name}.weight"), self._get(f"{name}.bias")
        if weight.ndim == bias.ndim + 1 == 2:
            return F.linear(x, weight, bias)
        N = self.num_images
        weight, bias = weight.expand(N, -1, -1), bias.expand(N, -1)
        return torch.baddbmm(bias[:, None], x.expand(N, -1, -1), weight.mT)

    def _get(self, name: str) -> Tensor:
        return self.stacks[name] if name in self.stacks else self.shared[name]

    def _heads(self, x: Tensor, rows: int) -> Tensor:
        """[n, m * rows, D] -> [n * m, H, rows, d], a view."""
        split = x.reshape(-1, rows, self.head.num_heads, x.shape[-1] // self.head.num_heads)
        return split.transpose(1, 2)
