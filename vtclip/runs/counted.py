# SPDX-License-Identifier: Apache-2.0
"""Which images of a source count as test images of a run, and what becomes of the others.

An image is known by its content, not by its name. One that the run trained or validated on never
counts. Of the run's own source its test images count, so that the numbers are those of the run; of
another source all others do. Images that lay unused in the run's pool count where its test images
are not there to stand for the source.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from vtclip.data.records import Records
from vtclip.files import Json, printable, several
from vtclip.runs.duplicates import near_pairs
from vtclip.runs.seen import NEW, Seen

# why an image does not count -> what is said of so many of them
WHY: dict[str, str | tuple[str, str]] = {
    "trained": "trained",
    "validated": "validated on",
    "unused": "in the run's training pool, but unused",
    "other_classes": "of classes that the run does not know",
    "other_roles": (
        "training or validation image by the source's own division",
        "training or validation images by the source's own division",
    ),
    "repeated": ("copy of a counted one", "copies of counted ones"),
    "unreadable": "unreadable",
}
OTHERS = ("new", "gone", "tested", "relabelled")
ROLE = {"train": "trained", "val": "validated", "unused": "unused"}


@dataclass(frozen=True)
class LeftOut:
    """How many images of a source do not count, by reason (WHY), and those of unknown classes.

    new: images that the run never saw and that do not count, because its own source was asked for.
    gone: test images of the run that are no longer there. relabelled: images that count, but in
    another class than the run knew them in.
    """

    counts: Mapping[str, int] = field(default_factory=dict)
    classes: Mapping[str, int] = field(default_factory=dict)
    new: int = 0
    gone: int = 0
    tested: int = 0
    relabelled: int = 0

    def __add__(self, other: LeftOut) -> LeftOut:
        return LeftOut(
            Counter(self.counts) + Counter(other.counts),
            Counter(self.classes) + Counter(other.classes),
            *(getattr(self, name) + getattr(other, name) for name in OTHERS),
        )

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def as_json(self) -> Json:
        counts = {why: int(self.counts.get(why, 0)) for why in WHY}
        others = {name: getattr(self, name) for name in OTHERS}
        return {**counts, **others, "classes": dict(self.classes)}


@dataclass(frozen=True)
class Counted:
    """Rows of a source's records that count, ascending, and the others by reason."""

    rows: Tensor
    left_out: LeftOut


def count_own(
    records: Records, seen: Seen, before: LeftOut, left: dict[str, int] | None = None
) -> Counted:
    """The run's own test images among `records`; before: what opening them has left out already.

    A content that the run tested twice counts twice, however often it is there now. left: how often
    each may still count, of a run with several sources, which this lowers.
    """
    roles = _roles(records, seen)
    own = [row for row, role in enumerate(roles) if role == "test"]
    left = dict(seen.tested()) if left is None else left
    rows, repeated = _at_most(records, seen, own, left, least=0)
    counts = Counter(ROLE[role] for role in roles if role in ROLE) + Counter(repeated=repeated)
    moved = _relabelled(records, seen, rows)
    here = LeftOut(counts, new=roles.count(NEW), relabelled=moved)
    return Counted(torch.tensor(rows, dtype=torch.long), before + here)


def count_other(records: Records, seen: Seen | None, before: LeftOut) -> Counted:
    """The images of any source that the run neither trained nor validated on.

    Where the source itself says which images test, only those can count. seen: None where it is not
    known what the run saw; nothing is left out for it then.
    """
    candidates = list(range(len(records)))
    counts: Counter[str] = Counter()
    if records.roles is not None and bool((records.roles == 2).any()):
        candidates = (records.roles == 2).nonzero().flatten().tolist()
        counts["other_roles"] = len(records) - len(candidates)
    if seen is None:
        return Counted(torch.tensor(candidates, dtype=torch.long), before + LeftOut(counts))
    roles = _roles(records, seen)
    passing = {"test", NEW}
    if not any(roles[row] == "test" for row in candidates):
        passing.add("unused")
    kept = [row for row in candidates if roles[row] in passing]
    counts.update(ROLE[roles[row]] for row in candidates if roles[row] not in passing)
    rows, repeated = _at_most(records, seen, kept, dict(seen.tested()), least=1)
    moved = _relabelled(records, seen, rows)
    left_out = LeftOut(counts + Counter(repeated=repeated), relabelled=moved)
    return Counted(torch.tensor(rows, dtype=torch.long), before + left_out)


def _roles(records: Records, seen: Seen) -> list[str]:
    blank = [""] * len(records)
    return seen.roles_of(records.digests or blank, getattr(records, "pixels", None))


