# SPDX-License-Identifier: Apache-2.0
"""Where the classes of an image folder lie: in it, or in split folders such as train/ and test/.

A folder is a *split folder* by its name and by what is in it. By name: one of its words is one of
WORDS and the others say nothing (seg_train, train_images, Test, 0_train, train2017), or are the
same for several folders that then differ in that word alone (flowers_train, flowers_test). By
content: it holds class folders. So `test tube` and `pregnancy test` are classes, and `train` with
images directly in it, beside `car` and `bus`, is one as well.

    root/train/apple/1.jpg, root/test/apple/2.jpg     splits of classes
    root/apple/train/1.jpg, root/apple/test/2.jpg     classes of splits
    root/data/..., root/images/train/...              one wrapper above either

What can be read in two ways is refused in one line: split folders beside class folders, val/ or
test/ with images of no class beside class folders, a class folder that holds test/ beside other
images. Folders without a single image never count, and images directly in a test/ beside a train/
with classes have no label: they are not used, which is said.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

from vtclip.data.folder_tree import FolderTree, named
from vtclip.files import printable, several

TRAIN, VAL, TEST, UNLABELLED = 0, 1, 2, -1
VERBS = ("trains", "validates", "tests")
WORDS = {
    **dict.fromkeys(("train", "training", "trn", "trainval", "trainset", "traindata"), TRAIN),
    **dict.fromkeys(("val", "valid", "validation", "validate", "valset", "dev", "devel"), VAL),
    **dict.fromkeys(("test", "testing", "tst", "testset", "testdata", "eval", "evaluation"), TEST),
    **dict.fromkeys(("holdout", "heldout"), TEST),
    **dict.fromkeys(
        ("pred", "predict", "prediction", "predictions", "unlabeled", "unlabelled"), UNLABELLED
    ),
}
_SAY_NOTHING = """
    seg images image imgs img data dataset datasets set sets split splits folder dir photos photo
    pictures pics samples files public private official full resized cropped crops original raw jpg
    jpeg png processed preprocessed cls classification labeled labelled final
