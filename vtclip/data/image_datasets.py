# SPDX-License-Identifier: Apache-2.0
"""Python objects that hold or list images, and folders that the library datasets saved.

What is read: `Dataset` and `DatasetDict` of Hugging Face's datasets, in memory or saved on disk
(the extra `datasets`); `torchvision.datasets.ImageFolder` and what has its `samples` and `classes`;
any data set with a length, `classes` and items (PIL image, class); subsets of these; a pandas
DataFrame; a pair (paths, labels). A dictionary from split names to these has roles.

Transforms of a data set are not applied: the model's own preprocessing is. Relative paths count
from the working directory of the moment, and are kept as they are.
"""

from __future__ import annotations

import io
import os
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vtclip.data.decode import ImageError, as_rgb, read_file
from vtclip.data.folders import scan_folder
from vtclip.data.image_files import ImageFiles, InMemory
from vtclip.data.list_rows import LABELS, ROLE_NAMES, Row, checked_names, images_of_rows, role_of
from vtclip.files import printable

ACCEPTED = (
    "a folder of class folders, a list (.csv, .tsv, .jsonl, .json, .parquet), a folder saved by "
    "the library datasets, a features folder, an .npz file, a Dataset or DatasetDict of the "
    "library datasets, an ImageFolder or a data set with classes and (PIL image, class) items, a "
    "DataFrame, or a pair (paths, labels)"
)
SAVED = (("dataset_dict.json",), ("dataset_info.json", "state.json"))


def is_saved_dataset(folder: str | Path) -> bool:
    """Whether `save_to_disk` of the library datasets wrote this folder."""
    return any(all((Path(folder) / name).is_file() for name in names) for names in SAVED)


def read_saved_dataset(folder: str | Path) -> ImageFiles:
    """The images of a folder that `save_to_disk` wrote; its parts have roles."""
    title = printable(Path(folder).resolve().name)
    try:
        import datasets
    except ModuleNotFoundError:
        raise ValueError(
            f"source: {title} is a saved dataset and needs the library datasets; "
            "pip install 'vtclip[datasets]' brings it"
        ) from None
    try:
        found = datasets.load_from_disk(os.fspath(folder))
    except Exception as error:  # it and Arrow raise many kinds for damaged folders
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise ValueError(f"source: {title} is not a readable saved dataset: {reason}") from None
    return _images_of(found, title, Path(folder))


def as_source_object(source: object) -> Path | InMemory:
    """A Python object as a source: its folder where it is just that, else its images in memory.

    A TypeError that lists what is accepted where it is none of the known kinds.
    """
    name = type(source).__name__
    samples = getattr(source, "samples", None)
    root = getattr(source, "root", None)
    images = _images_of(source, f"the {name}", Path.cwd())
    if (
        samples is not None
        and isinstance(root, (str, os.PathLike))
        and _is_whole(images, Path(root))
    ):
        return Path(root)
    kind = "pair" if isinstance(source, tuple) else name
    return InMemory(kind, f"{len(images.names)} images of a {kind}", images)


def _is_whole(images: ImageFiles, root: str | Path) -> bool:
    """Whether `images` are what a scan of the folder `root` finds."""
    try:
        scanned = scan_folder(root)
    except (ValueError, OSError):
        return False

    def classes(found: ImageFiles) -> set[tuple[str, str]]:
        return {
            (os.path.abspath(found.path(name)), found.class_names[k])
            for name, k in zip(found.names, found.label, strict=True)
        }

    return classes(images) == classes(scanned)


def _images_of(source: object, title: str, root: Path) -> ImageFiles:
    if isinstance(source, Mapping):
        return _parts(source, title, root)
    if _is_a(source, "datasets", "Dataset"):
        return _hugging_face(source, title, root)
    if _is_a(source, "pandas", "DataFrame"):
        table: Any = source
        cells = table.to_dict("records")
        rows = [Row(f"row {number}", row) for number, row in enumerate(cells)]
        return images_of_rows(title, [str(column) for column in table.columns], rows, root)
    if isinstance(source, tuple) and len(source) == 2:
        return _pairs(source[0], source[1], root)
    data, indices = _unwrapped(source)
    if hasattr(data, "samples") and hasattr(data, "classes"):
        return _samples(data, indices, title, root)
    if all(hasattr(data, name) for name in ("__len__", "__getitem__", "classes")):
        return _items(data, indices, title, root)
    raise TypeError(f"source: must be {ACCEPTED}; got {type(source).__name__}")


def _is_a(source: object, module: str, name: str) -> bool:
    """Whether `source` is of a class of a library, which is loaded if it is."""
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(source, kind)


