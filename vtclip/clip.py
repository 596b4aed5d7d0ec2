# SPDX-License-Identifier: Apache-2.0
"""Frozen CLIP models to image features, spatial features and class texts.

This is the only module that imports open_clip, and it does so inside functions, so that importing
vtclip stays cheap. Model names:

    demo                              the small model that ships with the package
    ViT-B-32:openai                   architecture:tag, fetched by the hub client into its own cache
    ViT-B-32-quickgelu:/w.safetensors architecture:file
    local-dir:/folder  or  /folder    open_clip_config.json + weights (+ vocab.json, word tokenizer)
    hf-hub:owner/name                 a hub repository in open_clip's layout

Spatial options, [B, L, Cs]:

    ResNet   raw        C4 map before the attention pool, row-major
             pooled     every map position as a query of the whole attention pool (default)
             value      c_proj(v_proj(x)) of each position alone, without positional embedding
    ViT      raw        patch tokens after ln_post, before the projection
             projected  ln_post, then the projection into the joint space (default)
    timm     raw        the trunk's last intermediate, where the trunk offers one
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import pickle
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vtclip.data.augment import LEAST_AREA, random_view
from vtclip.data.hub import ClipNotFound, fetch, not_fetched
from vtclip.data.pixels import normalized

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = [
    "DEFAULT_TEMPLATE",
    "Clip",
    "ClipNotFound",
    "build_clip",
    "load_clip",
    "mean_text",
    "resolve_templates",
]

logger = logging.getLogger(__name__)

DEFAULT_TEMPLATE = "a photo of a {}."
DEMO_ASSETS = Path(__file__).parent / "demo" / "assets"
CONFIG_NAME = "open_clip_config.json"
WEIGHT_NAMES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
TEXT_CHUNK = 256


def build_clip(config: dict[str, Any]) -> nn.Module:
    """An open_clip model with random weights from `config`, a model_cfg or {"model_cfg": ...}."""
    import open_clip

    cfg = deepcopy(config.get("model_cfg", config))
    missing = [key for key in ("embed_dim", "vision_cfg", "text_cfg") if key not in cfg]
    if missing:
        raise ValueError(
            f"build_clip: config must hold embed_dim, vision_cfg and text_cfg, "
            f"got no {', '.join(missing)}"
        )
    custom = cfg.pop("custom_text", False) or "hf_model_name" in cfg["text_cfg"]
    if "timm_model_name" in cfg["vision_cfg"]:
        cfg["vision_cfg"]["timm_model_pretrained"] = False
    if "hf_model_name" in cfg["text_cfg"]:
        cfg["text_cfg"]["hf_model_pretrained"] = False
    kind = open_clip.CLIP
    if custom or "multimodal_cfg" in cfg:
        kind = open_clip.CoCa if "multimodal_cfg" in cfg else open_clip.CustomTextCLIP
    model: nn.Module = kind(**cfg)
    return model


def resolve_templates(templates: str | Sequence[str] | None) -> list[str]:
    """A list from None, one template, "imagenet7", "imagenet80", a .txt file or a list of them."""
    if templates is None:
        return [DEFAULT_TEMPLATE]
    if isinstance(templates, str):
        return _named_templates(templates)
    found = [line for item in templates for line in _named_templates(item)]
    if not found:
        raise ValueError("templates: at least one template is needed, got an empty list")
    return found


def _named_templates(name: str) -> list[str]:
    if not isinstance(name, str):
        raise TypeError(f"templates: each template must be a str, got {type(name).__name__}")
    if name in ("imagenet7", "imagenet80"):
        import open_clip

        known = (
            open_clip.SIMPLE_IMAGENET_TEMPLATES
            if name == "imagenet7"
            else open_clip.OPENAI_IMAGENET_TEMPLATES
        )
        return [template("{}") for template in known]
    if name.endswith(".txt") and "{}" not in name:
        path = Path(name)
        if not path.is_file():
            raise ValueError(f"templates: no such file: {name}")
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        return [_checked_template(line) for line in lines if line]
    return [_checked_template(name)]


def _checked_template(template: str) -> str:
    if template.count("{}") != 1:
        raise ValueError(
            f"templates: {template!r} must hold exactly one '{{}}', got {template.count('{}')}"
        )
    return template


class Clip:
    """A frozen model with its tokenizer and its own image transform, in float32 and eval mode.

    `config` is JSON-able and, with `weights_digest`, decides every feature: model_cfg (activation
    included), preprocess_cfg and tokenizer. It holds no path, so it is equal on all machines.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        config: dict[str, Any],
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
        visual: Any = model.visual
        image_size = getattr(visual, "image_size", None) or 224
        overlay = {"size": image_size, **(config.get("preprocess_cfg") or {})}
        overlay["size"] = _size(image_size)
        cfg = merge_preprocess_dict(PreprocessCfg(), overlay)
        self.preprocess_cfg: dict[str, Any] = json.loads(json.dumps(cfg))
        transform = image_transform_v2(PreprocessCfg(**cfg), is_train=False).transforms
        # the last two are ToTensor and Normalize, which `normalized` does
        self._geometry, self._normalize = transform[:-2], transform[-1]
        self.config: dict[str, Any] = {
            "model_cfg": deepcopy(config.get("model_cfg", config)),
            "preprocess_cfg": self.preprocess_cfg,
            "tokenizer": _tokenizer_config(tokenizer),
        }
        self.weights_digest = _digest(model)
        self.logit_scale = float(model.logit_scale.detach().float().reshape(-1)[0].exp())  # type: ignore[operator]
        self.width = int(self.config["model_cfg"]["embed_dim"])
        self._visual = visual
        self._kind = _visual_kind(visual, open_clip)
        self.spatial_options = _spatial_widths(self._kind, visual, self.width)
        """Spatial option to width Cs."""
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

    def preprocess(self, image: Image) -> Tensor:
        """The model's own evaluation transform, [3, H, W] float32."""
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
        """`spatial` with "default" resolved, or a ValueError that lists what this model offers."""
        if spatial is None:
            return None
        if not self.spatial_options:
            raise ValueError(f"spatial: {self.name or 'this model'} offers global features only")
        if spatial == "default":
            return self.default_spatial
        if spatial not in self.spatial_options:
            raise ValueError(
                f"spatial: {self.name or 'this model'} offers "
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
            return self.model.encode_image(pixels), None  # type: ignore[operator]
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
        self, names: Sequence[str], templates: str | Sequence[str] | None = None
    ) -> Tensor:
        """Class texts [K, C] with unit rows: normalise per template, mean, normalise."""
        return mean_text(self.encode_text_views(names, templates), names)

    @torch.no_grad()
    def encode_text_views(
        self, names: Sequence[str], templates: str | Sequence[str] | None = None
    ) -> Tensor:
        """Class texts [K, M, C] of each of M templates apart, with unit rows."""
        lines = resolve_templates(templates)
        for index, name in enumerate(names):
            if not name.strip():
                raise ValueError(f"encode_text: class name {index} is empty")
        words = [name.replace("_", " ") for name in names]
        views = torch.empty(len(words), len(lines), self.width, device=self.device)
        truncated: list[str] = []
        for number, line in enumerate(lines):
            for start in range(0, len(words), TEXT_CHUNK):
                # replace, not format: a class name may hold braces or %
                prompts = [line.replace("{}", word) for word in words[start : start + TEXT_CHUNK]]
                tokens = self.tokenizer(prompts).to(self.device)
                truncated += _truncated(self.tokenizer, prompts)
                rows = self.model.encode_text(tokens).float()  # type: ignore[operator]
                unit = _unit_text(rows, names[start : start + TEXT_CHUNK])
                views[start : start + TEXT_CHUNK, number] = unit
        if truncated:
            logger.warning(
                "%d of %d prompts are longer than the context of %d tokens and were cut, e.g. %r",
                len(truncated),
                len(words) * len(lines),
                self.tokenizer.context_length,
                truncated[0],
            )
        return views

    def tokens(self, names: Sequence[str], templates: str | Sequence[str] | None = None) -> Tensor:
        """Token ids [T, K, context] of each of T templates filled with each of K class names."""
        words = [name.replace("_", " ") for name in names]
        lines = resolve_templates(templates)
        return torch.stack(
            [self.tokenizer([line.replace("{}", w) for w in words]) for line in lines]
        )


