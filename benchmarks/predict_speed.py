# SPDX-License-Identifier: Apache-2.0
"""Images per second of `Classifier.predict`: one at a time, in batches, and the model alone.

    python benchmarks/predict_speed.py RUN FOLDER [--images N] [--threads T] [--batch-size B]

FOLDER holds images at any depth. "model" is `Classifier.probabilities` on pixels that are there
already, so batches / model is what reading, decoding and resizing leave of its speed. The three run
in turn, R rounds; medians are printed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch

from vtclip.data.decode import open_image
from vtclip.data.folders import walk_images
from vtclip.runs.classifier import Classifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=960)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    classifier = Classifier.load(args.run, device="cpu")
    paths = walk_images(args.folder)[0][: args.images]
    pixels = torch.stack([classifier.clip.preprocess(open_image(path)) for path in paths])
    size = args.batch_size
    ways: dict[str, Callable[[], Any]] = {
        "one at a time": lambda: [classifier.predict(path) for path in paths],
        f"batches of {size}": lambda: classifier.predict(paths, batch_size=size),
        "model": lambda: [classifier.probabilities(rows) for rows in pixels.split(size)],
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, call in ways.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    method = classifier.adapter.head.method
    print(f"{method}, {len(paths)} images, {args.threads} threads, images per second:")
    for name, taken in seconds.items():
        print(f"{name:<16} {len(paths) / median(taken):8.0f}")


if __name__ == "__main__":
    main()
