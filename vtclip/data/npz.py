# SPDX-License-Identifier: Apache-2.0
"""Features in an .npz file, as many data sets of them are passed around.

    image          [N, C]            image features, any float dtype
    label          [N]               class of each row, 0..K-1
    classname      [K]               class names
    text           [K, C] or [M, K, C] for M prompts
    prompt         [M]               names of the prompts; "averageprompt" is left out of the mean
    fname          [N]               names of the rows (else their numbers)
    spatial        [n, L, Cs]        spatial features
    spatial_index  [n]               the rows of image to which they belong (else n = N)
    projection     [Cs, C]           maps spatial features to the space of text
    temperature    []                log of the logit scale (else the scale is 100)

With M prompts the class texts are the normalised mean of normalised rows, or those of one prompt.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from vtclip.data.records import MemoryStore, Records, check_finite, check_rows, digest_of
from vtclip.names import option

Array = NDArray[np.generic]

AVERAGE = "averageprompt"
# a larger member that shrinks a hundredfold does not hold features: it is a trap
BOMB_BYTES, BOMB_RATIO = 64 * 2**20, 100
KEYS = frozenset(
    ("image", "label", "classname", "text", "prompt", "fname", "spatial", "spatial_index")
    + ("projection", "temperature")
)


def open_npz(
    path: str | Path,
    *,
    prompt: str | None = None,
    need_spatial: bool = False,
    labels: bool = True,
) -> Records:
    """The table in `path`; `need_spatial` keeps rows with spatial features and their classes.

    labels: without them all rows are of one class with an empty text, whatever the file says of
        classes.
    """
    path = Path(path)
    arrays = _read(path)
    if not labels and "image" in arrays and arrays["image"].ndim == 2:
        N, C = arrays["image"].shape
        of_classes = ("label", "classname", "text", "prompt")
        arrays = {key: value for key, value in arrays.items() if key not in of_classes}
        arrays["label"], arrays["classname"] = np.zeros(N, dtype=np.int64), np.array(["image"])
        arrays["text"] = np.ones((1, C), dtype=np.float32)
    for key in ("image", "label", "classname", "text"):
        if key not in arrays:
            raise ValueError(
                f"{path.name}: array {key!r} is missing, got {', '.join(sorted(arrays))}"
            )
    image = _floats(path, "image", arrays["image"], (2,))
    label = _integers(path, "label", arrays["label"])
    names = _strings(path, "fname", arrays["fname"]) if "fname" in arrays else []
    if len(set(names)) != len(label):
        names = [str(row) for row in range(len(label))]
    if len(label) != len(image):
        raise ValueError(f"{path.name}: label must hold {len(image)} entries, got {len(label)}")
    class_names = _strings(path, "classname", arrays["classname"])
    text, views, templates = class_texts(path, arrays, prompt)
    spatial, index, projection = _spatial(path, arrays, len(image))
    if need_spatial and spatial is None:
        raise ValueError(
            f"{path.name}: spatial features are needed, but there is no array 'spatial'"
        )
    digests = {"images": digest_of(image), "text": digest_of(text)}
    if spatial is not None:
        digests["spatial"] = digest_of(spatial)
    info = {
        "kind": "npz",
        "path": path.name,
        "templates": templates,
        "model": None,
        "transform": None,
        "spatial": None if spatial is None else ("raw" if projection is None else "projected"),
        "digests": digests,
    }
    everywhere = spatial is not None and index is None
    keep = torch.arange(len(image))
    if need_spatial and index is not None:
        keep = index
    store = MemoryStore(
        _with_direction(path, "image", image)[keep],
        spatial if need_spatial or everywhere else None,
        projection,
    )
    records = Records(
        store,
        class_names=class_names,
        text=text,
        text_views=views,
        label=label[keep],
        names=[names[i] for i in keep.tolist()],
        logit_scale=_logit_scale(path, arrays),
        info=info,
    )
    if need_spatial and index is not None:
        records = records.subset_classes(sorted(set(records.label.tolist())))
    return records


def _logit_scale(path: Path, arrays: dict[str, Array]) -> float:
    if "temperature" not in arrays:
        return 100.0
    log_scale = np.asarray(arrays["temperature"], dtype=np.float64).reshape(-1)
    if len(log_scale) != 1 or not abs(log_scale[0]) < 100:
        raise ValueError(
            f"{path.name}: temperature must be one log of a scale, within -100..100, "
            f"got {log_scale.tolist()[:3]}"
        )
    return math.exp(log_scale[0])


def _read(path: Path) -> dict[str, Array]:
    if not path.is_file():
        raise ValueError(f"source: no such file: {path}")
    try:
        with zipfile.ZipFile(path) as archive, _headers_of_python_2():
            for member in archive.infolist():
                if (
                    member.file_size > BOMB_BYTES
                    and member.file_size > BOMB_RATIO * member.compress_size
                ):
                    raise ValueError(
                        f"{path.name}: {member.filename} unpacks to "
                        f"{member.file_size} bytes from {member.compress_size}; refused"
                    )
                _check_header(archive, member)
        with np.load(path, allow_pickle=False) as arrays, _headers_of_python_2():
            if not isinstance(arrays, Mapping):
                raise ValueError(f"{path.name}: not an .npz file")
            found = {key: arrays[key] for key in arrays if key in KEYS}
        for key, array in found.items():
            if not isinstance(array, np.ndarray):  # a member that is no .npy comes as its bytes
                raise ValueError(f"{key} is no array")
        return found
    except (
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        OSError,
        NotImplementedError,
        RuntimeError,
        KeyError,
        MemoryError,
        OverflowError,
        SyntaxError,
        tokenize.TokenError,  # of numpy's reader of headers
        TypeError,
    ) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ValueError(f"{path.name}: not a readable .npz file: {reason}") from None
    except ValueError as error:
        if "allow_pickle" in str(error):
            raise ValueError(f"{path.name}: holds Python objects, which are never loaded") from None
        reason = " ".join(str(error).removeprefix(path.name + ": ").split())[:240]
        raise ValueError(f"{path.name}: {reason}") from None


@contextlib.contextmanager
def _headers_of_python_2() -> Iterator[None]:
    """Without NumPy's warning of sizes such as 6L, which it reads rightly."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Reading `.npy` or `.npz` file", UserWarning)
        yield