def mean_text(views: Tensor, names: Sequence[str]) -> Tensor:
    """The normalised mean [K, C] over the templates of views [K, M, C]."""
    total = torch.zeros_like(views[:, 0])
    for number in range(views.shape[1]):  # one by one, so that cached texts keep their bits
        total += views[:, number]
    return _unit_text(total, names)


def _unit_text(rows: Tensor, names: Sequence[str]) -> Tensor:
    norm = rows.norm(dim=-1)
    for index, value in enumerate(norm.tolist()):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(
                f"encode_text: the text feature of class {names[index]!r} has norm {value}"
            )
    unit: Tensor = rows / norm[:, None]
    return unit


def attention_pool(pool: Any, image_map: Tensor) -> Tensor:
    """The whole attention pool with every token as a query: [B, C, h, w] to [B, 1 + h*w, D].

    Token 0 queries with the mean and is the model's global feature; the others are the positions.
    """
    tokens = image_map.flatten(2).transpose(1, 2)  # [B, L, C]
    tokens = torch.cat([tokens.mean(dim=1, keepdim=True), tokens], dim=1)
    if tokens.shape[1] != pool.positional_embedding.shape[0]:
        raise ValueError(
            f"encode_image: pixels must give {pool.positional_embedding.shape[0] - 1} "
            f"positions, got {tokens.shape[1] - 1}"
        )
    tokens = tokens + pool.positional_embedding

    def heads(x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], pool.num_heads, -1).transpose(1, 2)  # [B, H, 1 + L, d]

    mixed = functional.scaled_dot_product_attention(
        heads(pool.q_proj(tokens)), heads(pool.k_proj(tokens)), heads(pool.v_proj(tokens))
    )
    out: Tensor = pool.c_proj(mixed.transpose(1, 2).flatten(2))
    return out


