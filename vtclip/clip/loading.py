# SPDX-License-Identifier: Apache-2.0
"""Model names (see vtclip.clip) to models: folders, the hub, open_clip's names."""

from __future__ import annotations

import json
import logging
import pickle
from copy import deepcopy
from pathlib import Path
from typing import cast

import torch
from torch import nn

from vtclip.clip.hub import ClipNotFound, fetch, not_fetched
from vtclip.clip.model import Clip
from vtclip.clip.texts import Tokenizer
from vtclip.files import Json

logger = logging.getLogger(__name__)

DEMO_ASSETS = Path(__file__).parents[1] / "demo" / "assets"
CONFIG_NAME = "open_clip_config.json"
WEIGHT_NAMES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)
WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


def build_clip(config: Json) -> nn.Module:
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


def load_clip(model: str | Path = "demo", device: str | torch.device = "cpu") -> Clip:
    """The frozen model that `model` names (see vtclip.clip), or ClipNotFound."""
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
        from vtclip.clip.word_tokenizer import WordTokenizer

        words = json.loads(vocab.read_text(encoding="utf-8"))
        context = config["model_cfg"]["text_cfg"].get("context_length", 77)
        tokenizer: Tokenizer = WordTokenizer(words, context)
    else:
        tokenizer = _tokenizer(name, f"local-dir:{folder}")
    return _finish(name, config, weights, tokenizer, device)


def _load_hub(name: str, device: str | torch.device) -> Clip:
    repo = name.removeprefix("hf-hub:")
    path = fetch(name, repo, [CONFIG_NAME])
    config = _read_config(name, path)
    weights = fetch(name, repo, list(WEIGHT_NAMES))
    # a repository without a tokenizer is not contacted again, so that the cached files are enough
    has_tokenizer = config["model_cfg"].get("text_cfg", {}).get("hf_tokenizer_name")
    tokenizer = _tokenizer(name, name if has_tokenizer else f"local-dir:{path.parent}")
    return _finish(name, config, weights, tokenizer, device)


def _read_config(name: str, path: Path) -> Json:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ClipNotFound(f"model {name!r}: {path} is not JSON: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_cfg"), dict):
        raise ClipNotFound(f"model {name!r}: {path} must hold model_cfg")
    return config


def _tokenizer(name: str, identifier: str) -> Tokenizer:
    import open_clip

    try:
        return cast("Tokenizer", open_clip.get_tokenizer(identifier))
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


def _file_preprocess(arch: str, path: Path, tags: list[str]) -> Json:
    """Preprocessing for a weights file: from a config next to it, else what all tags share."""
    from open_clip import pretrained
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    config = path.parent / CONFIG_NAME
    if config.is_file():
        preprocess = json.loads(config.read_text(encoding="utf-8")).get("preprocess_cfg")
        if preprocess:
            return dict(preprocess)
    known = [
        merge_preprocess_dict(PreprocessCfg(), pretrained.get_pretrained_cfg(arch, tag))
        for tag in tags
    ]
    keys = ("mean", "std", "interpolation", "resize_mode")
    shared = {json.dumps([cfg[key] for key in keys]) for cfg in known}
    if len(shared) > 1:
        logger.warning(
            "model %s: known weights of this architecture differ in preprocessing; "
            "using that of %s. Put %s next to the weights to change it",
            arch,
            tags[0],
            CONFIG_NAME,
        )
    return {key: known[0][key] for key in keys} if known else {}


def _finish(
    name: str, config: Json, weights: Path, tokenizer: Tokenizer, device: str | torch.device
) -> Clip:
    import open_clip

    with torch.random.fork_rng(devices=[]):  # the random weights are overwritten
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
