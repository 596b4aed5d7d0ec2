# SPDX-License-Identifier: Apache-2.0
"""Files that survive a kill and a full disk: atomic writes, digests, one writer per folder.

A write goes to `NAME.new` in the same folder, is flushed to the disk, and then replaces
`NAME` in one step, so that a reader finds either the old bytes or the new ones. A symbolic link is
followed: the file it points to is replaced and the link stays. Permissions follow the umask.
"""

from __future__ import annotations

import contextlib
import csv
import errno
import hashlib
import io
import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

try:
    import fcntl as _fcntl

    fcntl: Any = _fcntl
except ImportError:  # Windows has no flock; there the folder is not locked
    fcntl = None


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


def write_new(path: Path, data: bytes) -> Path:
    """Writes `data` to `path` + ".new" and flushes it to the disk; `path` itself is not touched."""
    path = Path(os.path.realpath(path))
    fresh = path.with_name(path.name + ".new")
    try:
        with open(fresh, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        fresh.unlink(missing_ok=True)
        message = f"cannot write {len(data)} bytes to {path}: {error.strerror}"
        raise OSError(error.errno, message, str(path)) from error
    return fresh


def move_new(path: Path) -> None:
    """Replaces `path` by `path` + ".new" and flushes the folder's entry."""
    path = Path(os.path.realpath(path))
    os.replace(path.with_name(path.name + ".new"), path)
    _flush_entries(path.parent)


def _flush_entries(folder: Path) -> None:
    """Flushes a folder's list of files to the disk, on the systems that can.

    Windows opens no folders, and some network file systems have no such flush; there the rename
    is all that can be done. Any other failure is an error.
    """
    if fcntl is None:
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes) -> None:
    """Replaces the contents of `path` in one step."""
    write_new(path, data)
    move_new(path)


def write_together(files: Mapping[Path, bytes]) -> None:
    """Write every file under a new name, then rename all; where a write fails none is replaced."""
    written = []
    try:
        for path, data in files.items():
            written.append(write_new(path, data))
    except OSError:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    for path in files:
        move_new(path)


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


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Locks `folder` against a second writer; the lock ends with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(f"{folder} is being written by another run") from None
        yield
    finally:
        os.close(handle)


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