def load_clip(model: str | Path = "demo", device: str | torch.device = "cpu") -> Clip:
    """The frozen model that `model` names (see the module's docstring), or ClipNotFound."""
    name = str(model)
    if name == "demo":
        if not (DEMO_ASSETS / CONFIG_NAME).is_file():
            raise ClipNotFound(
                "model 'demo': the bundled model is not installed: "
                f"vtclip/demo/assets/{CONFIG_NAME} is missing"
            )
        return _load_folder(DEMO_ASSETS, name, device)
    if name.startswith("local-dir:"):
        return _load_folder(Path(name.removeprefix("local-dir:")).expanduser(), name, device)
    if name.startswith("hf-hub:"):
        return _load_hub(name, device)
    if Path(name).expanduser().is_dir():
        return _load_folder(Path(name).expanduser(), name, device)
    return _load_named(name, device)


def _load_folder(folder: Path, name: str, device: str | torch.device) -> Clip:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ClipNotFound(
            f"model {name!r}: the folder must hold {CONFIG_NAME}, got "
            f"{'none' if folder.is_dir() else 'no folder'} at {folder}"
        )
    config = _read_config(name, path)
    for weights in (
        *(folder / known for known in WEIGHT_NAMES),
        *sorted(folder.glob("*.safetensors")),
    ):
        if weights.is_file():
            break
    else:
        raise ClipNotFound(
            f"model {name!r}: no weights in {folder}, looked for "
            f"{', '.join(WEIGHT_NAMES)} and *.safetensors"
        )
    vocab = folder / "vocab.json"
    # a byte-pair vocabulary always comes with its merges
    if vocab.is_file() and not any((folder / f).exists() for f in ("merges.txt", "tokenizer.json")):
        from vtclip.demo.tokenizer import WordTokenizer

        words = json.loads(vocab.read_text(encoding="utf-8"))
        context = config["model_cfg"]["text_cfg"].get("context_length", 77)
        tokenizer: Any = WordTokenizer(words, context)
    else:
        tokenizer = _tokenizer(name, f"local-dir:{folder}")
    return _finish(name, config, weights, tokenizer, device)


