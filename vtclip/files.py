# SPDX-License-Identifier: Apache-2.0
"""Files: their formats and digests, and, of vtclip.writing, writes that survive a kill."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtclip.writing import NewFiles as NewFiles
from vtclip.writing import is_leftover as is_leftover
from vtclip.writing import lock as lock
from vtclip.writing import locked as locked
from vtclip.writing import only_writer as only_writer
from vtclip.writing import read_settled as read_settled
from vtclip.writing import replacing as replacing
from vtclip.writing import settle as settle
from vtclip.writing import write_atomic as write_atomic
from vtclip.writing import write_together as write_together

if TYPE_CHECKING:
    from torch import Tensor

Json = dict[str, Any]
"""A JSON object, such as the contents of `result.json`."""


def printable(name: str) -> str:
    """`name` with undecodable bytes, controls and line ends written as escapes."""
    return "".join(
        letter
        if letter.isprintable()
        else letter.encode("unicode_escape", "surrogatepass").decode()
        for letter in name
    )


def several(count: int, one: str, many: str | None = None) -> str:
    """ "1 folder" or "2 folders"."""
    return f"{count} {one if count == 1 else many or one + 's'}"


class _LineFeeds(io.StringIO):
    """What `csv` writes, one line a call, with a line feed in place of both line ends."""

    def write(self, line: str) -> int:
        return super().write(line.removesuffix("\r\n") + "\n")


def csv_lines(rows: Iterable[Iterable[object]]) -> str:
    """`rows` as CSV in lines that end in a line feed; cells with any kind of line end are quoted.

    Python's writer quotes a carriage return only if its own lines end in one, and its reader then
    takes the rest of the name for another row.
    """
    text = _LineFeeds(newline="")
    csv.writer(text, lineterminator="\r\n").writerows(rows)
    return text.getvalue()


def default_cache() -> Path:
    """VTCLIP_CACHE, else ~/.cache/vtclip."""
    named = os.environ.get("VTCLIP_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "vtclip"


def cache_folder(cache_dir: str | Path | None) -> Path:
    """The named cache folder, else the usual one."""
    return default_cache() if cache_dir is None else Path(cache_dir).expanduser()


def is_below(path: str | Path, root: str | Path) -> bool:
    """Whether `path`, links followed, is `root` or lies in it."""
    real, top = os.path.realpath(path), os.path.realpath(root)
    return real == top or real.startswith(top.rstrip(os.sep) + os.sep)


def to_json(value: object) -> bytes:
    """JSON that every reader takes: NaN and infinities become null, keys keep their order."""
    return (_indented(_finite(value), "\n ") + "\n").encode("ascii")


_SCALARS = frozenset((str, int, bool, type(None)))
_encode = json.JSONEncoder(allow_nan=False).encode


def _indented(value: object, line: str) -> str:
    """What json.dumps returns with indent=1. That is Python code; a list of scalars, such as the
    digests of all images, goes through the encoder in C at once. line: line end and indent."""
    if not value or not isinstance(value, dict | list):
        return _encode(value)
    between, last = f",{line}", line[:-1]
    if isinstance(value, dict):
        items = (f"{_encode(key)}: {_indented(item, line + ' ')}" for key, item in value.items())
        return f"{{{line}{between.join(items)}{last}}}"
    if _SCALARS.issuperset(map(type, value)):
        text = json.dumps(value, separators=(between, ": "))
        return f"[{line}{text[1:-1]}{last}]"
    return f"[{line}{between.join(_indented(item, line + ' ') for item in value)}{last}]"


def _finite(value: object) -> object:
    if isinstance(value, list | tuple) and _SCALARS.issuperset(map(type, value)):
        return list(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, os.PathLike) else value


def read_json(path: Path, what: str) -> Json:
    """The object in a JSON file, or a ValueError that says in words why it is not `what`."""
    if not path.exists():
        raise FileNotFoundError(f"not {what}: {path} does not exist")
    if not path.is_file():
        raise ValueError(f"not {what}: {path} is not a file")
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not {what}: {path} is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"not {what}: {path} holds a {type(value).__name__}, not an object")
    return value


def json_digest(value: Mapping[str, object]) -> str:
    """SHA-256 of a JSON object, independent of key order and spacing."""
    text = json.dumps(_finite(value), sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over name, dtype, shape and bytes of every tensor, in the order of the names."""
    import torch  # late, so that the command line can use this module without torch

    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_safetensors(path: Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file whose metadata names the digest of its tensors."""
    from safetensors import SafetensorError

    if not path.exists():
        raise FileNotFoundError(f"not {what}: {path} does not exist")
    if not path.is_file():
        raise ValueError(f"not {what}: {path} is not a file")
    from safetensors.torch import load

    data = path.read_bytes()
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        metadata: dict[str, str] = header.get("__metadata__", {})
    except (SafetensorError, ValueError, KeyError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"not {what}: {path} is cut, damaged or another format ({reason})"
        ) from None
    if metadata.get("digest") != tensors_digest(tensors):
        raise ValueError(f"not {what}: the tensors in {path} do not have the digest the file names")
    return tensors, metadata
