# SPDX-License-Identifier: Apache-2.0
"""Files: their formats and digests, and, of vtclip.writing, writes that survive a kill."""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
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

logger = logging.getLogger(__name__)

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


FORMULA = ("=", "+", "-", "@", "'", "\uff1d", "\uff0b", "\uff0d", "\uff20")
_LATER_FORMULA = re.compile(";(?=\\s*[=+\\-@\uff1d\uff0b\uff0d\uff20])")
_ESCAPE = re.compile(r"\\(?:[\\nrt]|x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})")
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?")


def escape(name: str) -> str:
    """`name` as a cell of a CSV file holds it, which `unescape` takes back.

    What cannot be printed and the backslash are Python's escapes (`\\n`, `\\x1b`, `\\udcff` for the
    byte FF of a name that is no UTF-8, `\\\\`), so that a line stays a line. So that no spreadsheet
    takes a name for a formula, one that starts with = + - @ or a quote has one more quote in front,
    and a semicolon before one of these, where some begin a new cell, is `\\x3b`.
    """
    plain = name
    if not name.isprintable() or "\\" in name:
        plain = "".join(map(_escaped, name))
    plain = _LATER_FORMULA.sub(r"\\x3b", plain)
    return "'" + plain if plain.startswith(FORMULA) else plain


def _escaped(letter: str) -> str:
    return "\\\\" if letter == "\\" else printable(letter)


def unescape(cell: str) -> str:
    """The name that `escape` made `cell` of."""
    plain = cell[1:] if cell.startswith("'") else cell
    return _ESCAPE.sub(lambda found: found[0].encode("ascii").decode("unicode_escape"), plain)


def csv_lines(rows: Iterable[Iterable[object]]) -> str:
    """`rows` as CSV in lines that end in a line feed; text is as `escape` has it, numbers stay."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([_csv_cell(cell) for cell in row] for row in rows)
    return text.getvalue()


def _csv_cell(value: object) -> object:
    return _csv_text(value) if isinstance(value, str) else value


@functools.lru_cache(maxsize=4096)  # class names come again in every row
def _csv_text(text: str) -> str:
    """What is written like a number as it is, any other text as `escape` has it."""
    return text if _NUMBER.fullmatch(text) else escape(text)


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
        value = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"not {what}: {path} is not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"not {what}: {path} holds a {type(value).__name__}, not an object")
    return value


def parse_json(text: str | bytes) -> Any:
    """The value that `text` holds, or a ValueError in one line; NaN and infinities are no JSON."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def json_digest(value: Mapping[str, object]) -> str:
    """SHA-256 of a JSON object, independent of key order and spacing."""
    try:
        text = json.dumps(_finite(value), sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    except RecursionError:
        raise ValueError("a JSON value is nested too deeply") from None
    return hashlib.sha256(text.encode("ascii")).hexdigest()


SEALED = 2
"""The format version from which on a JSON file of this package carries a digest of itself."""
_older_files: set[Path] = set()  # that were mentioned already


def sealed(value: Mapping[str, object]) -> Json:
    """`value` as it is written: with its format version and the digest of all its contents."""
    body = {"format_version": SEALED, **value}
    return {**body, "digest": json_digest(body)}


def unsealed(value: Json, path: Path, what: str, where: str = "") -> Json:
    """The contents of what `sealed` returned, or a ValueError where the digest is not theirs.

    What an earlier version wrote has neither a format version nor a digest: it is returned as it
    is, and one line in the log says so, once for each file. where: a place in the file.
    """
    place = f"{path}, {where}" if where else str(path)
    body = {name: item for name, item in value.items() if name != "digest"}
    version = value.get("format_version")
    if "digest" in value:
        try:
            same = value["digest"] == json_digest(body)
        except ValueError as error:
            raise ValueError(f"not {what}: {place}: {error}") from None
        if not same:
            raise ValueError(
                f"not {what}: {place} was changed after it was written (its digest differs)"
            )
    elif "format_version" in value:
        raise ValueError(
            f"not {what}: {place} has format version {version!r} and no digest, which such a file "
            "must carry"
        )
    else:
        note_older(path)
        return body
    if type(version) is not int or version > SEALED:
        raise ValueError(
            f"not {what}: {place} has format version {version!r}, this vtclip reads up to {SEALED}"
        )
    del body["format_version"]
    return body


def note_older(path: Path, fact: str = "carries no digest") -> None:
    """Says once that a file is of an earlier version, so that damage to it would not be noticed."""
    if path not in _older_files:
        _older_files.add(path)
        logger.warning(
            "%s was written by an earlier version and %s: damage to it cannot be noticed",
            printable(str(path)), fact,
        )  # fmt: skip


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


def safetensors_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """The digest of a safetensors file: of its tensors and of all its metadata but the digest.

    Where there is no other metadata it is that of the tensors.
    """
    others = {name: text for name, text in metadata.items() if name != "digest"}
    own = tensors_digest(tensors)
    return json_digest({"tensors": own, "metadata": others}) if others else own


# what safetensors and torch raise of damaged headers: unknown dtypes, shapes beyond all memory
_UNREADABLE = (ValueError, LookupError, TypeError, RecursionError, RuntimeError, OverflowError)


def read_safetensors(
    path: Path, what: str, *, older: Callable[[Mapping[str, str]], bool] | None = None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file whose metadata names the digest of both.

    older: whether metadata is that of an earlier version, whose digest is of the tensors alone.
    """
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
        metadata: dict[str, str] = header.get("__metadata__") or {}
        digest = safetensors_digest(tensors, metadata)
        if metadata.get("digest") != digest and older is not None and older(metadata):
            digest = tensors_digest(tensors)
            note_older(path, "carries a digest of its tensors alone")
    except (SafetensorError, *_UNREADABLE) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"not {what}: {path} is cut, damaged or another format ({reason})"
        ) from None
    if metadata.get("digest") != digest:
        raise ValueError(
            f"not {what}: tensors and metadata of {path} do not have the digest it names"
        )
    return tensors, metadata
