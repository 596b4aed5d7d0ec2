# SPDX-License-Identifier: Apache-2.0
"""From a folder of images to answers about new ones, in Python.

python docs/examples/my_folder.py OUT_DIR
"""

import sys
from pathlib import Path

import torch

import vtclip
from vtclip.demo.run import draw_images


def main(out: Path) -> None:
    # drawn pictures in place of yours: out/images/checked circle/000.png, ...
    images = out / "images"
    draw_images(out, per_class=12, seed=7)

    run = vtclip.fit(images, shots=8, out=out / "run", cache_dir=out / "cache")
    print(run.table())  # zero-shot and the pool, on images that were not trained on

    classifier = vtclip.Classifier.load(out / "run")
    picture = sorted(images.rglob("*.png"))[0]
    for label, probability in classifier.predict(picture, topk=3):
        print(f"{100 * probability:5.1f} %  {label}")

    wrong = [row for row in run.rows if row["role"] == "test" and row["label"] != row["predicted"]]
    print(f"{len(wrong)} test images are wrong, the first is {wrong[0]['file']}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
