# SPDX-License-Identifier: Apache-2.0
"""CLIP-LoRA: both towers adapted by low-rank changes of the queries, keys and values alone.

    W' x = W x + scale * B A dropout(x),   scale = alpha / sqrt(r)

in every attention layer of both towers; A [r, C] starts at random, B [C, r] at 0, W stays. The loss
is the cross-entropy of zero-shot's own logits, s cos(image, text). arXiv 2405.18541; its released
code divides by sqrt(r), not r.

A and B are those of PEFT's `lora.Linear` (`use_rslora`). Its own layer for nn.MultiheadAttention
changes the three matrices by one A for all of them, and the output's too, without dropout, and adds
and subtracts B A at every call, which wears the frozen weights by rounding. So that each matrix
gets its own pair, as published, the attentions are opened here into four Linear layers while they
are trained, and closed afterwards: the model that is kept is the one that came with B A added.

Dropout is drawn from seed, step and process: a resumed run draws the same, several processes draw
others than one. Differences to the released code: the learning rate ends at 0, not at 1e-6;
float32 or bfloat16, not float16; the logit scale is the model's, not 100.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtclip.clip import Clip
from vtclip.clip.low_rank import PARTS, LowRank, attention_layers
from vtclip.names import option
from vtclip.train.finetune_config import LoraConfig

INSTALL = "pip install 'vtclip[lora]'"
ADAPTER = "default"  # PEFT's name of the only adapter


def check_peft() -> None:
    """Refuse where PEFT, or what it imports, is not installed."""
    missing = [name for name in ("peft", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{option('lora')} needs {' and '.join(missing)}; {INSTALL} brings it")


class CosineHead(nn.Module):
    """Zero-shot's logits over texts that are trained, in the form that `Encoders` calls."""

    def forward_with_penalty(
        self, image: Tensor, text: Tensor, logit_scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """image [B, C], text [K, C], 0-dim scale -> logits [B, K], and no penalty: zeros [B]."""
        cosines = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).mT
        return logit_scale * cosines, cosines.new_zeros(len(cosines))


class OpenAttention(nn.Module):
    """An nn.MultiheadAttention as Linear layers; the same function, to rounding."""

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.num_heads, self.batch_first = attention.num_heads, attention.batch_first
        bias = attention.in_proj_bias
        weights = attention.in_proj_weight.detach().chunk(3)
        biases = (None,) * 3 if bias is None else bias.detach().chunk(3)
        q, k, v = (_linear(*pair) for pair in zip(weights, biases, strict=True))
        self.q, self.k, self.v, self.out = q, k, v, attention.out_proj

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, None]:
        """query, key, value [N, L, C], or [L, N, C] where not `batch_first` -> the same."""
        del need_weights
        rows = (self.q(query), self.k(key), self.v(value))
        q, k, v = (self._heads(x) for x in rows)  # [N, H, L, d]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask)
        mixed = mixed.transpose(1, 2).flatten(2)
        out: Tensor = self.out(mixed if self.batch_first else mixed.transpose(0, 1))
        return out, None

    def _heads(self, x: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        return x.reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2)


class LoRA:
    """Low-rank adapters in the attentions of `clip`, from construction until `close`."""

    def __init__(self, clip: Clip, config: LoraConfig) -> None:
        check_peft()
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model

        self.clip, self.scale = clip, config.lora_alpha / math.sqrt(config.lora_rank)
        self.closed = attention_layers(clip)
        for name, attention in self.closed.items():
            _set(clip.model, name, OpenAttention(attention))
        settings: dict[str, Any] = {
            "r": config.lora_rank,
            "lora_alpha": config.lora_alpha,
            "lora_dropout": config.lora_dropout,
            "use_rslora": True,
            "target_modules": [f"{name}.{part}" for name in self.closed for part in PARTS],
        }
        inject_adapter_in_model(PeftConfig(**settings), clip.model, ADAPTER)
        self.layers: dict[str, Any] = {
            f"{name}.{part}": clip.model.get_submodule(f"{name}.{part}")
            for name in self.closed
            for part in PARTS
        }
        self.dropouts = [layer.lora_dropout[ADAPTER] for layer in self.layers.values()]
        clip.model.to(clip.device)
        clip.model.eval().requires_grad_(False)
        for layer in self.layers.values():
            for factor in (layer.lora_A, layer.lora_B):
                factor[ADAPTER].requires_grad_(True)

    @contextmanager
    def dropout(self, seed: int, number: int, rank: int) -> Iterator[None]:
        """Dropout switched on, for the forward and the backward pass of step `number`."""
        name = f"dropout seed {seed} step {number} process {rank}"
        drawn = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little") >> 1
        device = self.clip.device
        for module in self.dropouts:
            module.train()
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(drawn)
                yield
        finally:
            for module in self.dropouts:
                module.eval()

    def close(self) -> LowRank:
        """Put the attentions back as they came, without the adapters, which are returned."""
        factors = {}
        for name, layer in self.layers.items():
            for factor, module in (("A", layer.lora_A), ("B", layer.lora_B)):
                factors[f"{name}.{factor}"] = module[ADAPTER].weight.detach().cpu().clone()
        for name, attention in self.closed.items():
            _set(self.clip.model, name, attention)
        return LowRank(factors, self.scale)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return layer


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)