def _parts(parts: Mapping[Any, Any], title: str, root: Path) -> ImageFiles:
    """The images of several splits, under names that start with the split's."""
    found: list[tuple[str, int, ImageFiles]] = []
    for name, part in parts.items():
        role = role_of(name) if isinstance(name, str) else None
        if role is None:
            raise ValueError(f"source: {title}: splits must be called {ROLE_NAMES}, got {name!r}")
        found.append((name, role, _images_of(part, f"{title}, split {name}", root)))
    if not found:
        raise ValueError(f"source: {title} holds no splits")
    class_names = list(dict.fromkeys(name for *_, part in found for name in part.class_names))
    if len({tuple(part.class_names) for *_, part in found}) > 1:
        where = {name: f"split {split}" for split, _, part in found for name in part.class_names}
        class_names = checked_names(title, class_names, where)
    number = {name: k for k, name in enumerate(class_names)}
    names: list[str] = []
    roles: list[int] = []
    rows: list[list[int]] = []
    readers: dict[str, tuple[Callable[[str], bytes], str]] = {}
    for split, role, part in found:
        labels = part.labels or [[k] for k in part.label]
        for name, ks in zip(part.names, labels, strict=True):
            own = name if part.reader is None and part.root == root else f"{split}/{name}"
            names.append(own)
            roles.append(role)
            rows.append([number[part.class_names[k]] for k in ks])
            readers[own] = part.read, name
    if len(readers) < len(names):
        raise ValueError(f"source: {title}: {len(names) - len(readers)} images are in two splits")

    def read(name: str) -> bytes:
        reader, own = readers[name]
        return reader(own)

    several = any(part.labels is not None for *_, part in found)
    in_memory = any(part.reader is not None or part.root != root for *_, part in found)
    return ImageFiles(
        root,
        class_names,
        names,
        [row[0] for row in rows],
        roles=roles,
        labels=rows if several else None,
        reader=read if in_memory else None,
    )


def _hugging_face(source: Any, title: str, root: Path) -> ImageFiles:
    """Images of a `datasets.Dataset`, whose bytes are read and not decoded."""
    import datasets

    features = source.features
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    table = source.with_format(None)
    if not images:
        columns = list(features)
        rows = [Row(f"row {number}", row) for number, row in enumerate(table)]
        return images_of_rows(title, columns, rows, root)
    column = _one(title, "images", images, ("image", "img", "picture"))
    label = _label_column(title, features)
    column_type = features[label]
    one = column_type[0] if isinstance(column_type, list) else column_type
    inner = getattr(column_type, "feature", one)
    known = list(inner.names) if isinstance(inner, datasets.ClassLabel) else None
    values = table.select_columns([label])[:][label]
    labels = [
        _named(value, known, f"source: {title} row {row}, column {label}")
        for row, value in enumerate(values)
    ]
    table = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))

    def read(name: str) -> bytes:
        cell = table[int(name)][column] or {}
        if cell.get("bytes"):
            return bytes(cell["bytes"])
        if cell.get("path"):
            return read_file(cell["path"])
        raise ImageError(name, "the row holds no image")

    several = inner is not column_type
    return _of_labels(title, root, labels, known, read, several=several)


def _label_column(title: str, features: Mapping[str, Any]) -> str:
    named = [
        name for name in LABELS for own in features if own.casefold() == name for name in [own]
    ]
    if named:
        return named[0]
    labels = [name for name, of in features.items() if hasattr(of, "names")]
    return _one(title, "labels", labels, LABELS)


def _one(title: str, what: str, found: Sequence[str], usual: Sequence[str]) -> str:
    """The one column of a kind, or that of several which has a usual name."""
    chosen = found if len(found) == 1 else [name for name in found if name.casefold() in usual]
    if len(chosen) != 1:
        have = ", ".join(map(printable, found)) or "none"
        raise ValueError(f"source: {title} must have one column of {what}, got {have}")
    return chosen[0]


def _named(value: Any, known: Sequence[str] | None, at: str) -> list[str]:
    """The class names of a cell, which holds numbers, names or a list of them."""
    values = value if isinstance(value, (list, tuple)) else [value]
    out = []
    for one in values:
        one = one.item() if hasattr(one, "item") else one
        is_number = isinstance(one, int) and not isinstance(one, bool)
        if is_number and known is not None:
            if not 0 <= one < len(known):
                raise ValueError(f"{at}: label {one} is none of the {len(known)} classes")
            one = known[one]
        if not is_number and (not isinstance(one, str) or not one.strip()):
            raise ValueError(f"{at}: must be a class or its number, got {one!r}")
        out.append(str(one).strip())
    if not out:
        raise ValueError(f"{at}: the image has no label; one at least is needed")
    return list(dict.fromkeys(out))


def _of_labels(
    title: str,
    root: Path,
    labels: Sequence[Sequence[str]],
    known: Sequence[str] | None,
    read: Callable[[str], bytes],
    *,
    several: bool = False,
    numbers: Iterable[int] | None = None,
) -> ImageFiles:
    """Images that are read by number; classes without images are left out.

    Classes keep the order that the data set gives them, or else natural order.
    """
    from vtclip.data.folders import natural_key

    if not labels:
        raise ValueError(f"source: {title} holds no images")
    present = {name for row in labels for name in row}
    extra = sorted(present - set(known or ()), key=natural_key)
    names = [str(name).strip() for name in known or ()]
    class_names = [name for name in names if name in present] + extra
    checked_names(title, class_names, {})
    number = {name: k for k, name in enumerate(class_names)}
    rows = [[number[name] for name in row] for row in labels]
    at = range(len(rows)) if numbers is None else numbers
    return ImageFiles(
        root,
        class_names,
        [f"{row:06d}" for row in at],
        [row[0] for row in rows],
        labels=rows if several else None,
        reader=read,
    )


