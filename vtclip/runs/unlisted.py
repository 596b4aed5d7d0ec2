# SPDX-License-Identifier: Apache-2.0
"""Which images an older run saw, which has no `images.csv`: from its split, which is a rule.

The rule needs the names and classes of then. They are those of the source where its digest is
still that of the run, else those that the feature cache kept; the split's digest proves them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vtclip.data.featureset import MANIFEST, FeatureSet
from vtclip.data.hashing import hash_all
from vtclip.data.listed import list_images
from vtclip.data.npz import open_npz
from vtclip.data.sources import source_kind
from vtclip.data.splits import Split, few_shot_split
from vtclip.files import Json, cache_folder, read_json
from vtclip.runs.result import Run
from vtclip.runs.seen import Seen


@dataclass(frozen=True)
class Listed:
    """The images of a source as a run knew them: names, labels, classes and content digests."""

    names: list[str]
    label: list[int]
    class_names: list[str]
    digests: list[str]

    def of_classes(self, classes: Sequence[str]) -> Listed:
        """The images of `classes`, labelled in that order."""
        place = {name: k for k, name in enumerate(classes)}
        keep = [row for row, k in enumerate(self.label) if self.class_names[k] in place]
        return Listed(
            [self.names[row] for row in keep],
            [place[self.class_names[self.label[row]]] for row in keep],
            list(classes),
            [self.digests[row] for row in keep],
        )

    def with_roles(self, split: Split, *, train: str = "train", rest: str = "unused") -> Seen:
        roles = [rest] * len(self.names)
        for role, rows in ((train, split.train), ("val", split.val), ("test", split.test)):
            for row in rows.tolist():
                roles[row] = role
        labels = [self.class_names[k] for k in self.label]
        unknown = [""] * len(self.names)
        return Seen(self.names, labels, roles, self.digests, unknown, unknown)


def seen_of_old(run: Run, entries: Sequence[Json], cache_dir: str | Path | None) -> Seen | None:
    """The images of every source of an older run; None where they cannot be known for certain."""
    seen = Seen()
    for number, entry in enumerate(entries):
        listed = _listed(run, entry, None if number else cache_dir, number == 0)
        part = None if listed is None else _drawn(run, entry, listed, number == 0)
        if part is None:
            return None
        seen += part
    return seen


def _listed(run: Run, entry: Json, cache_dir: str | Path | None, first: bool) -> Listed | None:
    """The images of then, from the source itself or from the cache."""
    wanted = entry["images"]
    try:
        listed, digest = _at(Path(entry["source"]).expanduser(), entry, run)
        if digest == wanted:
            return listed
    except (OSError, ValueError):
        pass  # gone, or no longer a source
    if not first:
        return None
    key = str(run.result["digests"].get("features"))[:32]
    try:
        folder = cache_folder(cache_dir) / "features" / key
        manifest = read_json(folder / MANIFEST, "a features folder")
        if manifest["fields"]["images"] != wanted:
            return None
        columns = manifest["names"], manifest["label"]
        return Listed(*columns, manifest["fields"]["class_names"], manifest["digests"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _at(path: Path, entry: Json, run: Run) -> tuple[Listed, str]:
    """The images of a source as it is now, and their digest as features carry it."""
    kind, config = source_kind(path), run.result["config"]
    if kind == "features":
        features = FeatureSet.open(path)
        manifest, fields = features.manifest, features.fields
        columns = manifest["names"], manifest["label"]
        return Listed(*columns, fields["class_names"], manifest["digests"]), fields["images"]
    if kind == "npz":
        records = open_npz(path, prompt=config.get("prompt"), need_spatial=_reads_spatial(run))
        names, label = list(records.names), records.label.tolist()
        digests = records.digests or [""] * len(names)
        listed = Listed(names, label, records.class_names, digests)
        return listed, records.info["digests"]["images"]
    if entry["name"] is not None:
        raise ValueError("a folder of one class goes by a name of its own")
    follow = bool(config.get("follow_links"))
    hashed = hash_all(list_images(path, follow_links=follow), False)
    unreadable = {line.partition(": ")[0] for line in run.result["test"]["unreadable"]}
    keep = [row for row, name in enumerate(hashed.names) if name not in unreadable]
    listed = Listed(
        [hashed.names[row] for row in keep],
        [hashed.label[row] for row in keep],
        hashed.folder.class_names,
        [hashed.digests[row] for row in keep],
    )
    return listed, hashed.digest()


def _reads_spatial(run: Run) -> bool:
    """Whether the run took only those rows of a table that have spatial features."""
    from vtclip.heads import HEADS

    spatial = run.result["config"].get("spatial") is not None
    return spatial or HEADS[run.result["method"]].needs_spatial


def _drawn(run: Run, entry: Json, listed: Listed, first: bool) -> Seen | None:
    """The images with the roles of the run's split, whose digest must come out."""
    result = run.result
    if first and result["config"].get("base_to_new"):
        base, new = (listed.of_classes(half) for half in (result["classes"],
                                                          result["new"]["classes"]))  # fmt: skip
        one = _with_split(run, base, [result["shots"]], result["split"])
        two = _with_split(run, new, [0], result["new"]["split"])
        if one is None or two is None:
            return None
        return base.with_roles(one) + new.with_roles(two)
    config_shots = result["config"].get("shots", 0) if first else 0
    split = _with_split(run, listed, [entry["shots"], config_shots, 0], entry["split"])
    if split is None:
        return None
    if first and result["config"].get("pseudo_labels"):  # which of the pool it kept is not known
        return listed.with_roles(split, train="train", rest="train")
    return listed.with_roles(split, train="train" if entry["learns"] else "unused")


def _with_split(run: Run, listed: Listed, shots: Sequence[int], digest: str) -> Split | None:
    """The split of one of these numbers of shots that has this digest."""
    label = torch.tensor(listed.label, dtype=torch.long)
    for number in dict.fromkeys(shots):
        try:
            split = few_shot_split(
                label,
                listed.names,
                shots=number,
                seed=run.result["seed"],
                test_fraction=run.result["config"]["test_fraction"],
                class_names=listed.class_names,
            )
        except (TypeError, ValueError):
            continue
        if split.digest == digest:
            return split
    return None
