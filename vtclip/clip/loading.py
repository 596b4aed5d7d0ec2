# SPDX-License-Identifier: Apache-2.0
"""Model names (see vtclip.clip) to models: folders, files, the hub, open_clip's names."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import cast

import torch

from vtclip.clip.architecture import CLIP_VOCABULARY, architecture_of, build_clip
from vtclip.clip.folder_tokenizer import INSTALL, read_tokenizer
from vtclip.clip.hub import ClipNotFound, fetch, is_cached, not_fetched
from vtclip.clip.model import Clip
from vtclip.clip.names import CONFIG_NAME, ModelName, resolve, same_weights
from vtclip.clip.no_code import check_folder, check_no_code
from vtclip.clip.provenance import decide, tag_config
from vtclip.clip.texts import Tokenizer
from vtclip.clip.transformers_folders import (
    CONFIG,
    PREPROCESSOR_FILES,
    TOKENIZER_FILES,
    WEIGHT_FILES,
    is_transformers_folder,
    read_config,
    read_folder,
)
from vtclip.clip.weights import Weights, load_into, read_weights
from vtclip.files import Json, parse_json
from vtclip.schemas import by_name, check, either, maybe, obj, rows, table, whole

logger = logging.getLogger(__name__)
_of_demo: ContextVar[list[Callable[[], None]] | None] = ContextVar("of_demo", default=None)

DEMO_ASSETS = Path(__file__).parents[1] / "demo" / "assets"
_size, _layers = whole(1, 2**16), whole(0, 1000)  # beyond them building a model never ends
_pair = either(_size, rows(_size))
_vision = {"layers?": either(_layers, rows(_layers)), "width?": _size, "head_width?": _size}
_vision |= {"patch_size?": maybe(_pair), "image_size?": _pair, "siglip_trunk?": obj}
_text = {"layers?": _layers, "width?": _size, "heads?": _size, "context_length?": _size}
_CONFIG = table(
    {
        "model_cfg": table(
            {
                "embed_dim": _size,
                "vision_cfg": table(_vision),
                "text_cfg": table({**_text, "vocab_size?": whole(1, 2**22)}),
            }
        ),
        "preprocess_cfg?": maybe(obj),
    }
)
_WORDS = by_name(whole())
WEIGHT_NAMES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)


def load_clip(model: str | Path = "demo", device: str | torch.device = "cpu") -> Clip:
    """The frozen model that `model` names (see vtclip.clip), or ClipNotFound.

    Its `name` is what `model` stands for, with absolute paths: it names the same model from any
    working directory.
    """
    found = resolve(str(model))
    name = found.name
    if name == "demo":
        if not (DEMO_ASSETS / CONFIG_NAME).is_file():
            raise ClipNotFound(
                "model 'demo': the bundled model is not installed: "
                f"vtclip/demo/assets/{CONFIG_NAME} is missing"
            )
        return _load_folder(DEMO_ASSETS, name, device)
    if found.repo:
        return _load_hub(found, device)
    if found.path is not None and not found.arch:
        if found.path.is_dir() or found.typed.startswith("local-dir:"):
            return _load_folder(found.path, name, device)
        return _load_file(found, device)
    if found.path is not None:
        return _load_known_with_file(found, device)
    return _load_tag(found, device)


@contextmanager
def saying_of_demo(say: Callable[[], None]) -> Iterator[None]:
    """Within it `say` is called once, when work with the demo model begins."""
    token = _of_demo.set([say])
    try:
        yield
    finally:
        _of_demo.reset(token)


def work_begins(clip: Clip) -> None:
    """To be called where all cheap checks are done and images pass through `clip` from now on."""
    pending = _of_demo.get()
    if clip.name == "demo" and pending:
        pending.pop()()


def _load_folder(folder: Path, name: str, device: str | torch.device) -> Clip:
    path = folder / CONFIG_NAME
    if not path.is_file():
        if is_transformers_folder(folder):
            return _load_transformers(folder, name, device)
        raise ClipNotFound(
            f"model {name!r}: the folder must hold {CONFIG_NAME}, got "
            f"{'none' if folder.is_dir() else 'no folder'} at {folder} "
            f"(nor {CONFIG} of transformers' CLIP or SigLIP)"
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

        try:
            words = parse_json(vocab.read_text(encoding="utf-8"))
            check(words, _WORDS, str(vocab))
        except ValueError as error:
            raise ClipNotFound(f"model {name!r}: {vocab}: {error}") from None
        context = config["model_cfg"]["text_cfg"].get("context_length", 77)
        tokenizer: Tokenizer = WordTokenizer(words, context)
    else:
        tokenizer = _tokenizer(name, f"local-dir:{folder}", config["model_cfg"])
    return _finish(name, config, _read(name, weights), tokenizer, device)


def _load_transformers(folder: Path, name: str, device: str | torch.device) -> Clip:
    try:
        config, weights, tokenizer = read_folder(folder)
    except ValueError as error:
        raise ClipNotFound(f"model {name!r}: {error}") from None
    return _finish(name, config, weights, tokenizer, device)


def _load_hub(found: ModelName, device: str | torch.device) -> Clip:
    name, repo = found.name, found.repo
    was_cached = is_cached(repo, CONFIG)
    try:
        path = fetch(name, repo, [CONFIG_NAME, CONFIG])
    except ClipNotFound as error:
        same = same_weights(repo)
        raise ClipNotFound(
            f"{error}; its weights are also {same}" if same else str(error)
        ) from None
    if path.name == CONFIG:
        try:
            read_config(path.parent)
        except ValueError as error:
            raise ClipNotFound(f"model {name!r}: {error}") from None
        fetch(name, repo, list(WEIGHT_FILES))
        # each is used where it exists; a repository that was cached is not contacted again
        for extra in () if was_cached else (*PREPROCESSOR_FILES[:1], *TOKENIZER_FILES):
            try:
                fetch(name, repo, [extra])
            except ClipNotFound:
                logger.debug("%s has no %s", repo, extra)
        return _load_transformers(path.parent, name, device)
    config = _read_config(name, path)
    weights = fetch(name, repo, list(WEIGHT_NAMES))
    # a repository without a tokenizer is not contacted again, so that the cached files are enough
    has_tokenizer = config["model_cfg"].get("text_cfg", {}).get("hf_tokenizer_name")
    tokenizer = _tokenizer(
        name, name if has_tokenizer else f"local-dir:{path.parent}", config["model_cfg"]
    )
    return _finish(name, config, _read(name, weights), tokenizer, device)


def _read_config(name: str, path: Path) -> Json:
    try:
        config = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ClipNotFound(f"model {name!r}: {path} is not JSON: {error}") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_cfg"), dict):
        raise ClipNotFound(f"model {name!r}: {path} must hold model_cfg")
    try:
        check_no_code(config, path)
        check_folder(path.parent)
        check(config, _CONFIG, str(path))
    except ValueError as error:
        raise ClipNotFound(f"model {name!r}: {error}") from None
    return config


def _tokenizer(
    name: str, identifier: str, model_cfg: Json, beside: Path | None = None
) -> Tokenizer:
    """open_clip's tokenizer for `identifier`, or the one in the folder `beside`."""
    import open_clip

    text = model_cfg.get("text_cfg") or {}
    hub = text.get("hf_tokenizer_name")
    if hub and beside is not None:
        try:
            local = read_tokenizer(
                beside,
                context_length=text.get("context_length", 77),
                vocab_size=text.get("vocab_size", CLIP_VOCABULARY),
            )
        except ValueError as error:
            raise ClipNotFound(f"model {name!r}: {error}") from None
        if local is not None:
            return local
    place = "" if beside is None else f"; or put its tokenizer.json into {beside}"
    if hub and importlib.util.find_spec("transformers") is None:
        raise ClipNotFound(
            f"model {name!r}: its tokenizer, {hub}, needs transformers, which is not installed: "
            f"{INSTALL}{place}"
        )
    try:
        # said aloud: transformers asks at a terminal where it is told neither way
        trust = {"trust_remote_code": False} if hub else {}
        return cast("Tokenizer", open_clip.get_tokenizer(identifier, **trust))
    except Exception as error:
        if beside is None:
            raise not_fetched(name, f"its tokenizer {hub or ''}".strip(), error) from None
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ClipNotFound(
            f"model {name!r}: its tokenizer, {hub}, is neither cached nor could it be fetched "
            f"({reason}){place.replace('; or put', '; put')}"
        ) from None


