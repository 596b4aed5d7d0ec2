# SPDX-License-Identifier: Apache-2.0
"""The tensors of a TorchScript archive, as OpenAI published its models; the archive never runs.

Such an archive is a zip file: code/ holds a program, data.pkl a pickle that names the module tree,
data/ the bytes of the tensors. The program is never read. The pickle is read in two steps: every
operation of it must be on a list of those that build plain values (pickletools reads them without
executing any), and the names in it stand for four things only, none of which is a Python class or
function of the outside: modules (dictionaries here), tensors, ordered dictionaries and lists. Any
other name, and every damage, is a ValueError.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LONGEST_PICKLE = 64 << 20  # bytes; those of CLIP have about 100 thousand
MOST_ATTRIBUTES = 200_000
DEEPEST_TREE = 64  # modules within modules

_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# what torch's writer of archives emits: plain values, containers, names, calls of those names
_OPERATIONS = frozenset(
    [
        *("PROTO", "STOP", "FRAME", "MARK", "NONE", "NEWTRUE", "NEWFALSE"),
        *("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"),
        *("BINUNICODE", "SHORT_BINUNICODE", "BINSTRING", "SHORT_BINSTRING"),
        *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "LIST"),
        *("APPEND", "APPENDS", "EMPTY_DICT", "DICT", "SETITEM", "SETITEMS"),
        *("BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET"),
        *("GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID"),
    ]
)


class _Module:
    """A module of the archive: a bag of attributes, whatever its class was."""

    attributes: dict[str, Any]

    def __new__(cls) -> _Module:  # the pickle makes one without __init__
        module = super().__new__(cls)
        module.attributes = {}
        return module

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.attributes.update(state)


class _Storage:
    """A kind of storage by its dtype; not callable, so that the pickle cannot use it as a class."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


def is_torchscript(path: Path) -> bool:
    """Whether the file is a zip with a program in it, in the layout of TorchScript."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(entry.split("/")[1:2] == ["code"] for entry in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError):
        return False


def read_torchscript(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by their dotted names, and the plain numbers among the outermost attributes.

    Tensors keep dtype and shape and lie on the CPU; parameters, buffers and tensors that are plain
    attributes are not told apart. ValueError, in one line, for an archive that is damaged, is not
    TorchScript or names anything but tensors and modules.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            root = _read_tree(archive)
        found = _collect(root)
    except RecursionError:
        raise ValueError("damaged TorchScript archive: it is nested too deeply") from None
    except Exception as error:  # a damaged zip or pickle raises nearly anything
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ValueError(f"damaged or unsafe TorchScript archive: {reason}") from None
    numbers = {
        name: value for name, value in root.attributes.items() if isinstance(value, int | float)
    }
    return found, numbers


def _read_tree(archive: zipfile.ZipFile) -> _Module:
    pickles = [entry for entry in archive.namelist() if entry.split("/")[1:] == ["data.pkl"]]
    if len(pickles) != 1:
        raise ValueError(f"it must hold one data.pkl, got {len(pickles)}")
    top = pickles[0].split("/")[0]
    if f"{top}/byteorder" in archive.namelist() and _entry(archive, f"{top}/byteorder", 16) not in (
        b"little",
        b"",
    ):
        raise ValueError("its numbers are big-endian")
    data = _entry(archive, pickles[0], LONGEST_PICKLE)
    _check_operations(data)
    root = _Reader(data, archive, top).load()
    if not isinstance(root, _Module):
        raise ValueError(f"data.pkl holds a {type(root).__name__}, not a module")
    return root


def _entry(archive: zipfile.ZipFile, name: str, longest: int) -> bytes:
    info = archive.getinfo(name)
    if info.file_size > longest:
        raise ValueError(f"{name} has {info.file_size} bytes, more than {longest}")
    return archive.read(info)


def _check_operations(data: bytes) -> None:
    """Refuse operations that no archive needs, before any of them is carried out."""
    for operation, argument, _ in pickletools.genops(data):
        if operation.name not in _OPERATIONS:
            raise ValueError(f"data.pkl has the operation {operation.name}")
        # the unpickler would make room for as many values as the largest index
        if "BINPUT" in operation.name and argument is not None and argument > len(data):
            raise ValueError("data.pkl counts more values than it holds")


class _Reader(pickle.Unpickler):
    """Builds tensors, modules as bags, dictionaries and lists; looks no name up anywhere."""

    def __init__(self, data: bytes, archive: zipfile.ZipFile, top: str) -> None:
        super().__init__(io.BytesIO(data))
        self._archive, self._top = archive, top
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if module == "torch" and name in _DTYPES:
            return _Storage(_DTYPES[name])
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle" and name.startswith("build_") and name.endswith("list"):
            return _unchanged
        raise ValueError(f"it names {module}.{name}, which is neither a tensor nor a module")

    def persistent_load(self, pid: Any) -> Tensor:
        """The numbers of one storage, [n], read from data/KEY."""
        word, kind, key, _, count = pid
        if word != "storage" or not isinstance(kind, _Storage) or not isinstance(key, str):
            raise ValueError("data.pkl names a storage in an unknown way")
        if key not in self._storages:
            size = int(count) * kind.dtype.itemsize
            info = self._archive.getinfo(f"{self._top}/data/{key}")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != size:
                raise ValueError(f"storage {key} must have {size} bytes, got {info.file_size}")
            data = bytearray(self._archive.read(info))
            self._storages[key] = (
                torch.frombuffer(data, dtype=kind.dtype)
                if data
                else torch.empty(0, dtype=kind.dtype)
            )
        found = self._storages[key]
        if found.dtype != kind.dtype or len(found) != count:
            raise ValueError(f"storage {key} is named with two kinds or sizes")
        return found


def _tensor(
    storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: object
) -> Tensor:
    """A view of the storage; as_strided refuses what lies outside of it."""
    if math.prod(size) > len(storage) or len(size) != len(stride) or min((*size, 0)) < 0:
        raise ValueError(f"a tensor of shape {list(size)} on a storage of {len(storage)} numbers")
    return storage.as_strided(size, stride, offset)


def _unchanged(values: object) -> object:
    return values


def _collect(root: _Module) -> dict[str, Tensor]:
    """Every tensor by its dotted name, in the order of the archive."""
    found: dict[str, Tensor] = {}
    seen = 0

    def enter(module: _Module, prefix: str, depth: int) -> None:
        nonlocal seen
        if depth > DEEPEST_TREE:
            raise ValueError("its modules are nested too deeply")
        for name, value in module.attributes.items():
            seen += 1
            if seen > MOST_ATTRIBUTES:  # shared modules could be met without end
                raise ValueError(f"its modules have more than {MOST_ATTRIBUTES} attributes")
            if isinstance(value, _Module):
                enter(value, f"{prefix}{name}.", depth + 1)
            elif isinstance(value, Tensor):
                found[f"{prefix}{name}"] = value

    enter(root, "", 0)
    return found
