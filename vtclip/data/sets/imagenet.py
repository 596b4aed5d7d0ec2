# SPDX-License-Identifier: Apache-2.0
"""ImageNet and the test sets over its classes: folders of images, named by classnames.txt.

A line of classnames.txt is `n01440764 tench`; two synsets may share a name ("missile",
"sunglasses"): such classes are distinguished by their synset, and their prompts stay the same.

Labels follow the sorted folders. Images follow their sorted file names; the original takes them in
the order of the file system, which differs from machine to machine, so nobody can repeat its
ImageNet picks from the seed alone.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from vtclip.data.formats import is_image_name
from vtclip.data.sets.listing import ImageList, Listing, Spec, distinct_names
from vtclip.files import printable

CLASSNAMES = "classnames.txt"


def names_file(spec: Spec, root: Path) -> Path:
    """classnames.txt in the set's folder, else in that of ImageNet next to it."""
    path, shared = spec.place(root) / CLASSNAMES, root / "imagenet" / CLASSNAMES
    return shared if shared.is_file() and not path.is_file() else path


def read_imagenet(spec: Spec, root: Path) -> Listing:
    """images/train and images/val, where val is the test set and there is no validation list."""
    names, prompts, digest = _class_names(spec, root)
    train, test = _folders(spec, root, "train"), _folders(spec, root, "val")
    for classes, others, folder in ((train, test, "val"), (test, train, "train")):
        missing = [synset for synset in classes if synset not in others]
        if missing:
            raise spec.error(
                f"images/{folder} lacks {len(missing)} of {len(classes)} classes, first "
                f"{missing[0]}"
            )
    _check_known(spec, train, names)
    return Listing(
        spec,
        spec.image_root(root),
        [names[synset] for synset in train],
        [prompts[synset] for synset in train],
        _image_list(spec, root, "train", train),
        None,
        _image_list(spec, root, "val", train),
        digest,
    ).check()


def read_synsets(spec: Spec, root: Path) -> Listing:
    """A test set whose folders are synsets: all of ImageNet's, or some."""
    names, prompts, digest = _class_names(spec, root)
    folders = _folders(spec, root, "")
    _check_known(spec, folders, names)
    class_names, words = [names[s] for s in folders], [prompts[s] for s in folders]
    return _test_only(spec, root, folders, class_names, words, digest)


def read_numbered(spec: Spec, root: Path) -> Listing:
    """A test set whose folders are 0, 1, 2, ...: the lines of classnames.txt."""
    names, prompts, digest = _class_names(spec, root)
    folders = set(_folders(spec, root, ""))
    numbers = [str(k) for k in range(len(names))]
    missing = [name for name in numbers if name not in folders]
    extra = sorted(folders - set(numbers))
    if missing or extra:
        what = f"no folder {missing[0]}" if missing else f"a folder {printable(extra[0])!r}"
        raise spec.error(
            f"{spec.images} must hold the folders 0..{len(names) - 1}, one per line of "
            f"{CLASSNAMES}; it has {what}"
        )
    class_names, words = list(names.values()), list(prompts.values())
    return _test_only(spec, root, numbers, class_names, words, digest)


def _test_only(
    spec: Spec,
    root: Path,
    folders: list[str],
    class_names: list[str],
    words: list[str],
    digest: str,
) -> Listing:
    """A set without training and validation images; class k is in folders[k]."""
    test = _image_list(spec, root, "", folders)
    return Listing(
        spec, spec.image_root(root), class_names, words, ImageList(), ImageList(), test, digest
    ).check()


def _class_names(spec: Spec, root: Path) -> tuple[dict[str, str], dict[str, str], str]:
    """Synset to distinct name, synset to prompt word, and the file's sha256."""
    data = names_file(spec, root).read_bytes()
    prompts: dict[str, str] = {}
    for number, line in enumerate(spec.decoded(CLASSNAMES, data).splitlines(), 1):
        synset, _, name = line.strip().partition(" ")
        if not synset:
            continue
        if not name.strip() or synset in prompts:
            what = "has no name" if not name.strip() else "is there twice"
            raise spec.error(f"{CLASSNAMES}, line {number}: {printable(synset)} {what}")
        prompts[synset] = name.strip()
    if not prompts:
        raise spec.error(f"{CLASSNAMES} is empty")
    distinct = distinct_names(list(prompts.values()), list(prompts))
    return dict(zip(prompts, distinct, strict=True)), prompts, hashlib.sha256(data).hexdigest()


def _check_known(spec: Spec, folders: list[str], names: dict[str, str]) -> None:
    unknown = [name for name in folders if name not in names]
    if unknown:
        raise spec.error(
            f"{len(unknown)} folders are not in {CLASSNAMES}, first {printable(unknown[0])!r}"
        )


def _folders(spec: Spec, root: Path, below: str) -> list[str]:
    """The sorted folders in the folder `below` of the image folder."""
    place = spec.image_root(root) / below
    shown = "/".join(folder for folder in (spec.images, below) if folder)
    if not place.is_dir():
        raise spec.error(f"the folder {shown} is missing")
    with os.scandir(place) as entries:
        seen = [entry for entry in entries if not entry.name.startswith(".")]
    folders = sorted(entry.name for entry in seen if entry.is_dir())
    if not folders:
        loose = sum(is_image_name(entry.name) for entry in seen)
        raise spec.error(f"{shown} must hold one folder per class, got {loose} loose images")
    return folders


def _image_list(spec: Spec, root: Path, below: str, folders: list[str]) -> ImageList:
    """The images of class folders, in the order of `folders` and then of their names."""
    images, prefix = ImageList(), f"{below}/" if below else ""
    for k, name in enumerate(folders):
        files = sorted(
            file
            for file in os.listdir(spec.image_root(root) / below / name)
            if not file.startswith(".") and is_image_name(file)
        )
        images.names += [f"{prefix}{name}/{file}" for file in files]
        images.label += [k] * len(files)
    return images