def _load_known_with_file(found: ModelName, device: str | torch.device) -> Clip:
    """ARCHITECTURE:FILE and ARCHITECTURE:TAG:FILE."""
    import open_clip

    path = cast("Path", found.path)
    model_cfg = open_clip.get_model_config(found.arch)
    weights = _read(found.name, path)
    config = _decided(found.name, model_cfg, weights, found.arch, found.tag)
    tokenizer = _tokenizer(found.name, found.arch, config["model_cfg"], path.parent)
    return _finish(found.name, config, weights, tokenizer, device)


def _load_file(found: ModelName, device: str | torch.device) -> Clip:
    """FILE alone: the architecture is what `vtclip convert` wrote, else what the shapes show."""
    path = cast("Path", found.path)
    weights = _read(found.name, path)
    try:
        arch, config = config_of_file(weights)
        tokenizer = tokenizer_of_file(weights, arch, config["model_cfg"])
    except ClipNotFound as error:
        raise ClipNotFound(str(error).replace("model ''", f"model {found.name!r}")) from None
    except ValueError as error:
        raise ClipNotFound(f"model {found.name!r}: {path}: {error}") from None
    return _finish(found.name, config, weights, tokenizer, device)


def config_of_file(weights: Weights, arch: str = "", tag: str = "") -> tuple[str, Json]:
    """A known architecture ("" if none) and {model_cfg, preprocess_cfg} of weights in a file.

    arch, tag: where the user names them; else what the file says or its shapes show. ValueError
    where neither does.
    """
    import open_clip

    written = weights.facts.get("model_cfg")
    if arch:
        model_cfg = open_clip.get_model_config(arch)
    elif isinstance(written, dict):
        check_no_code(written, weights.path)
        arch, model_cfg = str(weights.facts.get("architecture") or ""), written
    else:
        arch, model_cfg = architecture_of(weights.tensors)
    return arch, decide(model_cfg, weights, arch=arch, tag=tag)