def _unwrapped(source: object) -> tuple[Any, list[int] | None]:
    """The data set below `torch.utils.data.Subset`s, and which of its items they leave."""
    data, indices = source, None
    while hasattr(data, "dataset") and hasattr(data, "indices"):
        own = [int(index) for index in data.indices]
        indices = own if indices is None else [own[index] for index in indices]
        data = data.dataset
    return data, indices


def _samples(data: Any, indices: list[int] | None, title: str, root: Path) -> ImageFiles:
    """`samples` (path, class number) and `classes`, as torchvision's ImageFolder has them."""
    samples = list(data.samples)
    if indices is not None:
        samples = [samples[index] for index in indices]
    change = getattr(data, "target_transform", None) or (lambda target: target)
    labels = [
        _named(change(k), list(data.classes), f"source: {title} item {row}")[0]
        for row, (_, k) in enumerate(samples)
    ]
    base = Path(getattr(data, "root", root))
    rows = [
        Row(f"item {row}", {"path": os.path.abspath(path), "label": label})
        for row, ((path, _), label) in enumerate(zip(samples, labels, strict=True))
    ]
    files = images_of_rows(title, ("path", "label"), rows, base)
    return _in_order(files, list(data.classes))


def _in_order(files: ImageFiles, known: Sequence[str]) -> ImageFiles:
    """The same images with their classes in the order of `known`."""
    order = [name for name in known if name in files.class_names]
    if sorted(order) != sorted(files.class_names):
        return files
    new = [order.index(name) for name in files.class_names]
    return replace(files, class_names=order, label=[new[k] for k in files.label])


def _pairs(paths: Any, labels: Any, root: Path) -> ImageFiles:
    fact = f"got {type(paths).__name__} and {type(labels).__name__}"
    try:
        paths, labels = list(paths), list(labels)
    except TypeError:
        raise TypeError(f"source: a pair must be (paths, labels), {fact}") from None
    if len(paths) != len(labels):
        raise ValueError(f"source: {len(paths)} paths need as many labels, got {len(labels)}")
    for path in paths[:1]:
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"source: a pair must be (paths, labels), got {type(path).__name__}s")
    rows = [
        Row(f"item {row}", {"path": path, "label": label})
        for row, (path, label) in enumerate(zip(paths, labels, strict=True))
    ]
    return images_of_rows("the pair", ("path", "label"), rows, root)


def _items(data: Any, indices: list[int] | None, title: str, root: Path) -> ImageFiles:
    """Items (PIL image, class) of a data set with `classes`; read under a lock, one at a time."""
    lock = threading.Lock()
    at = list(range(len(data))) if indices is None else indices
    if not at:
        raise ValueError(f"source: {title} holds no images")

    def item(row: int) -> tuple[Any, Any]:
        with lock:
            found = data[row]
        if not isinstance(found, (tuple, list)) or len(found) != 2:
            raise TypeError(f"source: {title} item {row} must be (image, class), got {found!r:.80}")
        return found[0], found[1]

    _pixels(item(at[0])[0], f"source: {title} item {at[0]}")
    targets = _targets(data)
    values = [item(row)[1] if targets is None else targets[row] for row in at]
    known = [str(name) for name in data.classes]
    labels = [
        _named(value, known, f"source: {title} item {row}")
        for row, value in zip(at, values, strict=True)
    ]

    def read(name: str) -> bytes:
        image = _pixels(item(int(name))[0], f"source: {title} item {int(name)}")
        out = io.BytesIO()
        as_rgb(image).save(out, "BMP")  # the same bytes for the same pixels, everywhere
        return out.getvalue()

    return _of_labels(title, root, labels, known, read, numbers=at)


def _targets(data: Any) -> list[Any] | None:
    """The classes of all items, where the data set has them without reading images."""
    if getattr(data, "target_transform", None) is not None:
        return None
    for name in ("targets", "labels", "_labels"):
        found = getattr(data, name, None)
        if found is not None and hasattr(found, "__len__") and len(found) == len(data):
            return list(found)
    return None


def _pixels(image: Any, at: str) -> Any:
    from PIL import Image

    if isinstance(image, Image.Image):
        return image
    if type(image).__module__ == "numpy" and str(image.dtype) == "uint8" and image.ndim in (2, 3):
        return Image.fromarray(image)
    raise TypeError(
        f"{at} must hold a PIL image, got {type(image).__name__}; leave out the data set's "
        "transform, as vtclip does its model's preprocessing"
    )