def near_copies(records: Records, rows: Tensor, seen: Seen) -> list[tuple[str, str]]:
    """Names of those of `rows` that the run never saw but that look, by perceptual hashes, nearly
    like an image that it trained or validated on, each with the name of that image.
    """
    looks: list[str | None] | None = getattr(records, "perceptual", None)
    fitted = [row for row, role in enumerate(seen.roles) if role in ("train", "val")]
    fitted = [row for row in fitted if seen.perceptual[row]]
    if looks is None or not fitted:
        return []
    roles = _roles(records, seen)
    new = [row for row in rows.tolist() if roles[row] == NEW and looks[row]]
    pairs = near_pairs([str(looks[row]) for row in new], [seen.perceptual[row] for row in fitted])
    return [(records.names[new[place]], seen.names[fitted[of]]) for place, of in pairs]


def _at_most(
    records: Records, seen: Seen, rows: list[int], left: dict[str, int], *, least: int
) -> tuple[list[int], int]:
    """Of `rows` each content as often as `left` says, unknown ones `least` times; how many not.

    A copy in another class does not take the place of the image that the run tested.
    """
    if records.digests is None:
        return rows, 0
    contents = seen.content_of(records.digests, getattr(records, "pixels", None))
    labels = dict(zip(seen.content_of(seen.digests, seen.pixels), seen.labels, strict=True))
    names = [records.class_names[k] for k in records.label.tolist()]
    kept = []
    for row in sorted(rows, key=lambda row: (labels.get(contents[row]) != names[row], row)):
        number = left.get(contents[row], least)
        left[contents[row]] = number - 1
        if number > 0:
            kept.append(row)
    return sorted(kept), len(rows) - len(kept)


def _relabelled(records: Records, seen: Seen, rows: list[int]) -> int:
    """How many of `rows` the run saw, but in other classes alone."""
    if records.digests is None or records.targets is not None:
        return 0
    known: dict[str, set[str]] = {}
    for content, label in zip(seen.content_of(seen.digests, seen.pixels), seen.labels, strict=True):
        known.setdefault(content, set()).add(label)
    contents = seen.content_of(records.digests, getattr(records, "pixels", None))
    names = [records.class_names[k] for k in records.label.tolist()]
    return sum(names[row] not in known.get(contents[row], {names[row]}) for row in rows)


def with_gone(left_out: LeftOut, seen: Seen, counted: int) -> LeftOut:
    """Says how many of the run's test images are missing where `counted` of them are there."""
    tested = sum(seen.tested().values())
    return replace(left_out, gone=max(0, tested - counted), tested=tested)


def check_some(counted: int, left_out: LeftOut, source: str) -> None:
    """An error that says why no image of `source` is left to count."""
    if counted:
        return
    reasons = [line.removesuffix(".") for line in sentences(0, left_out)]
    raise ValueError(f"{source}: no image is left to count; {'; '.join(reasons) or 'it is empty'}")


def _so_many(count: int, words: str | tuple[str, str]) -> str:
    """`words` are the same of one and of many images, or one and many."""
    return f"{count} {words}" if isinstance(words, str) else several(count, *words)


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def sentences(counted: int, left_out: LeftOut | Json) -> Iterator[str]:
    """Plain sentences on what does not count, for people."""
    if isinstance(left_out, LeftOut):
        left_out = left_out.as_json()
    parts = [_so_many(left_out[why], words) for why, words in WHY.items() if left_out.get(why)]
    total = sum(left_out.get(why, 0) for why in WHY)
    if total:
        yield f"{total} of {several(counted + total, 'image')} left out: {', '.join(parts)}."
    if left_out.get("classes"):
        names = [f"{printable(name)} ({n})" for name, n in left_out["classes"].items()]
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        word = "Class" if len(names) == 1 else "Classes"
        yield f"{word} that the run does not know: {', '.join(names[:5])}{more}."
    if left_out.get("gone"):
        tested = several(left_out["tested"], "test image")
        yield f"{left_out['gone']} of {tested} of the run {_are(left_out['gone'])} gone."
    if left_out.get("relabelled"):
        n = left_out["relabelled"]
        have = "image has" if n == 1 else "images have"
        yield f"{n} of the counted {have} another class here than in the run's list of images."
    if left_out.get("new"):
        n = left_out["new"]
        are, them = ("image is", "it") if n == 1 else ("images are", "them")
        yield f"{n} new {are} not counted; give the folder as SOURCE to count {them}."
