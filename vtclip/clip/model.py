# SPDX-License-Identifier: Apache-2.0
"""A frozen CLIP with its tokenizer and image transform: pixels and class names to features."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor, nn

from vtclip.clip.augment import LEAST_AREA, random_view
from vtclip.clip.identity import identity_of
from vtclip.clip.low_rank import LowRank
from vtclip.clip.pixels import normalized
from vtclip.clip.spatial import attention_pool, spatial_widths, visual_kind
from vtclip.clip.texts import (
    Tokenizer,
    is_per_class,
    mean_text,
    prompts_of,
    resolve_templates,
    say_cut,
    unit_text,
    which_are_cut,
)
from vtclip.files import Json
from vtclip.names import option

if TYPE_CHECKING:
    from PIL.Image import Image

logger = logging.getLogger(__name__)

TEXT_CHUNK = 256


class _Encoders(Protocol):
    """What this module calls of a model of open_clip."""

    logit_scale: Tensor
    visual: Any

    def encode_image(self, image: Tensor) -> Tensor: ...

    def encode_text(self, text: Tensor) -> Tensor: ...


class Clip:
    """A frozen model with its tokenizer and its image transform, in float32 and eval mode.

    `config` is JSON-able and, with `weights_digest`, decides every feature: model_cfg (activation
    included), preprocess_cfg and tokenizer. It holds no path, so it is equal on all machines.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        config: Json,
        *,
        name: str = "",
        device: str | torch.device = "cpu",
    ) -> None:
        import open_clip
        from open_clip.transform import PreprocessCfg, image_transform_v2, merge_preprocess_dict

        self.name = name
        self.device = torch.device(device)
        self.model = model.float().eval().requires_grad_(False).to(self.device)
        self.tokenizer = tokenizer
        visual = self._encoders.visual
        image_size = getattr(visual, "image_size", None) or 224
        overlay = {"size": image_size, **(config.get("preprocess_cfg") or {})}
        overlay["size"] = _size(image_size)
        cfg = merge_preprocess_dict(PreprocessCfg(), overlay)
        self.preprocess_cfg: Json = json.loads(json.dumps(cfg))
        transform = image_transform_v2(PreprocessCfg(**cfg), is_train=False).transforms
        # the last two are ToTensor and Normalize, which `normalized` does
        self._geometry, self._normalize = transform[:-2], transform[-1]
        self.config: Json = {
            "model_cfg": deepcopy(config.get("model_cfg", config)),
            "preprocess_cfg": self.preprocess_cfg,
            "tokenizer": _tokenizer_config(tokenizer),
        }
        self.weights_digest = _digest(model)
        log_scale = self._encoders.logit_scale.detach().float()
        self.logit_scale = float(log_scale.reshape(-1)[0].exp())
        self.width = int(self.config["model_cfg"]["embed_dim"])
        self._visual = visual
        self._kind = visual_kind(visual, open_clip)
        self.spatial_options = spatial_widths(self._kind, visual, self.width)
        """Spatial option to width Cs."""
        self.low_rank: LowRank | None = None
        """What was added to the weights of the model that it came from, where that is kept."""
        self.cut_prompts: Json = {}
        """Of the texts that were encoded last: all prompts, and how many of a class were cut."""
        self.default_spatial = (
            {"resnet": "pooled", "vit": "projected", "timm": "raw"}.get(self._kind)
            if self.spatial_options
            else None
        )

    def __repr__(self) -> str:
        return (
            f"Clip({self.name or 'unnamed'}, width={self.width}, {self._kind}, "
            f"spatial={list(self.spatial_options)}, weights={self.weights_digest[:12]})"
        )

    @property
    def identity(self) -> Json:
        """What decides a feature of this model, field by field (see vtclip.clip.identity)."""
        return identity_of(self.config, self.weights_digest)

    @property
    def _encoders(self) -> _Encoders:
        return cast("_Encoders", self.model)

    def preprocess(self, image: Image) -> Tensor:
        """The model's evaluation transform, [3, H, W] float32."""
        for step in self._geometry:
            image = step(image)
        return normalized(image, self._normalize.mean, self._normalize.std)

    def augment(
        self, image: Image, generator: torch.Generator, least_area: float = LEAST_AREA
    ) -> Tensor:
        """Random resized crop (ratio 3/4-4/3) and flip drawn from `generator` only."""
        cfg = self.preprocess_cfg
        return random_view(image, cfg["size"], cfg["mean"], cfg["std"], generator, least_area)

    def check_spatial(self, spatial: str | None) -> str | None:
        """`spatial` with "default" resolved, or a ValueError that lists this model's options."""
        if spatial is None:
            return None
        if not self.spatial_options:
            raise ValueError(
                f"{option('spatial')}: {self.name or 'this model'} offers global features only"
            )
        if spatial == "default":
            return self.default_spatial
        if spatial not in self.spatial_options:
            raise ValueError(
                f"{option('spatial')}: {self.name or 'this model'} offers "
                f"{', '.join(self.spatial_options)}, got {spatial!r}"
            )
        return spatial

    @torch.no_grad()
    def encode_image(
        self, pixels: Tensor, spatial: str | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """pixels [B, 3, H, W] to global [B, C], not normalised, and spatial [B, L, Cs] or None."""
        spatial = self.check_spatial(spatial)
        pixels = pixels.to(self.device, torch.float32)
        if spatial is None:
            return self._encoders.encode_image(pixels), None
        if self._kind == "vit":
            out = self._visual.forward_intermediates(
                pixels, indices=1, normalize_intermediates=True, output_fmt="NLC"
            )
            tokens = out["image_intermediates"][-1]  # [B, L, width], after ln_post
            if spatial == "projected" and self._visual.proj is not None:
                tokens = tokens @ self._visual.proj
            return out["image_features"], tokens
        extra = {"normalize_intermediates": True} if self._kind == "timm" else {}
        out = self._visual.forward_intermediates(pixels, indices=1, output_fmt="NCHW", **extra)
        image_map = out["image_intermediates"][-1]  # [B, Cs, h, w]
        if spatial == "pooled":
            return out["image_features"], attention_pool(self._visual.attnpool, image_map)[:, 1:]
        tokens = image_map.flatten(2).transpose(1, 2)  # [B, L, Cs]
        if spatial == "value":
            pool = self._visual.attnpool
            tokens = pool.c_proj(pool.v_proj(tokens))
        return out["image_features"], tokens

    def encode_text(
        self, names: Sequence[str], templates: str | Sequence[Any] | None = None
    ) -> Tensor:
        """Class texts [K, C] with unit rows: normalise per template, mean, normalise."""
        return mean_text(self.encode_text_views(names, templates), names)

    @torch.no_grad()
    def encode_text_views(
        self, names: Sequence[str], templates: str | Sequence[Any] | None = None
    ) -> Tensor:
        """Class texts [K, M, C] of each of M templates, with unit rows.

        Of sentences per class M is their number; where it differs, 1 for the mean of a class.
        """
        lines = resolve_templates(templates)
        for index, name in enumerate(names):
            if not name.strip():
                raise ValueError(f"encode_text: class name {index} is empty")
        prompts = prompts_of(lines, names)
        cut: Counter[str] = Counter()
        counts = {len(texts) for texts in prompts}
        if len(counts) == 1:
            columns = [
                self._unit_texts([texts[number] for texts in prompts], names, cut)
                for number in range(counts.pop())
            ]
            views = torch.stack(columns, dim=1)
        else:
            owners = [name for name, texts in zip(names, prompts, strict=True) for _ in texts]
            rows = self._unit_texts([text for texts in prompts for text in texts], owners, cut)
            groups = torch.split(rows, [len(texts) for texts in prompts])
            means = [mean_text(group[None], [n]) for group, n in zip(groups, names, strict=True)]
            views = torch.stack(means)
        self.cut_prompts = {"cut": dict(cut), "prompts": sum(map(len, prompts))}
        if cut:
            say_cut(logger, cut, sum(map(len, prompts)), self.tokenizer.context_length)
        return views

    def _unit_texts(self, prompts: list[str], names: Sequence[str], cut: Counter[str]) -> Tensor:
        """Unit rows [n, C] of prompts of the classes `names`; `cut` counts what does not fit."""
        unit = torch.empty(len(prompts), self.width, device=self.device)
        for start in range(0, len(prompts), TEXT_CHUNK):
            chunk = slice(start, start + TEXT_CHUNK)
            tokens = self.tokenizer(prompts[chunk]).to(self.device)
            is_cut = which_are_cut(self.tokenizer, prompts[chunk])
            cut.update(name for name, c in zip(names[chunk], is_cut, strict=True) if c)
            unit[chunk] = unit_text(self._encoders.encode_text(tokens).float(), names[chunk])
        return unit

    def tokens(self, names: Sequence[str], templates: str | Sequence[Any] | None = None) -> Tensor:
        """Token ids [T, K, context] of each of T templates filled with each of K class names."""
        lines = resolve_templates(templates)
        if is_per_class(lines[0]):
            raise ValueError("templates: must hold {} for the class name, got sentences per class")
        prompts = prompts_of(lines, names)
        return torch.stack(
            [self.tokenizer([texts[t] for texts in prompts]) for t in range(len(lines))]
        )


def _digest(model: nn.Module) -> str:
    """sha256 over names, shapes and float32 values: equal for every file format and dtype."""
    total = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        total.update(f"{key}{list(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().numpy().data)
    return total.hexdigest()


def _tokenizer_config(tokenizer: Tokenizer) -> Json:
    config: Json = {
        "kind": type(tokenizer).__name__,
        "context_length": getattr(tokenizer, "context_length", None),
    }
    config |= getattr(tokenizer, "facts", {})
    vocab = getattr(tokenizer, "vocab", None)
    if isinstance(vocab, dict):
        text = json.dumps(vocab, sort_keys=True, ensure_ascii=True)
        config["vocab_digest"] = hashlib.sha256(text.encode()).hexdigest()
    return config


def _size(image_size: int | Sequence[int]) -> int | list[int]:
    """One number for square inputs, so that there is one JSON form and one digest."""
    if isinstance(image_size, int):
        return image_size
    sizes = [int(value) for value in image_size]
    return sizes[0] if len(set(sizes)) == 1 else sizes
