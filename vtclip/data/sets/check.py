# SPDX-License-Identifier: Apache-2.0
"""What a data root holds: per data set the files, counts, digests, and what is missing.

A set is usable if a run on it would work: its list files are there and consistent, and every
listed image is there and not empty (images are not decoded). Lists that differ from the official
ones can be used, with a note.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from vtclip.data.image_files import absent_images
from vtclip.data.sets.known import SETS
from vtclip.data.sets.listing import ROLES, Listing, SetError, Spec
from vtclip.data.sets.reading import missing_files, open_listing
from vtclip.data.sets.table import find_set
from vtclip.files import Json, printable

SHOWN = 20


def check_sets(root: str | Path, names: Sequence[str] = ()) -> Json:
    """The state of the sets `names`, by default of those that are there; "usable": all of them.

    By default "elsewhere" holds the other sets with the place where people get them. JSON-able.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise ValueError(f"data: the root of the data sets must be a folder, got {root}")
    wanted = list(dict.fromkeys(find_set(name).name for name in names))
    present = [name for name, spec in SETS.items() if spec.place(root).is_dir()]
    states = {name: _check(SETS[name], root) for name in wanted or present}
    return {
        "root": str(root),
        "usable": bool(states) and all(row["usable"] for row in states.values()),
        "sets": states,
        "elsewhere": {
            name: {"folder": spec.folder, "images": spec.home, "lists": spec.lists}
            for name, spec in SETS.items()
            if name not in states and not wanted
        },
    }


def _check(spec: Spec, root: Path) -> Json:
    row: Json = {
        "title": spec.title,
        "folder": spec.folder,
        "usable": False,
        "problems": missing_files(spec, root),
        "notes": [],
        "expected": _expected(spec),
        "listed": None,
        "found": None,
        "absent": {"count": 0, "first": []},
        "lists": {
            "files": list(spec.files),
            "sha256": None,
            "digest": None,
            "official": None,
            "official_sha256": spec.list_sha256,
            "official_digest": spec.list_digest,
        },
        "images_from": spec.home,
        "lists_from": spec.lists,
    }
    if row["problems"]:
        return row
    try:
        listing = open_listing(spec, root)
    except SetError as error:
        row["problems"].append(str(error).removeprefix(f"data: {spec.name}: "))
        return row
    row["lists"] |= {
        "sha256": listing.list_sha256,
        "digest": listing.digest(),
        "official": listing.official(),
    }
    row["listed"] = {role: len(images) for role, images in listing.image_lists()}
    row["listed"]["classes"] = len(listing.class_names)
    _count_images(listing, row)
    row["notes"] = list(_notes(listing, row))
    row["usable"] = not row["problems"]
    return row


def _expected(spec: Spec) -> dict[str, int]:
    counts = dict(zip(ROLES, spec.counts, strict=True))
    return {**{role: n for role, n in counts.items() if n is not None}, "classes": spec.classes}


def _count_images(listing: Listing, row: Json) -> None:
    """Fills in "found", "absent" and the problem that follows from absent images."""
    row["found"] = {}
    for role, images in listing.image_lists():
        absent = absent_images(listing.image_root, images.names)
        row["found"][role] = len(images) - len(absent)
        row["absent"]["count"] += len(absent)
        row["absent"]["first"] += absent[: SHOWN - len(row["absent"]["first"])]
    if row["absent"]["count"]:
        name, why = row["absent"]["first"][0]
        row["problems"].append(
            f"{row['absent']['count']} listed images are not below "
            f"{printable(str(listing.image_root))}, first {printable(name)} ({why})"
        )


def _notes(listing: Listing, row: Json) -> Iterator[str]:
    differences = [
        f"{what} {row['listed'].get(what, 0)}, not {n}"
        for what, n in row["expected"].items()
        if row["listed"].get(what, 0) != n
    ]
    if differences:
        yield f"counts differ from the official ones: {', '.join(differences)}"
    elif row["lists"]["official"] is False:
        yield "the lists differ from the official ones: results are not comparable"
    other = listing.other_names()
    if other:
        name, protocol_name = other[0]
        yield (
            f"{len(other)} class names are not those of the protocol, first "
            f"{printable(name)!r} for {printable(protocol_name)!r}"
        )


def check_lines(report: Json) -> list[str]:
    """The report for people: one line per set, then its problems, notes and absent images."""
    lines = []
    for name, row in report["sets"].items():
        state = "usable" if row["usable"] else "NOT USABLE"
        lines.append(f"{name:<15} {state:<10} {_counts(row)}".rstrip())
        lines += [f"    {problem}" for problem in row["problems"]]
        lines += [f"    note: {note}" for note in row["notes"]]
        lines += [
            f"    absent: {printable(image)} ({why})" for image, why in row["absent"]["first"][1:]
        ]
        more = row["absent"]["count"] - len(row["absent"]["first"])
        if more > 0:
            lines.append(f"    absent: {more} more")
    if not report["sets"]:
        lines.append(f"there is no data set in {printable(report['root'])}")
    if report["elsewhere"]:
        lines.append("not there (folder: where people get it)")
        lines += [
            f"    {name:<15} {row['folder']}: {row['images']}"
            for name, row in report["elsewhere"].items()
        ]
    return lines


def _counts(row: Json) -> str:
    if row["listed"] is None:
        return ""
    counts = ", ".join(
        f"{role} {n}" if row["listed"][role] == n else f"{role} {n} of {row['listed'][role]}"
        for role, n in row["found"].items()
        if row["listed"][role]
    )
    kind = {True: "official", False: "not official", None: "unknown here"}[row["lists"]["official"]]
    digest = row["lists"]["digest"][:12]
    return f"{counts}; {row['listed']['classes']} classes; lists {digest} ({kind})"