def _load_hub(name: str, device: str | torch.device) -> Clip:
    repo = name.removeprefix("hf-hub:")
    path = fetch(name, repo, [CONFIG_NAME])
    config = _read_config(name, path)
    weights = fetch(name, repo, list(WEIGHT_NAMES))
    # without a tokenizer of its own the repository is asked no more, so that a cached one is enough
    own = config["model_cfg"].get("text_cfg", {}).get("hf_tokenizer_name")
    tokenizer = _tokenizer(name, name if own else f"local-dir:{path.parent}")
    return _finish(name, config, weights, tokenizer, device)


def _read_config(name: str, path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ClipNotFound(f"model {name!r}: {path} is not JSON: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_cfg"), dict):
        raise ClipNotFound(f"model {name!r}: {path} must hold model_cfg")
    return config


def _tokenizer(name: str, identifier: str) -> Any:
    import open_clip

    try:
        return open_clip.get_tokenizer(identifier)
    except Exception as error:
        raise not_fetched(name, "its tokenizer", error) from None


def _load_named(name: str, device: str | torch.device) -> Clip:
    import open_clip
    from open_clip import pretrained

    arch, _, rest = name.partition(":")
    model_cfg = open_clip.get_model_config(arch)
    if model_cfg is None:
        raise ClipNotFound(
            f"model {name!r}: neither a folder nor a known architecture; give demo, "
            "ARCHITECTURE:TAG, ARCHITECTURE:/path/to/weights.safetensors, "
            "local-dir:/folder or hf-hub:owner/name"
        )
    tags = open_clip.list_pretrained_tags_by_model(arch)
    path = Path(rest).expanduser()
    if rest and (path.is_file() or "/" in rest or path.suffix in WEIGHT_SUFFIXES):
        if not path.is_file():
            raise ClipNotFound(f"model {name!r}: no such weights file: {path}")
        config = {"model_cfg": model_cfg, "preprocess_cfg": _file_preprocess(arch, path, tags)}
        return _finish(name, config, path, _tokenizer(name, arch), device)
    if rest not in tags:
        wish = f"unknown weights tag {rest!r}" if rest else "an architecture without weights"
        shown = ", ".join(tags[:6]) + (", ..." if len(tags) > 6 else "")
        raise ClipNotFound(
            f"model {name!r}: {wish}; give {arch}:TAG (one of "
            f"{shown or 'none known'}) or {arch}:/path/to/weights.safetensors"
        )
    tag = pretrained.get_pretrained_cfg(arch, rest)
    # weights trained with QuickGELU give silently worse features under GELU, so the tag decides
    if bool(tag.get("quick_gelu", False)) != bool(model_cfg.get("quick_gelu", False)):
        model_cfg["quick_gelu"] = bool(tag.get("quick_gelu", False))
        logger.info("model %s: quick_gelu=%s, as its weights need", name, model_cfg["quick_gelu"])
    hub = tag.get("hf_hub", "")
    if hub:
        repo, _, filename = hub.rpartition("/")
        weights = fetch(name, repo, [filename] if filename else list(WEIGHT_NAMES))
    else:
        try:
            weights = Path(open_clip.download_pretrained(tag))
        except Exception as error:
            raise not_fetched(name, tag.get("url", "its address"), error) from None
    return _finish(
        name,
        {"model_cfg": model_cfg, "preprocess_cfg": tag},
        weights,
        _tokenizer(name, arch),
        device,
    )


def _file_preprocess(arch: str, path: Path, tags: list[str]) -> dict[str, Any]:
    """Preprocessing for a bare weights file: a config beside it, else what all known tags share."""
    from open_clip import pretrained
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    beside = path.parent / CONFIG_NAME
    if beside.is_file():
        found = json.loads(beside.read_text(encoding="utf-8")).get("preprocess_cfg")
        if found:
            return dict(found)
    known = [
        merge_preprocess_dict(PreprocessCfg(), pretrained.get_pretrained_cfg(arch, tag))
        for tag in tags
    ]
    keys = ("mean", "std", "interpolation", "resize_mode")
    shared = {json.dumps([cfg[key] for key in keys]) for cfg in known}
    if len(shared) > 1:
        logger.warning(
            "model %s: known weights of this architecture differ in preprocessing; "
            "using that of %s. Put %s beside the weights to say otherwise",
            arch,
            tags[0],
            CONFIG_NAME,
        )
    return {key: known[0][key] for key in keys} if known else {}


