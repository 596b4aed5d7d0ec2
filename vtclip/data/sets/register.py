# SPDX-License-Identifier: Apache-2.0
"""`vtclip.register_data_set`: a data set beside those of the table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from vtclip.data.sets import zhou
from vtclip.data.sets.known import SETS
from vtclip.data.sets.listing import Listing, Spec
from vtclip.data.sets.table import known_as


def register_data_set(
    name: str,
    *,
    folder: str,
    files: Sequence[str],
    template: str,
    classes: int,
    counts: tuple[int | None, int | None, int],
    read: Callable[[Spec, Path], Listing] = zhou.read_split,
    images: str = "",
    title: str | None = None,
    home: str = "its owner",
    lists: str = "its owner",
    aliases: Sequence[str] = (),
    replace: bool = False,
) -> Spec:
    """Make a data set with official lists known by name, in this process; returns its `Spec`.

        vtclip.register_data_set("leaves", folder="leaves", files=["split.json"], classes=12,
                                 template="a photo of a {} leaf.", counts=(600, 120, 300))
        vtclip.fit("leaves", data="ROOT", shots=16)

    name: letters, digits and . _ + -. A taken name is a ValueError; `replace` allows one that was
        registered before. aliases: other spellings of it.
    folder: of the set, below the data root. images: the folder of images below it.
    files: list files below `folder`, which must be there; nothing below the root is written.
    template: the usual prompt, {} for the class name.
    classes, counts: how many classes, and images of train, val (None: drawn from train) and test;
        `vtclip data check` notes where the lists differ. (None, None, n) is a set of test images.
    read: from the spec and the root to a `vtclip.data.sets.Listing`; by default files[0] is JSON
        {"train": [[path, label, class name], ...], "val": [...], "test": [...]}, labels from 0 on.
    title: in tables; None: the name. home, lists: where people get images and list files.

    For the command line make the returned `Spec` an entry point (`vtclip.extensions`).
    """
    if isinstance(files, str):
        raise TypeError(f"data set {name!r}: files must be a list of names, got {files!r}")
    spec = Spec(
        name, title or name, folder, images, template, classes, counts, tuple(files), read,
        home, lists, tuple(aliases),
    )  # fmt: skip
    for other in (name, *spec.aliases):
        known = known_as(other) if isinstance(other, str) else None
        if known is not None and not (replace and known.name == name):
            raise ValueError(f"data set {name!r}: {other!r} is {known.name!r} already")
    return SETS.add(name, spec, replace=replace)