def tokenizer_of_file(weights: Weights, arch: str, model_cfg: Json) -> Tokenizer:
    """The tokenizer of a known architecture, of CLIP's vocabulary, or one beside the file."""
    from vtclip.clip.transformers_folders import tokenizer_of

    if arch:
        return _tokenizer("", arch, model_cfg, weights.path.parent)
    return tokenizer_of(weights.path.parent, model_cfg)


def _decided(name: str, model_cfg: Json, weights: Weights, arch: str, tag: str) -> Json:
    try:
        return decide(model_cfg, weights, arch=arch, tag=tag)
    except ValueError as error:
        raise ClipNotFound(f"model {name!r}: {error}") from None


def _load_tag(found: ModelName, device: str | torch.device) -> Clip:
    import open_clip

    name, arch = found.name, found.arch
    model_cfg = open_clip.get_model_config(arch)
    tag = tag_config(arch, found.tag)
    # weights trained with QuickGELU give silently worse features under GELU, so the tag decides
    if bool(tag.get("quick_gelu", False)) != bool(model_cfg.get("quick_gelu", False)):
        model_cfg["quick_gelu"] = bool(tag.get("quick_gelu", False))
        logger.info("model %a: quick_gelu=%s, as its weights need", name, model_cfg["quick_gelu"])
    hub = tag.get("hf_hub", "")
    if hub:
        repo, _, filename = hub.rpartition("/")
        weights = fetch(name, repo, [filename] if filename else list(WEIGHT_NAMES))
    else:
        try:
            weights = Path(open_clip.download_pretrained(tag))
        except Exception as error:
            raise not_fetched(name, tag.get("url", "its address"), error) from None
    config = {"model_cfg": model_cfg, "preprocess_cfg": tag}
    return _finish(name, config, _read(name, weights), _tokenizer(name, arch, model_cfg), device)


def _read(name: str, path: Path) -> Weights:
    try:
        return read_weights(path)
    except ValueError as error:
        raise ClipNotFound(f"model {name!r}: {path} does not hold these weights: {error}") from None


def _finish(
    name: str, config: Json, weights: Weights, tokenizer: Tokenizer, device: str | torch.device
) -> Clip:
    # the random weights are overwritten
    with _config_errors(name), torch.random.fork_rng(devices=[]):
        model = build_clip(config)
    try:
        load_into(model, weights)
    except ValueError as error:
        raise ClipNotFound(
            f"model {name!r}: {weights.path} does not hold these weights: {error}"
        ) from None
    if any(
        not value.isfinite().all()
        for value in model.state_dict().values()
        if value.is_floating_point()
    ):
        raise ClipNotFound(f"model {name!r}: {weights.path} holds non-finite weights")
    with _config_errors(name):
        return Clip(model, tokenizer, config, name=name, device=device)


@contextmanager
def _config_errors(name: str) -> Iterator[None]:
    """What open_clip raises of a config that makes no model or no preprocessing, in one line."""
    try:
        yield
    except (ArithmeticError, AttributeError, AssertionError, LookupError, RuntimeError, TypeError,
            ValueError) as error:  # fmt: skip
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ClipNotFound(f"model {name!r}: its config makes no model: {reason}") from None
