# SPDX-License-Identifier: Apache-2.0
"""VT-CLIP: class texts attend to one image's spatial features.

    logits[b, k] = s * cos(image[b], T[k] + residual * Decoder(T, F_b)[k])

T [K, C] are the class texts, F_b [L, C] the spatial features of image b, Decoder one or more
`torch.nn.TransformerDecoderLayer` (post-norm, ReLU, no dropout). The result is that module's,
applied to the texts repeated for each image; the work is not: the first layer's self-attention
and query see texts only and are computed once per step (`_decoder.py` has the equations). From
the second layer on the texts differ between images and nothing can be shared. The last norm, the
residual and the cosine are one operator, `ops.norm_cosine_logits`, or with the second feed-forward
matrix `ops.ffn_cosine_logits`.

Dropout: `nn.TransformerDecoderLayer` defaults to 0.1 and would draw another mask per image in the
self-attention. Sharing is exact without dropout and in evaluation, hence there is none here.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtclip import ops
from vtclip.heads import _check, _decoder, _feed_forward
from vtclip.heads._cost import fuse_tail
from vtclip.heads._head import Head, Options
from vtclip.heads.config import FitConfig

EPS = 1e-5
EPOCHS = {1: 50, 2: 100, 4: 100, 8: 50, 16: 50}  # by shots
INITS = ("zero", "aligned", "torch")
WHOLE = (_decoder.ALL, _decoder.ALL)  # images, classes
# without gradients, work on as many rows at a time as keep the intermediate results below this: on
# a GPU this part of its memory, but no more than where chunks stop to matter
DECODER_BYTES = 256 * 2**20
GPU_PART, GPU_BYTES = 1 / 32, 2 * 2**30


class VTCLIP(Head):
    """Transformer decoder from class texts [K, C] to each image's spatial features.

    text: [K, C], a buffer, used as given (L2-normalise it before).
    spatial_dim: width of the spatial features. Where it differs from C, a learned projection
        without bias brings them to C first, as for the raw 7 x 7 x 2048 features of a ResNet.
    ffn_dim: hidden width, 4 C by default.
    unit_spatial: give every spatial feature length 1 first, as the class texts have.
    init: "zero" starts at the zero-shot logits (the last norm's weight and bias are 0). "aligned"
        does too, and its first layer attends from the start to the tokens most similar to a class
        text, which makes `attention` an explanation; for spatial features in the text space, of
        norm around sqrt(C). "torch" keeps `nn.TransformerDecoderLayer`'s own initialisation, which
        does not start at zero-shot.

    Features are not searched for NaN (that would cost a device synchronisation): a non-finite image
    or token makes the logits of its own image non-finite and leaves the others alone.
    """

    method = "vtclip"
    multi_label = True
    needs_spatial = True
    any_classes = True
    mixes_classes = True

    def __init__(
        self,
        text: Tensor,
        *,
        spatial_dim: int | None = None,
        num_heads: int = 8,
        num_layers: int = 1,
        ffn_dim: int | None = None,
        unit_spatial: bool = False,
        residual: float = 1.0,
        logit_scale: float = 100.0,
        init: str = "zero",
    ) -> None:
        super().__init__(text, logit_scale=logit_scale)
        C = text.shape[1]
        self.spatial_dim = C if spatial_dim is None else int(spatial_dim)
        self.num_heads = int(num_heads)
        self.num_layers = int(num_layers)
        self.ffn_dim = 4 * C if ffn_dim is None else int(ffn_dim)
        self.unit_spatial = bool(unit_spatial)
        self.residual = float(residual)
        self.init = init
        counts = ("spatial_dim", "num_heads", "num_layers", "ffn_dim")
        _check.check_least("VTCLIP", 1, **{name: getattr(self, name) for name in counts})
        if C % self.num_heads:
            raise ValueError(f"VTCLIP: num_heads must divide C = {C}, got {self.num_heads}")
        _check.check_finite("VTCLIP", residual=self.residual, logit_scale=self.logit_scale)
        _check.check_choice("VTCLIP", "init", init, INITS)
        if init == "aligned" and self.spatial_dim != C:
            fact = f"got {self.spatial_dim}"
            raise ValueError(f"VTCLIP: spatial_dim must be C = {C} where init is aligned, {fact}")
        self.spatial_proj: nn.Module = nn.Identity()
        if self.spatial_dim != C:
            self.spatial_proj = nn.Linear(self.spatial_dim, C, bias=False)
        # the torch modules hold the parameters under their usual names; their forward is not called
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                C, self.num_heads, self.ffn_dim, dropout=0.0, batch_first=True
            )
            for _ in range(self.num_layers)
        )
        self.to(device=text.device, dtype=text.dtype)
        if init == "aligned":
            _decoder.align(self._decoder()[0], self.text)
        if init != "torch":
            nn.init.zeros_(self._decoder()[-1].norm3.weight)
            nn.init.zeros_(self._decoder()[-1].norm3.bias)

    @classmethod
    def recipe(cls, shots: int) -> FitConfig:
        """AdamW, batch 32, one epoch of linear warm-up, then half a cosine; hidden width 512.

        Chosen on images that neither train nor test: with 4 shots a rate of 1e-4 gains more than
        2e-4, with 16 shots 3e-4 more than 1e-4 or 1e-3, and both more than SGD at 2e-3. With 16
        shots 50, 34 and 23 epochs are equal to half a point, so that many classes, which make
        epochs long, are trained for fewer.

        Expected: 91.2 % from 90.1 % zero-shot with 16 shots, mean of seeds 1-3, on 754 product
            photos of 18 classes through a CLIP with 256 tokens of width 128.
        Cost: that took 29 s on one CPU core.
        Command: vtclip fit SOURCE --method vtclip --shots 16
        """
        # between the named shot counts, the epochs of the next smaller one
        epochs = EPOCHS[max((known for known in EPOCHS if known <= shots), default=1)]
        return FitConfig(
            epochs,
            enough_pairs=640_000,
            least_epochs=4,
            optimizer="adamw",
            lr=1e-4 if shots < 8 else 3e-4,
            weight_decay=1e-2,
            warmup="linear",
            head={"unit_spatial": True, "ffn_dim": 512},
        )

    def forward(self, image: Tensor, spatial: Tensor, spatial_mask: Tensor | None = None) -> Tensor:
        """image [B, C], spatial [B, L, spatial_dim] -> [B, K].

        spatial_mask: [B, L] bool, True = attend. An image without any token left (all masked, or
        L = 0) gets 0 in place of the weighted mean of its values; the attention then adds only its
        biases, and the logits stay finite.
        """
        _check.check_image("VTCLIP", image, self.text)
        tokens = self._tokens(spatial, spatial_mask)
        B, K = image.shape[0], self.num_classes
        _check.check_same_batch("VTCLIP", image, tokens)
        first = self._decoder()[0]
        cross = _decoder.CrossWeights.of(first)
        x1, query = _decoder.queries(first, self.text[None], cross)  # [1, K, C], [1, H, K, d]
        key, value = _decoder.keys_values(first, tokens, cross)  # [B, H, L, d]
        last = self._decoder()[-1].norm3
        options: Options = {"residual": self.residual, "scale": self.logit_scale, "eps": EPS}
        fold = _feed_forward.folds(x1, first.linear2.weight)
        once = _decoder.terms(first, x1, _decoder.form(first, x1, key), cross, fold=fold)

        def part(images: slice, classes: slice) -> Tensor:
            mask = None if spatial_mask is None else spatial_mask[images]
            layer, terms = first, once.of(classes)
            attention = query, key, value, mask
            if (images, classes) != WHOLE:
                attention = query[:, :, classes], key[images], value[images], mask
            for below, layer in pairwise(self._decoder()):
                units = _decoder.hidden_units(below, terms, attention)
                z = _decoder.before_last_norm(below, *units, folded=terms.folded)
                cross = _decoder.CrossWeights.of(layer)
                above, its_query = _decoder.queries(layer, _decoder.last_norm(below, z), cross)
                attention = its_query, *_decoder.keys_values(layer, tokens[images], cross), mask
                absorb = _decoder.form(layer, above, attention[1])
                terms = _decoder.terms(layer, above, absorb, cross, fold=fold)
            hidden, x2 = _decoder.hidden_units(layer, terms, attention)
            tail = last.weight, last.bias, self.text[classes], image[images]
            # a choice by the number of images would tie a traced graph to that number
            rows = 0 if torch.compiler.is_compiling() else hidden.shape[0] * hidden.shape[1]
            training = torch.is_grad_enabled()
            if not fold and fuse_tail(rows, x2.device.type, training=training):
                linear = layer.linear2
                return ops.ffn_cosine_logits(
                    hidden, linear.weight, linear.bias, x2, *tail, **options
                )
            z = _decoder.before_last_norm(layer, hidden, x2, folded=terms.folded)
            return ops.norm_cosine_logits(z, *tail, **options)

        b, k = self._chunk(B)
        if b >= B and k >= K:
            return part(*WHOLE)
        return torch.cat([torch.cat([part(i, j) for j in _slices(K, k)], 1) for i in _slices(B, b)])

    @torch.no_grad()
    def attention(self, spatial: Tensor, spatial_mask: Tensor | None = None) -> Tensor:
        """The last layer's cross-attention weights, mean over heads -> [B, K, L]; no gradient."""
        tokens = self._tokens(spatial, spatial_mask)
        target = self.text[None]
        *below, layer = self._decoder()
        for lower in below:
            target = _decoder.last_norm(lower, _decoder.decode(lower, target, tokens, spatial_mask))
        cross = _decoder.CrossWeights.of(layer)
        query = _decoder.queries(layer, target, cross)[1]
        key, _ = _decoder.keys_values(layer, tokens, cross)
        return ops.cross_attn_weights(query, key, key_mask=spatial_mask).mean(1)

    def load_decoder_layer(self, layer: nn.TransformerDecoderLayer) -> None:
        """Copy one layer's parameters.

        Then logits == s * cos(image, text + residual * layer(text, spatial)). A layer with
        dropout is accepted; the equality then holds for the layer in evaluation mode.
        """
        self.load_decoder_layers([layer])

    def load_decoder_layers(
        self, layers: nn.TransformerDecoder | Sequence[nn.TransformerDecoderLayer]
    ) -> None:
        """The same for a stack, first layer first."""
        if isinstance(layers, nn.TransformerDecoder):
            if layers.norm is not None:
                raise ValueError("VTCLIP: layers must end without a norm of its own, got norm set")
            layers = list(layers.layers)
        if len(layers) != self.num_layers:
            raise ValueError(f"VTCLIP: layers must be {self.num_layers}, got {len(layers)}")
        for layer in layers:
            self._check_layer(layer)
        for copy, layer in zip(self.layers, layers, strict=True):
            copy.load_state_dict(layer.state_dict())

    def _check_layer(self, layer: nn.Module) -> None:
        if not isinstance(layer, nn.TransformerDecoderLayer):
            kind = type(layer).__name__
            raise TypeError(f"VTCLIP: layer must be a torch.nn.TransformerDecoderLayer, got {kind}")
        relu = layer.activation is F.relu or isinstance(layer.activation, nn.ReLU)
        biased = layer.linear1.bias is not None
        facts: dict[str, tuple[object, object]] = {
            "activation relu": (True, relu),
            "norm_first": (False, layer.norm_first),
            "bias": (True, biased),
            "d_model": (self.text.shape[1], layer.linear1.in_features),
            "dim_feedforward": (self.ffn_dim, layer.linear1.out_features),
            "nhead": (self.num_heads, layer.multihead_attn.num_heads),
            "layer_norm_eps": (EPS, layer.norm3.eps),
        }
        for name, (wish, fact) in facts.items():
            if wish != fact:
                raise ValueError(f"VTCLIP: layer must have {name} = {wish}, got {fact}")

    def _decoder(self) -> list[nn.TransformerDecoderLayer]:
        return [layer for layer in self.layers if isinstance(layer, nn.TransformerDecoderLayer)]

    def _tokens(self, spatial: Tensor, spatial_mask: Tensor | None) -> Tensor:
        """[B, L, spatial_dim] -> [B, L, C]; masked tokens 0, whatever the padding held."""
        _check.check_spatial("VTCLIP", spatial, spatial_mask, self.spatial_dim, self.text.dtype)
        if spatial_mask is not None:
            # 0 * NaN would reach the weights' gradient
            spatial = spatial.masked_fill(~spatial_mask[:, :, None], 0)
        if self.unit_spatial:
            spatial = F.normalize(spatial, dim=-1)
        tokens: Tensor = self.spatial_proj(spatial)
        return tokens

    def _chunk(self, B: int) -> tuple[int, int]:
        """Images and classes at a time: all of them with gradients, else by DECODER_BYTES."""
        K, C = self.text.shape
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return B, K
        row_bytes = (4 * C + self.ffn_dim) * self.text.element_size()
        rows = max(_decoder_bytes(self.text.device) // row_bytes, 1)
        # classes meet only in the self-attention, which the first layer has done for all of them
        return max(rows // K, 1), K if self.num_layers > 1 else min(rows, K)


def _decoder_bytes(device: torch.device) -> int:
    if device.type != "cuda":
        return DECODER_BYTES if device.type == "cpu" else GPU_BYTES
    memory = torch.cuda.get_device_properties(device).total_memory
    return max(DECODER_BYTES, min(int(GPU_PART * memory), GPU_BYTES))


def _slices(total: int, step: int) -> Iterator[slice]:
    return (slice(start, start + step) for start in range(0, total, step))
