# SPDX-License-Identifier: Apache-2.0
"""A data set of your own with official lists: drawn, registered, and used by its name.

python docs/examples/own_data_set.py OUT_DIR
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

import vtclip
from vtclip.data.sets.check import check_lines, check_sets

CLASSES = ["red circle", "green square", "blue triangle"]
COLOURS = [(200, 40, 40), (40, 160, 60), (40, 60, 200)]
COUNTS = {"train": 8, "val": 4, "test": 10}  # of each class


def draw(k: int, rng: np.random.Generator) -> Image.Image:
    """A 64-pixel picture of class k somewhere on grey."""
    image = Image.new("RGB", (64, 64), tuple(rng.integers(90, 170, 3).tolist()))
    x, y = rng.integers(4, 30, 2).tolist()
    box, pen = (x, y, x + 28, y + 28), ImageDraw.Draw(image)
    if k == 0:
        pen.ellipse(box, fill=COLOURS[k])
    elif k == 1:
        pen.rectangle(box, fill=COLOURS[k])
    else:
        pen.polygon([(x + 14, y), (x, y + 28), (x + 28, y + 28)], fill=COLOURS[k])
    return image


def make_root(root: Path) -> None:
    """shapes/images/*.png and shapes/split.json, the official lists: [path, label, class name]."""
    (root / "shapes" / "images").mkdir(parents=True)
    rng, split = np.random.default_rng(0), {}
    for role, count in COUNTS.items():
        split[role] = []
        for k, name in enumerate(CLASSES):
            for number in range(count):
                file = f"{role}_{k}_{number}.png"
                draw(k, rng).save(root / "shapes" / "images" / file)
                split[role].append([file, k, name])
    (root / "shapes" / "split.json").write_text(json.dumps(split), encoding="utf-8")


def main(out: Path) -> None:
    make_root(out / "root")
    vtclip.register_data_set(
        "shapes",
        folder="shapes",
        images="images",
        files=["split.json"],
        template="a picture of a {}.",
        classes=3,
        counts=(24, 12, 30),
    )
    print(*check_lines(check_sets(out / "root", ["shapes"])), sep="\n")
    run = vtclip.fit(
        "shapes",
        data=out / "root",
        method="proker",
        shots=4,
        out=out / "run",
        cache_dir=out / "cache",
    )
    print(run.table())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
