# SPDX-License-Identifier: Apache-2.0
"""split_zhou_NAME.json: {"train": [[path, label, class name], ...], "val": ..., "test": ...}."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from vtclip.data.sets.listing import ROLES, ImageList, Listing, Spec
from vtclip.files import printable


def read_split(spec: Spec, root: Path) -> Listing:
    """The lists in the set's split file. Labels run from 0 without gaps; one name per label."""
    path = spec.place(root) / spec.files[0]
    data = path.read_bytes()
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise spec.error(f"{path.name} is not valid JSON ({error})") from None
    if not isinstance(value, dict) or not all(isinstance(value.get(r), list) for r in ROLES):
        raise spec.error(f"{path.name} must hold the lists train, val and test")
    names: dict[int, str] = {}
    lists = {role: _image_list(spec, path.name, role, value[role], names) for role in ROLES}
    if sorted(names) != list(range(len(names))):
        first = next(k for k in range(len(names) + 1) if k not in names)
        raise spec.error(
            f"{path.name}: {len(names)} labels must be 0..{len(names) - 1}, got "
            f"{min(names)}..{max(names)}, first one missing: {first}"
        )
    class_names = [names[k] for k in range(len(names))]
    return Listing(
        spec,
        spec.image_root(root),
        class_names,
        class_names,
        lists["train"],
        lists["val"],
        lists["test"],
        hashlib.sha256(data).hexdigest(),
    ).check()


def _image_list(
    spec: Spec, file: str, role: str, rows: list[object], names: dict[int, str]
) -> ImageList:
    """The images of one list; `names` collects the class name of each label."""
    images = ImageList()
    for number, row in enumerate(rows):
        if (
            not (isinstance(row, list) and len(row) == 3)
            or not (isinstance(row[0], str) and isinstance(row[2], str))
            or type(row[1]) is not int
        ):
            raise spec.error(
                f"{file}: {role}[{number}] must be [path, label, class name], got {row!a:.80}"
            )
        path, label, name = row
        if names.setdefault(label, name) != name:
            raise spec.error(
                f"{file}: label {label} is {printable(names[label])!r} and, for "
                f"{printable(path)}, {printable(name)!r}"
            )
        images.names.append(path)
        images.label.append(label)
    return images
