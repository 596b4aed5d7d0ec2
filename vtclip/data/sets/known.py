# SPDX-License-Identifier: Apache-2.0
"""Data sets beside those of the table: what a `Spec` must have, and the table of all."""

from __future__ import annotations

from pathlib import PurePath

from vtclip.data.sets.listing import Spec
from vtclip.extensions.registry import DATA_SETS, NAME, Registry


def check_spec(name: str, spec: object) -> Spec:
    """`spec`, called `name`, where its fields can be used; one line that names what is wrong."""
    what = f"data set {name!r}"
    if not isinstance(spec, Spec):
        wish = "a vtclip.data.sets.Spec"
        raise TypeError(f"{what}: it must be {wish}, got {type(spec).__name__}")
    if spec.name != name or not NAME.fullmatch(name):
        raise ValueError(f"{what}: spec.name must be {name!r}, got {spec.name!r}")
    if not callable(spec.read):
        raise TypeError(f"{what}: read must be callable, got {type(spec.read).__name__}")
    paths = {"folder": spec.folder, "images": spec.images}
    paths |= {f"files[{k}]": file for k, file in enumerate(spec.files)}
    for field, path in paths.items():
        if not isinstance(path, str) or _leaves(path):
            raise ValueError(f"{what}: {field} must be a path below the data root, got {path!r}")
    if not spec.folder or not spec.files:
        absent = "files" if spec.folder else "folder"
        raise ValueError(f"{what}: {absent} must name what is on disk, got nothing")
    if "{}" not in spec.template:
        raise ValueError(f"{what}: template must hold {{}} for the class, got {spec.template!r}")
    whole = [count for count in spec.counts if count is not None]
    if len(spec.counts) != 3 or spec.counts[2] is None or any(
        isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in [*whole, spec.classes]
    ):  # fmt: skip
        raise ValueError(
            f"{what}: classes and counts must be whole numbers, of train, val and test images "
            f"(None: no such list), got {spec.classes!r} and {spec.counts!r}"
        )
    return spec


def _leaves(path: str) -> bool:
    return PurePath(path).is_absolute() or ".." in PurePath(path).parts


# name -> spec; the built-in ones are filled in by table.py
SETS: Registry[Spec] = Registry("data set", DATA_SETS, check_spec)
