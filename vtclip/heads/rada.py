# SPDX-License-Identifier: Apache-2.0
"""RAda: a learned mask over the product of image and text features.

    R[b,k] = v[b] * T[k]                           X = s * R              (v, T of length 1)
    M      = out(mean_x A_x @ value(X))            A_x: ops.rational_attn, keys key(X)
    logits = s * sum_d relu(1 + M) * R + bias      penalty: ops.rational_head

The queries x are image_query(sqrt(s) v), text_query(sqrt(s) T) and pair_query(X). The image query
is one row per image and the text queries are one set for all images, so they are projected once;
the released layer repeats both to [B, K, D] first. `out` starts at 0, which makes the logits those
of zero-shot. The logits of one class depend on the classes shown beside it. arXiv 2507.15480.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vtclip import ops
from vtclip.heads._check import check_image, check_text
from vtclip.ops.rational_head import Penalty, RationalLogits

QUERIES = ("image", "text", "pair")
PENALTIES = get_args(Penalty)
# the released layer's names of the same parameters
RELEASED = {
    "q_proj1": "image_query",
    "q_proj2": "text_query",
    "q_proj3": "pair_query",
    "k_proj": "key",
    "v_proj": "value",
    "out_proj": "out",
}
TINY = 1e-12  # lengths below it count as 0, as in F.normalize
# Intermediate results of all images are kept for the backward up to this many bytes; above it
# images are taken in chunks below it, and each chunk's results are made again in its backward.
BYTE_BUDGET = 2**30
# tensors of [B, K, D] kept: products, pair queries, keys, values, two parts of the context, context
ROWS_KEPT = 7


class RAda(nn.Module):
    """Mask over the element-wise product of image [B, D] and class texts [K, D].

    text: [K, D], a buffer; brought to length 1 inside, as the images are.
    temperature: divides the scores before the joint softmax.
    queries: which of "image", "text", "pair" ask; only these have parameters.
    penalty: what `forward_with_penalty` measures: "none", "l1", "mse" or "linf".
    logit_bias: added to every logit, as SigLIP's.
    adapters: a bottleneck adapter on either side first, x + up(relu(down(x))) with down D -> D/4
        and up starting at 0. The released one has another relu after `up`: its slope at 0 is 0, so
        that an adapter which starts at 0 would stay there.

    Features are not searched for NaN or zeros (that would cost a device synchronisation): a NaN
    makes the logits of its own image NaN, a zero image has logits `logit_bias`.
    """

    method = "rada"
    needs_spatial = False
    text: Tensor

    def __init__(
        self,
        text: Tensor,
        *,
        num_heads: int = 8,
        temperature: float = 1.0,
        queries: Sequence[str] = QUERIES,
        penalty: Penalty = "mse",
        logit_scale: float = 100.0,
        logit_bias: float = 0.0,
        adapters: bool = False,
    ) -> None:
        super().__init__()
        check_text("RAda", text)
        D = text.shape[1]
        self.num_heads = int(num_heads)
        self.temperature = float(temperature)
        self.queries = tuple(queries)
        self.penalty: Penalty = penalty
        self.logit_scale = float(logit_scale)
        self.logit_bias = float(logit_bias)
        self.adapters = bool(adapters)
        if self.num_heads < 1 or D % self.num_heads:
            raise ValueError(f"RAda: num_heads must divide D = {D}, got {self.num_heads}")
        unknown = [name for name in self.queries if name not in QUERIES]
        if unknown or not self.queries or len(set(self.queries)) < len(self.queries):
            names, got = ", ".join(QUERIES), ", ".join(self.queries) or "none"
            raise ValueError(f"RAda: queries must be some of {names}, each once, got {got}")
        if penalty not in PENALTIES:
            names = ", ".join(PENALTIES)
            raise ValueError(f"RAda: penalty must be one of {names}, got {penalty!r}")
        for name, above in (("temperature", 0.0), ("logit_scale", 0.0), ("logit_bias", -math.inf)):
            number = getattr(self, name)
            if not (math.isfinite(number) and number > above):
                wish = "finite" if above < 0 else "finite and above 0"
                raise ValueError(f"RAda: {name} must be {wish}, got {number}")
        norms = text.detach().float().norm(dim=-1)
        bad = ~(norms.isfinite() & (norms > 0))
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            fact = f"length {float(norms[row])} in row {row}"
            raise ValueError(f"RAda: text must have finite rows of non-zero length, got {fact}")
        self.register_buffer("text", text.detach().clone(memory_format=torch.contiguous_format))
        for name in ("image_query", "text_query", "pair_query", "key", "value", "out"):
            if not name.endswith("_query") or name.removesuffix("_query") in self.queries:
                self.add_module(name, nn.Linear(D, D))
        if self.adapters:
            self.image_adapter, self.text_adapter = _adapter(D), _adapter(D)
        self.to(device=text.device, dtype=text.dtype)
        nn.init.zeros_(self._linear("out").weight)
        nn.init.zeros_(self._linear("out").bias)

    @property
    def num_classes(self) -> int:
        return self.text.shape[0]

    def options(self) -> dict[str, object]:
        """What the constructor needs beside `text`, as plain numbers and strings."""
        names = "num_heads", "temperature", "penalty", "logit_scale", "logit_bias", "adapters"
        return {**{name: getattr(self, name) for name in names}, "queries": list(self.queries)}

    def forward(
        self, image: Tensor, spatial: Tensor | None = None, spatial_mask: Tensor | None = None
    ) -> Tensor:
        """image [B, D] -> logits [B, K]; spatial features are accepted and ignored."""
        return self.forward_with_penalty(image).logits

    def forward_with_penalty(
        self, image: Tensor, text: Tensor | None = None, logit_scale: Tensor | None = None
    ) -> RationalLogits:
        """image [B, D] -> logits [B, K] and penalty [B], both differentiable.

        text: [K, D] in place of the head's own, for encoders that are trained too.
        logit_scale: 0-dim tensor in place of the head's own. It multiplies the logits with its
            gradient and feeds the attention without, as in the released layer.
        """
        check_image("RAda", image, self.text)
        if text is None:
            text = self.text
        elif text.ndim != 2 or text.shape[1] != self.text.shape[1]:
            wish = f"[K, {self.text.shape[1]}]"
            raise ValueError(f"RAda: text must be {wish}, got {list(text.shape)}")
        if self.adapters:
            image, text = image + self.image_adapter(image), text + self.text_adapter(text)
        v, t = _level(image), _level(text)
        scale = self.logit_scale if logit_scale is None else logit_scale.detach()
        root_t = (scale / t.shape[1]) ** 0.5 * t  # sqrt(s) times the text of length 1
        text_query = None
        if "text" in self.queries:
            text_query = self._heads(self._linear("text_query")(root_t)[None])
        logits, penalty = self._chunked(v, t, root_t, text_query, scale)
        if logit_scale is not None:
            logits = logits * logit_scale
        return RationalLogits(logits + self.logit_bias if self.logit_bias else logits, penalty)

    def _chunked(
        self,
        v: Tensor,
        t: Tensor,
        root_t: Tensor,
        text_query: Tensor | None,
        scale: float | Tensor,
    ) -> RationalLogits:
        """`_logits` of all images at once, or in chunks by BYTE_BUDGET."""
        B, (K, D) = v.shape[0], t.shape
        step = max(1, BYTE_BUDGET // max(1, ROWS_KEPT * K * D * v.element_size()))
        if torch.compiler.is_compiling() or step >= B:  # in this order: a free B is not compared
            return self._logits(v, t, root_t, text_query, scale)
        parts = []
        for images in v.split(step):  # type: ignore[no-untyped-call]
            if torch.is_grad_enabled():
                inputs = images, t, root_t, text_query, scale
                parts.append(checkpoint(self._logits, *inputs, use_reentrant=False))
            else:
                parts.append(self._logits(images, t, root_t, text_query, scale))
        logits, penalty = zip(*parts, strict=True)
        return RationalLogits(torch.cat(logits), torch.cat(penalty))

    def _logits(
        self,
        v: Tensor,
        t: Tensor,
        root_t: Tensor,
        text_query: Tensor | None,
        scale: float | Tensor,
    ) -> RationalLogits:
        """v [B, D], t [K, D] of length sqrt(D), root_t = sqrt(s/D) t, text_query [1, H, K, d]."""
        D = t.shape[1]
        root_v = (scale / D) ** 0.5 * v  # of length sqrt(s), as root_t
        X = root_v[:, None] * root_t  # [B, K, D]
        image_query = pair_query = None
        if "image" in self.queries:
            image_query = self._heads(self._linear("image_query")(root_v)[:, None])
        if "pair" in self.queries:
            pair_query = self._heads(self._linear("pair_query")(X))
        context = ops.rational_attn(
            image_query,
            text_query,
            pair_query,
            self._heads(self._linear("key")(X)),
            self._heads(self._linear("value")(X)),
            temperature=self.temperature,
        )
        out = self._linear("out")
        return ops.rational_head(
            context.transpose(1, 2).flatten(2),  # heads are inner in memory: no copy
            out.weight,
            out.bias,
            v,
            t,
            scale=(scale if isinstance(scale, float) else 1.0) / D,
            penalty=self.penalty,
        )

    def with_text(self, text: Tensor) -> "RAda":
        """A head of the same parameters, copied, over other classes [K', D]."""
        options: dict[str, Any] = self.options()
        head = RAda(text.to(self.text), **options)
        head.load_state_dict({**self.state_dict(), "text": head.text})
        return head

    def load_released_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy a released layer's parameters, keys `mha.q_proj1.weight`, with or without `mha.`.

        Keys outside `mha.` (encoders, prompts, logit scale) are ignored where there is any such
        prefix. Of a head with fewer queries the unused projections are ignored too. Raises
        ValueError and changes nothing where a key is missing or unknown or a shape differs.
        """
        layer = {key.split("mha.", 1)[1]: value for key, value in state.items() if "mha." in key}
        layer = layer or dict(state)
        wanted = {
            f"{old}.{kind}": f"{new}.{kind}"
            for old, new in RELEASED.items()
            for kind in ("weight", "bias")
        }
        unknown = sorted(set(layer) - set(wanted))
        if unknown:
            raise ValueError(f"RAda: state must have the released keys, got {unknown[0]!r} beside")
        own = self.state_dict()
        found = {}
        for old, new in wanted.items():
            if new not in own:
                continue
            if old not in layer:
                raise ValueError(f"RAda: state must have the released keys, {old!r} is missing")
            if layer[old].shape != own[new].shape:
                fact = f"{list(own[new].shape)}, got {list(layer[old].shape)}"
                raise ValueError(f"RAda: state {old!r} must be {fact}")
            found[new] = layer[old]
        self.load_state_dict({**own, **found})

    def _linear(self, name: str) -> nn.Linear:
        return self.get_submodule(name)  # type: ignore[return-value]

    def _heads(self, x: Tensor) -> Tensor:
        """[B, K, D] -> [B, H, K, d], a view."""
        H = self.num_heads
        return x.view(*x.shape[:2], H, x.shape[-1] // H).transpose(1, 2)


def _level(x: Tensor) -> Tensor:
    """Rows [., D] brought to length sqrt(D): on a GPU one kernel, where to length 1 takes three.

    Entries are about 1, which suits narrow dtypes; a zero row stays 0 in all of them.
    """
    D = x.shape[-1]
    return F.rms_norm(x, (D,), eps=TINY**2 / D)


def _adapter(D: int) -> nn.Sequential:
    up = nn.Linear(max(1, D // 4), D, bias=False)
    nn.init.zeros_(up.weight)
    return nn.Sequential(nn.Linear(D, max(1, D // 4), bias=False), nn.ReLU(), up)