"""
FILLERS = frozenset(_SAY_NOTHING.split())  # beside one of WORDS
_CONTENTS = "data dataset datasets images image imgs img photos pictures jpg png"
WRAPPERS = frozenset(_CONTENTS.split())
FLAT = "a split folder holds one folder per class"
FOLDS = re.compile(r"(k?folds?|split|part|subset|partition|cv)[ _.-]*\d+")


class Place(NamedTuple):
    """A folder of images of one class; `part` is the name of the split folder it belongs to."""

    class_name: str
    folder: str
    role: int = TRAIN
    part: str = ""


@dataclass
class Layout:
    """Where images of which class lie; without split folders every role is TRAIN.

    parts: the split folders by name, with their roles. aside: folders whose images are not used.
    """

    places: list[Place]
    parts: dict[str, int] = field(default_factory=dict)
    aside: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


def find_layout(tree: FolderTree, where: str) -> Layout:
    """The layout of the folder of `tree`, called `where` in messages; a ValueError if unclear."""
    base, names = _unwrap(tree, where)
    roles = split_names(names)
    found = _outer(tree, where, base, roles, [name for name in names if name not in roles])
    if found is None:
        found = _inner(tree, where, base, names)
    if found is None:
        found = Layout([Place(name, _join(base, name)) for name in names])
        taken = [name for name in roles if roles[name] != UNLABELLED]
        if taken:
            found.remarks.append(
                f"{where}: {named(taken)} is taken for a class, as the other folders are classes"
            )
        found.remarks += _alike(tree, where, base, names)
    if base and not found.parts:
        found.remarks.insert(0, f"{where}: the classes are taken from {printable(base)}/")
    return found


def class_layout(tree: FolderTree, where: str, class_name: str) -> Layout:
    """The layout of a folder whose images are all of one class, with the split that it holds.

    A split folder counts with whatever is in it, images or folders; one that holds images to
    validate or test on beside other images is a ValueError.
    """
    base, names = _unwrap(tree, where)
    roles = {name: role for name, role in split_names(names).items()
             if tree.holds_images(_join(base, name))}  # fmt: skip
    parts = {name: role for name, role in roles.items() if role != UNLABELLED}
    others = [name for name in names if name not in roles]
    beside = [f"{name}/" for name in others if tree.holds_images(_join(base, name))]
    beside += ["images"] if tree.images(base) else []
    if parts and beside:
        _refuse_inside(where, base or where, parts, beside)
    elif parts:
        places = [Place(class_name, _join(base, name), role, name) for name, role in parts.items()]
        aside = [_join(base, name) for name in roles if name not in parts]
        return Layout(places, parts, aside)
    inner = None if tree.images(base) else _inner(tree, where, base, names)
    if inner is not None:
        places = [place._replace(class_name=class_name) for place in inner.places]
        return Layout(places, inner.parts)
    return Layout([Place(class_name, "")])


def split_names(names: list[str]) -> dict[str, int]:
    """The role of each of `names` that is the name of a split folder, training first."""
    roles: dict[str, int] = {}
    similar: dict[tuple[str, ...], dict[str, int]] = {}
    for name in names:
        role, others = _words(name)
        if role is None:
            continue
        if all(word in FILLERS for word in others):
            roles[name] = role
        else:
            similar.setdefault(others, {})[name] = role
    for group in similar.values():
        if len({role for role in group.values() if role != UNLABELLED}) > 1:
            roles |= group
    ordered = sorted(roles, key=lambda name: (roles[name] == UNLABELLED, roles[name]))
    return {name: roles[name] for name in ordered}


def _words(name: str) -> tuple[int | None, tuple[str, ...]]:
    """The role that one word of a name stands for, and the other words; None for none or two."""
    spaced = re.sub(r"([a-z])([A-Z])", r"\1 \2", name).casefold().replace("hold out", "holdout")
    words = re.findall(r"[^\W\d_]+", re.sub(r"he?o?ld[ _.-]out", "holdout", spaced))
    if words in (["train", "val"], ["train", "valid"]):
        return TRAIN, ()
    hits = [word for word in words if word in WORDS]
    if len(hits) != 1:
        return None, ()
    return WORDS[hits[0]], tuple(word for word in words if word != hits[0])


def _unwrap(tree: FolderTree, where: str) -> tuple[str, list[str]]:
    """The folder below wrappers like data/ or images/, and the names of the folders in it."""
    base = ""
    for _ in range(4):
        names = tree.folders(base)
        inner = _wrapper(tree, base, names, where.rsplit("/", 1)[-1])
        if inner is None or not tree.folders(inner) or tree.images(inner):
            break
        base = inner
    return base, tree.folders(base)


def _wrapper(tree: FolderTree, base: str, names: list[str], own: str) -> str | None:
    """The one folder in `base` with images below it, where its name says nothing of them."""
    known = [name for name in names if name.casefold() in WRAPPERS or name == own]
    if len(known) != 1 or tree.images(base):
        return None
    others = [name for name in names if name != known[0]]
    if any(tree.holds_images(_join(base, name)) for name in others):
        return None
    return _join(base, known[0])


def _outer(
    tree: FolderTree, where: str, base: str, roles: dict[str, int], others: list[str]
) -> Layout | None:
    """The layout of split folders of class folders; None where the folders are classes."""
    if not roles:
        return None
    places = {name: _descend(tree, _join(base, name), name) for name in roles}
    classes = {
        name: [deep for deep in tree.folders(place) if tree.holds_images(_join(place, deep))]
        for name, place in places.items()
    }
    splits = [name for name, deep in classes.items() if deep and roles[name] != UNLABELLED]
    flat = [name for name in roles if name not in splits and tree.holds_images(places[name])]
    beside = [name for name in others if tree.holds_images(_join(base, name))]
    labelled = [name for name in flat if roles[name] != UNLABELLED]
    if not splits and not labelled:
        return None
    if beside:
        _check_beside(where, roles, splits, labelled, beside, classes)
        return None
    if not splits or any(roles[name] == TRAIN for name in labelled):
        raise ValueError(
            f"source: {where} holds {_slashed(labelled)} with images directly in "
            f"{'it' if len(labelled) == 1 else 'them'}; {FLAT}"
        )
    found = [
        Place(deep, _join(places[name], deep), roles[name], name)
        for name in splits
        for deep in tree.folders(places[name])
    ]
    for place in found:
        _refuse_inside(where, place.folder, split_names(tree.folders(place.folder)))
    aside = [_join(base, name) for name in roles if name not in splits]
    return Layout(found, {name: roles[name] for name in splits}, aside)


def _descend(tree: FolderTree, place: str, name: str) -> str:
    """The folder in a split folder that holds its classes: seg_train/seg_train, train/images."""
    for _ in range(3):
        inner = _wrapper(tree, place, tree.folders(place), name)
        if inner is None:
            break
        place = inner
    return place


def _check_beside(
    where: str,
    roles: dict[str, int],
    splits: list[str],
    flat: list[str],
    beside: list[str],
    classes: dict[str, list[str]],
) -> None:
    """Refuse split folders beside class folders, except one `train` that is a class as well."""
    found = [*splits, *flat]
    known = {name.casefold() for name in beside}
    shared = [name for name in splits if known & {deep.casefold() for deep in classes[name]}]
    if [name.casefold() for name in found] == ["train"] and not shared:
        return
    way = "move one kind away, and rename what is a class"
    if splits:
        first = f"give {where}/{splits[0]}"
        rest = [name for name in splits[1:] if roles[name] == TEST]
        way = f"{first}{f' with --test {where}/{rest[0]}' if rest else ''}, or {way}"
    what = "split folders" if splits else "folders that are named like splits,"
    raise ValueError(
        f"source: {where} holds {what} {_slashed(found)} beside class folders ({named(beside)}); "
        f"{way}"
    )


def _inner(tree: FolderTree, where: str, base: str, names: list[str]) -> Layout | None:
    """The layout of classes that hold split folders; None where no class does."""
    inside = {name: split_names(tree.folders(_join(base, name))) for name in names}
    inside = {
        name: {deep: role for deep, role in roles.items() if role != UNLABELLED}
        for name, roles in inside.items()
    }
    if not any(role != TRAIN for roles in inside.values() for role in roles.values()):
        return None
    found: list[Place] = []
    parts: dict[str, int] = {}
    for name in names:
        place = _join(base, name)
        if not tree.holds_images(place):
            found.append(Place(name, place))
            continue
        beside = [f"{deep}/" for deep in tree.folders(place) if deep not in inside[name]
                  and tree.holds_images(_join(place, deep))]  # fmt: skip
        beside += ["images"] if tree.images(place) else []
        if beside:
            other = next(other for other, roles in inside.items() if max(roles.values(), default=0))
            if inside[name]:
                _refuse_inside(where, place, inside[name], beside)
            raise ValueError(
                f"source: {where}: class folder {printable(other)} holds "
                f"{_slashed(list(inside[other]))}, {printable(name)} holds {named(beside)}; "
                "every class needs the same split folders"
            )
        found += [
            Place(name, _join(place, deep), role, deep) for deep, role in inside[name].items()
        ]
        parts |= inside[name]
    return Layout(found, parts)


def _refuse_inside(
    where: str, folder: str, roles: dict[str, int], beside: list[str] | None = None
) -> None:
    names = [name for name, role in roles.items() if role in (VAL, TEST)]
    if names:
        rest = f" beside {named(beside)}" if beside else ""
        raise ValueError(
            f"source: {where}: class folder {printable(folder)} holds {_slashed(names)}{rest}, "
            "which looks like a split; move it away, or rename it"
        )


def _alike(tree: FolderTree, where: str, base: str, names: list[str]) -> list[str]:
    """A word where all folders hold the same folders, as if they were splits; folds are refused."""
    inside = {name: tree.folders(_join(base, name)) for name in names}
    if len(names) < 2 or any(tree.images(_join(base, name)) for name in names):
        return []
    first = inside[names[0]]
    if len(first) < 2 or any(set(deep) != set(first) for deep in inside.values()):
        return []
    what = f"{named(names)} each hold the folders {named(first)}"
    if all(FOLDS.fullmatch(name.casefold()) for name in names):
        raise ValueError(
            f"source: {where}: {what}, and are splits and not classes; give one of them, and "
            "another one with --test"
        )
    return [f"{where}: {what}; they are taken for classes"]


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _slashed(names: list[str]) -> str:
    return named([f"{name}/" for name in names])


def count_lines(layout: Layout, where: str, counts: dict[str, int]) -> list[str]:
    """What the split folders of a layout are used for, with their images. counts: by name."""
    if not layout.parts:
        return []
    parts = [
        f"{printable(name)}/ ({several(counts[name], 'image') if at == 0 else counts[name]}) "
        f"{VERBS[role]}"
        for at, (name, role) in enumerate(sorted(layout.parts.items(), key=lambda part: part[1]))
    ]
    used = "is" if len(parts) == 1 else "are"
    return [f"{where}: {several(len(parts), 'split folder')} {used} used: {', '.join(parts)}"]