def _finish(
    name: str, config: dict[str, Any], weights: Path, tokenizer: Any, device: str | torch.device
) -> Clip:
    import open_clip

    with torch.random.fork_rng(devices=[]):  # the random start is overwritten; leave no trace of it
        model = build_clip(config)
    if weights.suffix != ".safetensors" and _is_torchscript(weights):
        raise ClipNotFound(
            f"model {name!r}: {weights} is a TorchScript archive, which is a program; "
            "convert it to safetensors first"
        )
    try:
        open_clip.load_checkpoint(model, str(weights), strict=True)
    except Exception as error:
        reason = " ".join(str(error).split())[:240] or type(error).__name__
        if isinstance(error, pickle.UnpicklingError) or "weights_only" in reason:
            # torch's own message proposes to switch its check off
            reason = "not a file of tensors alone; other objects are never loaded"
        raise ClipNotFound(
            f"model {name!r}: {weights} does not hold these weights: {reason}"
        ) from None
    if any(
        not value.isfinite().all()
        for value in model.state_dict().values()
        if value.is_floating_point()
    ):
        raise ClipNotFound(f"model {name!r}: {weights} holds non-finite weights")
    return Clip(model, tokenizer, config, name=name, device=device)


def _is_torchscript(path: Path) -> bool:
    import zipfile

    try:
        with zipfile.ZipFile(path) as archive:
            return any(entry.split("/")[1:2] == ["code"] for entry in archive.namelist())
    except zipfile.BadZipFile:
        return False


def _visual_kind(visual: Any, open_clip: Any) -> str:
    if isinstance(visual, open_clip.modified_resnet.ModifiedResNet):
        return "resnet"
    if isinstance(visual, open_clip.transformer.VisionTransformer):
        return "vit" if visual.attn_pool is None else "pooler"
    if isinstance(visual, open_clip.timm_model.TimmModel):
        return "timm" if hasattr(visual.trunk, "forward_intermediates") else "trunk"
    return "other"


def _spatial_widths(kind: str, visual: Any, width: int) -> dict[str, int]:
    if kind == "resnet":
        return {"raw": int(visual.attnpool.v_proj.in_features), "pooled": width, "value": width}
    if kind == "vit":
        return {"raw": int(visual.ln_post.normalized_shape[0]), "projected": width}
    if kind == "timm":
        return {"raw": int(visual.trunk.num_features)}
    return {}


def _digest(model: nn.Module) -> str:
    """sha256 over names, shapes and float32 values, so equal for every file format and dtype."""
    total = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        total.update(f"{key}{list(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().numpy().data)
    return total.hexdigest()


def _tokenizer_config(tokenizer: Any) -> dict[str, Any]:
    config: dict[str, Any] = {
        "kind": type(tokenizer).__name__,
        "context_length": getattr(tokenizer, "context_length", None),
    }
    vocab = getattr(tokenizer, "vocab", None)
    if isinstance(vocab, dict):
        text = json.dumps(vocab, sort_keys=True, ensure_ascii=True)
        config["vocab_digest"] = hashlib.sha256(text.encode()).hexdigest()
    return config


def _truncated(tokenizer: Any, prompts: list[str]) -> list[str]:
    """Prompts that do not fit the context, found by tokenising into twice its length."""
    context = tokenizer.context_length
    vocab = getattr(tokenizer, "vocab", None)
    try:
        if isinstance(vocab, dict):
            long = type(tokenizer)(vocab, 2 * context)([*prompts, ""])
        else:
            long = tokenizer([*prompts, ""], context_length=2 * context)
    except TypeError:  # a tokenizer without a free length cannot be asked
        return []
    pad = long[-1, -1]
    cut = (long[:-1, context:] != pad).any(dim=1).tolist()
    return [prompt for prompt, is_cut in zip(prompts, cut, strict=True) if is_cut]


def _size(image_size: Any) -> int | list[int]:
    """One number for square inputs, so that the JSON form and its digest have one spelling."""
    if isinstance(image_size, (tuple, list)):
        sizes = [int(value) for value in image_size]
        return sizes[0] if len(set(sizes)) == 1 else sizes
    return int(image_size)
