# SPDX-License-Identifier: Apache-2.0
"""What a typed model name stands for: the demo, a folder, a hub repository, known or own weights.

Names are compared without case, slashes, hyphens, underscores and other signs. What is taken for
something else than was typed is said once. What stands for nothing gets the nearest names.
"""

from __future__ import annotations

import difflib
import functools
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from vtclip.clip.hub import ClipNotFound, is_cached
from vtclip.files import printable

logger = logging.getLogger(__name__)

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".npz", ".npy", ".ckpt")
CONFIG_NAME = "open_clip_config.json"
# transformers' repositories, and where open_clip has the same weights
_OF_TRANSFORMERS = {
    "openai/clip-vit-base-patch32": "ViT-B-32:openai",
    "openai/clip-vit-base-patch16": "ViT-B-16:openai",
    "openai/clip-vit-large-patch14": "ViT-L-14:openai",
    "openai/clip-vit-large-patch14-336": "ViT-L-14-336:openai",
    "google/siglip-base-patch16-224": "ViT-B-16-SigLIP:webli",
    "google/siglip-base-patch16-256": "ViT-B-16-SigLIP-256:webli",
    "google/siglip-base-patch16-384": "ViT-B-16-SigLIP-384:webli",
    "google/siglip-base-patch16-512": "ViT-B-16-SigLIP-512:webli",
    "google/siglip-base-patch16-256-multilingual": "ViT-B-16-SigLIP-i18n-256:webli",
    "google/siglip-large-patch16-256": "ViT-L-16-SigLIP-256:webli",
    "google/siglip-large-patch16-384": "ViT-L-16-SigLIP-384:webli",
    "google/siglip-so400m-patch14-224": "ViT-SO400M-14-SigLIP:webli",
    "google/siglip-so400m-patch14-384": "ViT-SO400M-14-SigLIP-384:webli",
    "google/siglip2-base-patch32-256": "ViT-B-32-SigLIP2-256:webli",
    "google/siglip2-base-patch16-224": "ViT-B-16-SigLIP2:webli",
    "google/siglip2-base-patch16-256": "ViT-B-16-SigLIP2-256:webli",
    "google/siglip2-base-patch16-384": "ViT-B-16-SigLIP2-384:webli",
    "google/siglip2-base-patch16-512": "ViT-B-16-SigLIP2-512:webli",
    "google/siglip2-large-patch16-256": "ViT-L-16-SigLIP2-256:webli",
    "google/siglip2-large-patch16-384": "ViT-L-16-SigLIP2-384:webli",
    "google/siglip2-large-patch16-512": "ViT-L-16-SigLIP2-512:webli",
    "google/siglip2-so400m-patch14-224": "ViT-SO400M-14-SigLIP2:webli",
    "google/siglip2-so400m-patch14-384": "ViT-SO400M-14-SigLIP2-378:webli",
    "google/siglip2-so400m-patch16-256": "ViT-SO400M-16-SigLIP2-256:webli",
    "google/siglip2-so400m-patch16-384": "ViT-SO400M-16-SigLIP2-384:webli",
    "google/siglip2-so400m-patch16-512": "ViT-SO400M-16-SigLIP2-512:webli",
    "google/siglip2-giant-opt-patch16-256": "ViT-gopt-16-SigLIP2-256:webli",
    "google/siglip2-giant-opt-patch16-384": "ViT-gopt-16-SigLIP2-384:webli",
}
_HUB_PREFIXES = {"hfhub", "hf", "hub", "huggingface", "huggingfacehub", "huggingfaceco"}
_FOLDER_PREFIXES = {"localdir", "dir", "local", "folder", "localfolder"}
_GIVE = (
    "demo, ARCHITECTURE:TAG (such as ViT-B-32:openai), ARCHITECTURE:/path/to/weights.safetensors, "
    "local-dir:/folder or hf-hub:owner/name"
)


class ModelName(NamedTuple):
    """A name in parts; those that it does not have are empty.

    typed: as the user gave it. name: the same model from any working directory.
    arch, tag: of open_clip. path: a folder or a file, absolute. repo: of the hub.
    """

    typed: str
    name: str
    arch: str = ""
    tag: str = ""
    path: Path | None = None
    repo: str = ""