def _check_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Refuse a shape beyond the member's bytes: numpy makes room for it before it reads them."""
    if Path(member.filename).stem not in KEYS or not member.filename.endswith(".npy"):
        return
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0}.get(
            version, np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("allow_pickle")
    size = math.prod(shape) * dtype.itemsize
    if min((*shape, 0)) < 0 or size > member.file_size:
        raise ValueError(
            f"{member.filename} declares {' x '.join(map(str, shape))} numbers, more than its "
            f"{member.file_size} bytes hold"
        )


def _floats(path: Path, key: str, array: Array, dims: tuple[int, ...]) -> Tensor:
    if array.dtype.kind != "f":
        raise TypeError(f"{path.name}: {key} must hold floats, got {array.dtype}")
    if array.ndim not in dims or 0 in array.shape:
        raise ValueError(
            f"{path.name}: {key} must have {' or '.join(map(str, dims))} non-empty "
            f"dimensions, got {list(array.shape)}"
        )
    native = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("="))
    if native.dtype.itemsize not in (2, 4, 8):
        native = native.astype(np.float64)
    try:
        return check_finite(torch.from_numpy(native), key)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None


def _with_direction(path: Path, key: str, rows: Tensor) -> Tensor:
    try:
        return check_rows(rows, key)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from None


def _integers(path: Path, key: str, array: Array) -> Tensor:
    if array.dtype.kind not in "iu" or array.ndim != 1:
        raise ValueError(
            f"{path.name}: {key} must be a row of integers, got {array.dtype} {list(array.shape)}"
        )
    return torch.from_numpy(array.astype(np.int64))


def _strings(path: Path, key: str, array: Array) -> list[str]:
    if array.dtype.kind not in "US" or array.ndim != 1:
        raise ValueError(
            f"{path.name}: {key} must be a row of strings, got {array.dtype} {list(array.shape)}"
        )
    if array.dtype.kind == "S":
        try:
            return [value.decode("utf-8") for value in array.tolist()]
        except UnicodeDecodeError:
            raise ValueError(f"{path.name}: {key} must be texts in UTF-8") from None
    codes = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")).view(np.uint32)
    if array.dtype.itemsize and len(codes) and int(codes.max()) > 0x10FFFF:
        raise ValueError(f"{path.name}: {key} must be texts, got numbers that are no letters")
    return [str(value) for value in array.tolist()]


def class_texts(
    path: Path, arrays: dict[str, Array], prompt: str | None
) -> tuple[Tensor, Tensor, list[str]]:
    """Mean class texts [K, C], class texts of each prompt [K, M, C], and the prompts' names.

    All rows have length 1.
    """
    text = _floats(path, "text", arrays["text"], (2, 3)).float()
    names = _strings(path, "prompt", arrays["prompt"]) if "prompt" in arrays else []
    if text.dim() == 2:
        if prompt is not None:
            raise ValueError(
                f"{path.name}: {option('prompt')} {prompt!r} cannot be chosen, text is for one "
                "prompt"
            )
        text = functional.normalize(_with_direction(path, "text", text), dim=-1)
        return text, text[:, None], names
    if names and len(names) != len(text):
        raise ValueError(
            f"{path.name}: prompt must name the {len(text)} rows of text, got {len(names)} names"
        )
    if prompt is not None:
        if prompt not in names:
            near = difflib.get_close_matches(prompt, names, n=3) or names[:3]
            raise ValueError(
                f"{path.name}: no prompt {prompt!r} among {len(names)}, "
                f"e.g. {', '.join(map(repr, near))}"
            )
        chosen = [names.index(prompt)]
    else:
        chosen = [m for m in range(len(text)) if not names or names[m] != AVERAGE]
    rows = functional.normalize(_with_direction(path, "text", text[chosen]), dim=-1)  # [m, K, C]
    mean = _with_direction(path, "mean text", rows.mean(dim=0))
    used = [names[m] for m in chosen] if names else []
    return functional.normalize(mean, dim=-1), rows.transpose(0, 1), used


def _spatial(
    path: Path, arrays: dict[str, Array], num_rows: int
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if "spatial" not in arrays:
        return None, None, None
    spatial = _floats(path, "spatial", arrays["spatial"], (3,))
    index = projection = None
    if "spatial_index" in arrays:
        index = _integers(path, "spatial_index", arrays["spatial_index"])
        if (
            len(set(index.tolist())) != len(index)
            or not len(index)
            or (int(index.min()) < 0 or int(index.max()) >= num_rows)
        ):
            raise ValueError(
                f"{path.name}: spatial_index must hold different rows below {num_rows}"
            )
    expected = num_rows if index is None else len(index)
    if len(spatial) != expected:
        raise ValueError(f"{path.name}: spatial must hold {expected} rows, got {len(spatial)}")
    if "projection" in arrays:
        projection = _floats(path, "projection", arrays["projection"], (2,)).float()
        if projection.shape[0] != spatial.shape[2]:
            raise ValueError(
                f"{path.name}: projection must be [{spatial.shape[2]}, C], "
                f"got {list(projection.shape)}"
            )
    return spatial, index, projection
