# SPDX-License-Identifier: Apache-2.0
"""Weights from the hub client's cache or the hub; one clear line if neither has them."""

from __future__ import annotations

import socket
import urllib.parse
import urllib.request
from pathlib import Path

TIMEOUT_S = 5.0


class ClipNotFound(ValueError):
    """A model that is not on this machine and could not be fetched; says how to give a file."""


def fetch(name: str, repo: str, filenames: list[str]) -> Path:
    """The first of `filenames` that the hub client has cached or can fetch, without a long wait."""
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    for filename in filenames:
        cached = huggingface_hub.try_to_load_from_cache(repo, filename)
        if isinstance(cached, str):
            return Path(cached)
    reason = _unreachable(huggingface_hub.constants.ENDPOINT)
    if reason is not None:  # the hub client would retry for half a minute
        raise not_fetched(name, f"{repo}/{filenames[0]}", reason)
    last: Exception = ClipNotFound("nothing to fetch")
    for filename in filenames:
        try:
            return Path(huggingface_hub.hf_hub_download(repo, filename, etag_timeout=TIMEOUT_S))
        except LocalEntryNotFoundError as error:  # no network: the other names would fail as slowly
            raise not_fetched(name, f"{repo}/{filename}", error) from None
        except EntryNotFoundError as error:
            last = error
        except Exception as error:
            raise not_fetched(name, f"{repo}/{filename}", error) from None
    raise not_fetched(name, f"{repo}/{{{','.join(filenames)}}}", last)


def is_cached(repo: str, filename: str) -> bool:
    """Whether the hub client has the file in its cache; asks no network."""
    import huggingface_hub

    try:
        return isinstance(huggingface_hub.try_to_load_from_cache(repo, filename), str)
    except ValueError:  # no name that a repository could have
        return False


def _unreachable(endpoint: str) -> Exception | None:
    """Why the hub cannot be reached directly; None if it can, or if a proxy decides."""
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return ConnectionError("HF_HUB_OFFLINE is set")
    parts = urllib.parse.urlsplit(endpoint)
    if parts.hostname is None or parts.scheme in urllib.request.getproxies():
        return None
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        socket.create_connection((parts.hostname, port), timeout=TIMEOUT_S).close()
    except OSError as error:
        return error
    return None


def not_fetched(name: str, what: str, error: Exception) -> ClipNotFound:
    """The error for model `name`: what was looked for, why it is missing, what to give."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    arch = name.partition(":")[0]
    give = (
        "local-dir:/folder"
        if arch == "hf-hub"
        else f"{arch}:/path/to/weights.safetensors or local-dir:/folder"
    )
    return ClipNotFound(
        f"model {name!r}: {what} is neither cached nor could it be fetched "
        f"({reason[:160]}); give a local copy as {give}"
    )