def resolve(typed: str) -> ModelName:
    """The parts of a typed name, or ClipNotFound with the nearest names; says what it guessed."""
    if not typed.strip():
        raise ClipNotFound(f"model {typed!r}: no name; give {_GIVE}")
    found = _resolve(typed)
    if found.path is None:
        guessed = found.name != typed
    else:  # a path that became absolute is no guess
        guessed = not typed.startswith(found.name.removesuffix(str(found.path)))
    if guessed:
        say_once(f"model {typed!r} is taken as {found.name}")
    return found


def _resolve(typed: str) -> ModelName:
    if typed == "demo":
        return ModelName(typed, typed)
    head, colon, rest = typed.partition(":")
    prefix = _compact(head)
    place = Path(typed).expanduser()
    if colon and head == "local-dir" and rest.strip():
        return _folder(typed, rest, f"{head}:")
    if colon and head == "hf-hub":
        if not rest.strip("/ "):
            raise ClipNotFound(f"model {typed!r}: no repository; give hf-hub:owner/name")
        return ModelName(typed, typed, repo=rest)
    if place.is_dir():
        return _folder(typed, typed, "")
    if place.is_file() or (not colon and place.suffix.lower() in WEIGHT_SUFFIXES):
        if not place.is_file():
            raise ClipNotFound(f"model {typed!r}: no such weights file: {place}")
        return ModelName(typed, str(_absolute(place)), path=_absolute(place))
    web = re.fullmatch(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([^/]+/[^/]+).*", typed)
    if web:
        return ModelName(typed, f"hf-hub:{web[1]}", repo=web[1])
    if colon and prefix in _HUB_PREFIXES and "/" in rest:
        repo = rest.strip("/")
        return ModelName(typed, f"hf-hub:{repo}", repo=repo)
    if colon and prefix in _FOLDER_PREFIXES and not rest.strip():
        raise ClipNotFound(f"model {typed!r}: no folder; give local-dir:/folder")
    if colon and prefix in _FOLDER_PREFIXES:
        return _folder(typed, rest, "local-dir:")
    arch = architectures().get(_compact(head))
    if arch is None:
        return _without_architecture(typed)
    if rest:
        return _with_rest(typed, arch, rest)
    tags = tags_of(arch)
    # OpenAI's package spells its own models with a slash, so its weights are meant
    if "/" in head and "openai" in tags:
        return ModelName(typed, f"{arch}:openai", arch, "openai")
    if len(tags) == 1:
        return ModelName(typed, f"{arch}:{tags[0]}", arch, tags[0])
    raise ClipNotFound(f"model {typed!r}: an architecture without weights; {_give_weights(arch)}")


def resolve_architecture(typed: str) -> tuple[str, str]:
    """Architecture and tag ("" where none is given) of ARCHITECTURE[:TAG], or ClipNotFound."""
    arch = architectures().get(_compact(typed))
    if arch is not None:
        return arch, ""
    found = resolve(typed)
    if not found.arch or found.path is not None:
        raise ClipNotFound(f"model {typed!r}: must be ARCHITECTURE or ARCHITECTURE:TAG here")
    return found.arch, found.tag


def _with_rest(typed: str, arch: str, rest: str) -> ModelName:
    """ARCH:REST, where REST is a file, a tag, or TAG:FILE."""
    tags = {_compact(tag): tag for tag in tags_of(arch)}
    first, colon, last = rest.partition(":")
    path = Path(rest).expanduser()
    tag = ""
    if not path.is_file() and colon and last and not Path(first).is_absolute():
        tag = tags.get(_compact(first), "")
        if not tag:
            raise _unknown_tag(typed, arch, first)
        path = Path(last).expanduser()
        rest = last
    known = "" if tag else tags.get(_compact(rest), "")
    if path.is_file() or (not known and _like_a_path(rest, path)):
        if not path.is_file():
            here = f"{path} is a folder" if path.is_dir() else f"no such weights file: {path}"
            raise ClipNotFound(f"model {typed!r}: {here}")
        whole = _absolute(path)
        return ModelName(typed, ":".join(filter(None, (arch, tag, str(whole)))), arch, tag, whole)
    if known:
        return ModelName(typed, f"{arch}:{known}", arch, known)
    raise _unknown_tag(typed, arch, rest)


def _unknown_tag(typed: str, arch: str, tag: str) -> ClipNotFound:
    near = nearest_of(tag, tags_of(arch)) or ";"
    return ClipNotFound(f"model {typed!r}: unknown weights tag {tag!r}{near} {_give_weights(arch)}")


def _without_architecture(typed: str) -> ModelName:
    pair = _pairs().get(_compact(typed))  # an architecture and a tag with another sign between them
    if pair is not None:
        return ModelName(typed, ":".join(pair), *pair)
    owner, _, _ = typed.partition("/")
    is_repo = bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", typed))
    if is_repo and (is_cached(typed, CONFIG_NAME) or is_cached(typed, "config.json")):
        return ModelName(typed, f"hf-hub:{typed}", repo=typed)
    arch, _, tag = hub_names().get(_compact(typed), "").partition(":")
    if arch:
        return ModelName(typed, f"{arch}:{tag}", arch, tag)
    known = ["demo", *architectures().values(), *_OF_TRANSFORMERS, *_repositories()]
    near = nearest_of(typed, known) or nearest_of(typed.partition(":")[0], known)
    give = f"hf-hub:{typed} for a repository of the hub, or {_GIVE}" if is_repo else _GIVE
    raise ClipNotFound(
        f"model {typed!r}: neither a folder nor a known architecture{near or ';'} give {give}"
    )


def _folder(typed: str, path: str, prefix: str) -> ModelName:
    whole = _absolute(Path(path).expanduser())
    return ModelName(typed, f"{prefix}{whole}", path=whole)


def _absolute(path: Path) -> Path:
    """From any working directory; links stay, because a cache's links have the files' names."""
    return Path(os.path.abspath(path))


def _like_a_path(rest: str, path: Path) -> bool:
    return "/" in rest or os.sep in rest or path.suffix.lower() in WEIGHT_SUFFIXES


def _give_weights(arch: str) -> str:
    tags = tags_of(arch)
    shown = ", ".join(tags[:6]) + (", ..." if len(tags) > 6 else "")
    return (
        f"give {arch}:TAG (one of {shown or 'none known'}) or {arch}:/path/to/weights.safetensors"
    )


def _compact(name: str) -> str:
    """The letters and digits of a name in lower case; 336px is 336."""
    return re.sub(r"[^a-z0-9]", "", re.sub(r"(\d)px\b", r"\1", name.lower()))


@functools.cache
def architectures() -> dict[str, str]:
    """open_clip's architectures, by their letters and digits."""
    import open_clip

    return {_compact(name): name for name in sorted(open_clip.list_models())}


def tags_of(arch: str) -> list[str]:
    """The tags of an architecture's published weights."""
    import open_clip

    return list(open_clip.list_pretrained_tags_by_model(arch))


@functools.cache
def _pairs() -> dict[str, tuple[str, str]]:
    return {
        _compact(arch + tag): (arch, tag)
        for arch in architectures().values()
        for tag in tags_of(arch)
    }


@functools.cache
def _repositories() -> dict[str, str]:
    """Repositories of the hub from which open_clip takes the weights of ARCHITECTURE:TAG."""
    from open_clip import pretrained

    found: dict[str, str] = {}
    # the shorter name first: ViT-B-32 before ViT-B-32-quickgelu, whose tags are the same weights
    for arch in sorted(architectures().values(), key=len):
        for tag in tags_of(arch):
            hub = pretrained.get_pretrained_cfg(arch, tag).get("hf_hub", "")
            repo = "/".join(hub.split("/")[:2])
            if repo.count("/") == 1:
                found.setdefault(repo, f"{arch}:{tag}")
    return found


@functools.cache
def hub_names() -> dict[str, str]:
    """ARCHITECTURE:TAG by the letters and digits of a repository's name, with and without owner."""
    known = {**_OF_TRANSFORMERS, **_repositories()}
    whole = {_compact(repo): name for repo, name in known.items()}
    alone = {_compact(repo.partition("/")[2]): name for repo, name in reversed(known.items())}
    return {**alone, **whole}


def same_weights(repo: str) -> str | None:
    """ARCHITECTURE:TAG of the weights that a repository of transformers has."""
    return _OF_TRANSFORMERS.get(repo.lower())


def nearest_of(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'X' or 'Y'?" for at most three names like `name`, or nothing."""
    by_key = {_compact(other): other for other in known}
    near = difflib.get_close_matches(_compact(name), by_key, n=3, cutoff=0.62)
    if not near:
        return ""
    words = [repr(by_key[key]) for key in near]
    return f"; did you mean {' or '.join(filter(None, [', '.join(words[:-1]), words[-1]]))}?"


@functools.cache
def say_once(line: str) -> None:
    """A warning that is not repeated in this process."""
    logger.warning("%s", printable(line))
