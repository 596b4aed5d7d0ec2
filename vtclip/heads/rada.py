# SPDX-License-Identifier: Apache-2.0
"""RAda: a learned mask over the product of image and text features.

    R[b,k] = v[b] * T[k]                           X = s * R              (v, T of length 1)
    M      = out(mean_x A_x @ value(X))            A_x: ops.rational_attn, keys key(X)
    logits = s * sum_d relu(1 + M) * R + bias      penalty: ops.rational_head

The queries x are image_query(sqrt(s) v), text_query(sqrt(s) T) and pair_query(X). The image query
is one row per image and the text queries are one set for all images that are taken together, so
they are projected once for these; the released layer repeats both to [B, K, D] first. `out` starts
at 0, which makes the logits those of zero-shot. The logits of one class depend on the other
classes shown next to it. arXiv 2507.15480.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vtclip import ops
from vtclip.heads._check import check_choice, check_finite, check_image, check_positive
from vtclip.heads._head import Head, Options
from vtclip.heads.config import FitConfig
from vtclip.names import PENALTIES, QUERIES, Penalty
from vtclip.ops._projections import Layer, projections
from vtclip.ops.rational_head import RationalLogits

# the released layer's names of the same parameters
RELEASED = {
    "q_proj1": "image_query",
    "q_proj2": "text_query",
    "q_proj3": "pair_query",
    "k_proj": "key",
    "v_proj": "value",
    "out_proj": "out",
}
OF_PAIRS = ("pair_query", "key", "value")  # projections of X: one matrix, one below the other
# Intermediate results of all images are kept for the backward up to this many bytes; above it
# images are taken in chunks below it, and each chunk's results are recomputed in its backward.
MASK_BYTES = 2**30
# tensors of [B, K, D] kept: products, pair queries, keys, values, two parts of the context, context
ROWS_KEPT = 7


class RAda(Head):
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
    multi_label = True
    any_classes = True
    mixes_classes = True
    image_query: nn.Linear
    text_query: nn.Linear

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
        super().__init__(text, logit_scale=logit_scale)
        D = text.shape[1]
        self.num_heads = int(num_heads)
        self.temperature = float(temperature)
        self.queries = tuple(queries)
        self.penalty: Penalty = penalty
        self.logit_bias = float(logit_bias)
        self.adapters = bool(adapters)
        if self.num_heads < 1 or D % self.num_heads:
            raise ValueError(f"RAda: num_heads must divide D = {D}, got {self.num_heads}")
        unknown = [name for name in self.queries if name not in QUERIES]
        if unknown or not self.queries or len(set(self.queries)) < len(self.queries):
            names, got = ", ".join(QUERIES), ", ".join(self.queries) or "none"
            raise ValueError(f"RAda: queries must be some of {names}, each once, got {got}")
        check_choice("RAda", "penalty", penalty, PENALTIES)
        check_positive("RAda", temperature=self.temperature, logit_scale=self.logit_scale)
        check_finite("RAda", logit_bias=self.logit_bias)
        norms = text.detach().float().norm(dim=-1)
        bad = ~(norms.isfinite() & (norms > 0))
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            fact = f"length {float(norms[row])} in row {row}"
            raise ValueError(f"RAda: text must have finite rows of non-zero length, got {fact}")
        drawn = ("image_query", "text_query", *OF_PAIRS, "out")  # in this order
        layers = {name: nn.Linear(D, D) for name in drawn if self._has(name)}
        for name in drawn[:2]:
            if name in layers:
                self.add_module(name, layers[name])
        self.pairs = _stacked([layers[name] for name in OF_PAIRS if name in layers])
        self.out = layers["out"]
        if self.adapters:
            self.image_adapter, self.text_adapter = _adapter(D), _adapter(D)
        self.to(device=text.device, dtype=text.dtype)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    @classmethod
    def recipe(cls, shots: int) -> FitConfig:
        """AdamW, batch 32, one epoch of warm-up, then half a cosine; squared penalty of weight 1.

        Chosen by `benchmarks/choose_defaults.py` on satellite photos of 19 classes (ViT-B/32,
        RN50), on images that neither train nor test: 3e-3 gains over 1e-3 from 4 shots on and loses
        below; 3e-4 and 1e-2 lose wherever tried; without the penalty 16 shots lose 5 points; label
        smoothing, other penalties and temperatures gain nothing that two draws could tell from
        chance.

        Expected: 89.6 / 94.9 / 97.1 % from 81.6 % zero-shot with 1 / 4 / 16 shots, mean of seeds
            1-3, on 500 satellite photos of 19 classes through ViT-B/32.
        Cost: 2 / 4 / 14 s on one CPU core.
        Command: vtclip fit SOURCE --method rada --shots 16
        """
        return FitConfig(
            epochs=20,
            enough_pairs=800_000,
            least_epochs=5,
            optimizer="adamw",
            lr=1e-3 if shots < 4 else 3e-3,
            warmup="linear",
            penalty_weight=1.0,
        )

    def options(self) -> Options:
        return {**super().options(), "queries": list(self.queries)}

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
        logits, penalty = self._chunked(image, text, logit_scale)
        return RationalLogits(logits + self.logit_bias if self.logit_bias else logits, penalty)

    def _chunked(self, image: Tensor, text: Tensor, logit_scale: Tensor | None) -> RationalLogits:
        """`_logits` of all images at once, or in chunks by MASK_BYTES."""
        B, (K, D) = image.shape[0], text.shape
        step = max(1, MASK_BYTES // max(1, ROWS_KEPT * K * D * image.element_size()))
        if torch.compiler.is_compiling() or step >= B:  # in this order: a free B is not compared
            return self._logits(image, text, logit_scale)
        chunks = []
        for images in torch.split(image, step):
            if torch.is_grad_enabled():
                # nothing in it is random, and a CUDA graph cannot read the generator's state
                chunk = checkpoint(
                    self._logits,
                    *(images, text, logit_scale),
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
                chunks.append(chunk)
            else:
                chunks.append(self._logits(images, text, logit_scale))
        logits, penalty = zip(*chunks, strict=True)
        return RationalLogits(torch.cat(logits), torch.cat(penalty))

    def _logits(self, image: Tensor, text: Tensor, logit_scale: Tensor | None) -> RationalLogits:
        """image [B, D], text [K, D], of any length; without logit_bias."""
        if logit_scale is None:
            v, t, X = ops.unit_products(image, text, scale=self.logit_scale)
            root_v, root_t, scale = v, t, 1.0
        else:  # its value is on the device: entries of about 1 first, which suit narrow dtypes
            D = text.shape[1]
            v, t, X = ops.unit_products(image, text, scale=float(D))
            share = (logit_scale.detach() / D).to(v.dtype)
            root_v, root_t, X, scale = share.sqrt() * v, share.sqrt() * t, share * X, 1.0 / D
        names, layers = [], []
        if "image" in self.queries:
            names.append("image")
            layers.append(_layer(self.image_query, root_v))
        if "text" in self.queries:
            names.append("text")
            layers.append(_layer(self.text_query, root_t))
        *projected, pairs = projections([*layers, _layer(self.pairs, X)])
        queries = dict(zip(names, projected, strict=True))
        context = ops.rational_attn_packed(
            self._heads(queries["image"][:, None]) if "image" in queries else None,
            self._heads(queries["text"][None]) if "text" in queries else None,
            self.of_heads(pairs),
            temperature=self.temperature,
        )
        logits, penalty = ops.rational_head(
            context.transpose(1, 2).flatten(2),  # heads are inner in memory: no copy
            *(self.out.weight, self.out.bias, v, t),
            scale=scale,
            penalty=self.penalty,
        )
        return RationalLogits(logits if logit_scale is None else logits * logit_scale, penalty)

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
            raise ValueError(f"RAda: state must have the released keys, got {unknown[0]!r} as well")
        parameters = self.apart(self.state_dict())
        released = {}
        for old, new in wanted.items():
            if new not in parameters:
                continue
            if old not in layer:
                raise ValueError(f"RAda: state must have the released keys, {old!r} is missing")
            if layer[old].shape != parameters[new].shape:
                fact = f"{list(parameters[new].shape)}, got {list(layer[old].shape)}"
                raise ValueError(f"RAda: state {old!r} must be {fact}")
            released[new] = layer[old]
        self.load_state_dict({**parameters, **released})

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, *args: object
    ) -> None:
        packed = self.packed(state_dict, prefix)
        state_dict.clear()  # torch's own copy, of which the layers inside are given theirs
        state_dict.update(packed)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def packed(self, state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
        """`state` with pair_query, key and value stacked where they are apart, as in old files."""
        stacked = dict(state)
        names = [name for name in OF_PAIRS if self._has(name)]
        for kind in ("weight", "bias"):
            keys = [f"{prefix}{name}.{kind}" for name in names]
            rows = [state[key] for key in keys if key in state]
            alike = {(row.dtype, row.shape) for row in rows}
            if len(rows) == len(keys) and len(alike) == 1:
                stacked[f"{prefix}pairs.{kind}"] = torch.cat(rows)
                for key in keys:
                    del stacked[key]
        return stacked

    def apart(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state of this head with pair_query, key and value apart: views of `pairs`."""
        apart = dict(state)
        names = [name for name in OF_PAIRS if self._has(name)]
        for kind in ("weight", "bias"):
            rows = apart.pop(f"pairs.{kind}").chunk(len(names))
            apart.update({f"{name}.{kind}": part for name, part in zip(names, rows, strict=True)})
        return apart

    def _has(self, name: str) -> bool:
        """Whether the projection of that name exists."""
        return not name.endswith("_query") or name.removesuffix("_query") in self.queries

    def of_heads(self, pairs: Tensor) -> Tensor:
        """Output of `pairs` [B, K, n * D] -> [B, K, n, H, d], a view."""
        D, H = self.text.shape[1], self.num_heads
        return pairs.view(*pairs.shape[:2], pairs.shape[2] // D, H, D // H)

    def _heads(self, x: Tensor) -> Tensor:
        """[B, K, D] -> [B, H, K, d], a view."""
        H = self.num_heads
        return x.view(*x.shape[:2], H, x.shape[-1] // H).transpose(1, 2)


def _layer(layer: nn.Linear, x: Tensor) -> Layer:
    return Layer(x, layer.weight, layer.bias)


def _stacked(layers: list[nn.Linear]) -> nn.Linear:
    """One layer whose outputs are those of `layers`, one after another."""
    stacked = nn.Linear(layers[0].in_features, sum(layer.out_features for layer in layers))
    with torch.no_grad():
        stacked.weight.copy_(torch.cat([layer.weight for layer in layers]))
        stacked.bias.copy_(torch.cat([layer.bias for layer in layers]))
    return stacked


def _adapter(D: int) -> nn.Sequential:
    up = nn.Linear(max(1, D // 4), D, bias=False)
    nn.init.zeros_(up.weight)
    return nn.Sequential(nn.Linear(D, max(1, D // 4), bias=False), nn.ReLU(), up)
