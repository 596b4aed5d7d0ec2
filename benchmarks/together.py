# SPDX-License-Identifier: Apache-2.0
"""Time and memory of deciding N images together: `python benchmarks/together.py [--images N ...]`

Each number of images runs in a process of its own, once with exact neighbours and once, where it is
installed, with voyager's (the extra `together`). Prints processor seconds of the neighbours and of
the whole decision, how much the peak memory of the process grew, and the share of the true
neighbours that voyager found, by 1,000 of the images. The features are drawn: classes that differ
within themselves in 24 directions, with a common mean; real ones: --source FILE.npz, of which as
many images as N are mixed from pairs of one class.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from vtclip.data import open_source
from vtclip.train import neighbours
from vtclip.train.transduction import transduce

CLASSES, DIRECTIONS, JUDGED = 100, 24, 1000


def drawn(count: int, width: int) -> tuple[Tensor, Tensor]:
    """Features [N, C] of length 1 in float32, and classes [N]."""
    generator = torch.Generator().manual_seed(1)
    label = torch.randint(CLASSES, (count,), generator=generator)
    mean = torch.randn(CLASSES, width, generator=generator)
    ways = torch.randn(CLASSES, DIRECTIONS, width, generator=generator)
    image = 1.2 * torch.randn(width, generator=generator) + mean[label]
    for rows in torch.arange(count).split(2000):
        where = torch.randn(len(rows), DIRECTIONS, generator=generator)
        image[rows] += 0.25 * torch.einsum("nd,ndc->nc", where, ways[label[rows]])
        image[rows] += 0.4 * torch.randn(len(rows), width, generator=generator)
    return F.normalize(image, dim=1), label


def mixed_from(source: Path, count: int) -> tuple[Tensor, Tensor]:
    """The same, of images of a source: points between two of a class, with a little noise."""
    generator = torch.Generator().manual_seed(1)
    records = open_source(source, progress=False)
    image = F.normalize(records.batch(torch.arange(len(records))).image, dim=1)
    first = torch.randint(len(image), (count,), generator=generator)
    label = records.label[first]
    order = records.label.argsort(stable=True)
    counts = torch.bincount(records.label)
    start = counts.cumsum(0) - counts
    place = (torch.rand(count, generator=generator) * counts[label]).long()
    second = order[start[label] + place]
    share = torch.rand(count, 1, generator=generator)
    noise = torch.randn(count, image.shape[1], generator=generator) * 0.35 / image.shape[1] ** 0.5
    return F.normalize(share * image[first] + (1 - share) * image[second] + noise, dim=1), label


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(image: Tensor, label: Tensor, search: str) -> str:
    K = int(label.max()) + 1
    log_p = F.one_hot(label, K).double().mul(4.0)
    log_p += torch.randn(log_p.shape, dtype=torch.float64, generator=torch.manual_seed(2))
    log_p = log_p.log_softmax(dim=1)
    if search == "exact":
        neighbours.EXACT_UP_TO = len(image)
    else:
        neighbours.EXACT_UP_TO = 0
    before, started = peak_mb(), time.process_time()
    x = F.normalize(image.double(), dim=1)
    graph = neighbours.neighbours_of(x)
    searched = time.process_time() - started
    transduce(log_p, image)
    whole = time.process_time() - started - searched
    share = ""
    if search != "exact":
        rows = torch.randperm(len(x), generator=torch.manual_seed(3))[:JUDGED]
        cosines = x[rows] @ x.T
        cosines[torch.arange(len(rows)), rows] = -2
        true = cosines.topk(graph.index.shape[1], dim=1).indices
        hits = (graph.index[rows][:, :, None] == true[:, None]).any(dim=2).double().mean()
        share = f", finds {100 * float(hits):.1f} % of the neighbours"
    return (
        f"{len(image):>7} images of width {image.shape[1]}, {K} classes, {search:<11} neighbours "
        f"{searched:6.1f} s, whole {whole:6.1f} s, {peak_mb() - before:5.0f} MB more{share}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, nargs="+", default=[2000, 10_000, 50_000])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--source", type=Path, help=".npz of real features to mix images from")
    parser.add_argument("--search", choices=["exact", "approximate"])
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.search is None:
        for count in args.images:
            for search in ("exact", "approximate"):
                if search == "approximate" and neighbours.library() is None:
                    print("voyager is not installed")
                    continue
                words = [*sys.argv, "--images", str(count), "--search", search]
                subprocess.run([sys.executable, *words], check=True)
        return
    for count in args.images:
        if args.source is None:
            image, label = drawn(count, args.width)
        else:
            image, label = mixed_from(args.source, count)
        print(measure(image, label, args.search), flush=True)


if __name__ == "__main__":
    main()
