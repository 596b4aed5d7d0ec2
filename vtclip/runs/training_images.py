# SPDX-License-Identifier: Apache-2.0
"""Which images the rows are that a head keeps: their names in `images.csv`, and their pixels.

A head keeps its training images in the order in which `images.csv` lists those of role "train".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vtclip.files import several
from vtclip.runs.kept_images import KeptImages, places_in
from vtclip.runs.result import RESULT, Run
from vtclip.runs.seen import Seen


@dataclass(frozen=True)
class TrainingImages(KeptImages):
    """The rows' images; where there are no names, `why` is the reason, in words.

    pseudo_labels: whether their classes are zero-shot's.
    """

    why: str = ""
    pseudo_labels: bool = False

    def name(self, row: int, class_name: str) -> str:
        """What row `row` is called: its file, or its number among the training images."""
        if self.names is None:
            return f"training image {row + 1} of class {class_name}"
        return self.names[row]


def training_images(folder: str | Path, class_names: Sequence[str]) -> TrainingImages:
    """The training images of the run in `folder`, of a head that has rows of `class_names` [N].

    Without names, and with the reason, where the folder holds an adapter alone, where the run is
    from before runs kept a list of their images, or where the list is another run's.
    """
    folder = Path(folder).expanduser()
    if not (folder / RESULT).is_file():
        return TrainingImages(None, why="the folder holds an adapter without its run")
    try:
        run = Run.load(folder)
        entry = run.result.get("seen")
        if entry is None:
            why = "the run is from before runs kept a list of their images"
            return TrainingImages(None, why=why)
        seen = Seen.read(folder, entry)
    except ValueError as error:
        return TrainingImages(None, why=str(error))
    rows = [row for row, role in enumerate(seen.roles) if role == "train"]
    if len(rows) != len(class_names):
        counts = f"{several(len(rows), 'training image')}, the head keeps {len(class_names)}"
        return TrainingImages(None, why=f"{entry['file']} lists {counts}")
    labels = [seen.labels[row] for row in rows]
    # pseudo-labels are the head's, and the list has the classes of the folders
    if labels != list(class_names) and not run.result["config"].get("pseudo_labels"):
        row = next(row for row, name in enumerate(class_names) if labels[row] != name)
        fact = f"{labels[row]!a}, the head's row is of {class_names[row]!a}"
        why = f"{entry['file']}: training image {row + 1} is of {fact}"
        return TrainingImages(None, why=why)
    names = [seen.names[row] for row in rows]
    digests = [seen.digests[row] for row in rows]
    config = run.result["config"]
    return TrainingImages(
        *(names, digests, places_in(run.result), config.get("data")),
        pseudo_labels=bool(config.get("pseudo_labels")),
    )
