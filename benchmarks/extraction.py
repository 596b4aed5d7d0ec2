# SPDX-License-Identifier: Apache-2.0
"""Features of a folder of JPEGs against the encoder alone on pixels that are there already.

    python benchmarks/extraction.py [--images N] [--threads T] [--batch-size B] [--rounds R]

The folder holds N drawn JPEGs of 500 x 375 pixels; the model has random weights. "encoder" is
`Clip.encode_image` over all batches of preprocessed pixels and `Clip.encode_text` of the class
names, with T threads. "extraction" is `extract_features` with the same model, threads and batches:
hashing, reading, decoding, resizing, encoding of images and class names, shards and manifest on the
disk. Both run in turn, R rounds, in one process; medians of wall time and processor time per image,
and of the ratios of each round, are printed.

With fewer threads than cores, decoding has cores of its own. With as many, it must take its time
from the encoder's cores, and encoder / (encoder + decoding) in processor time is the best there is.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vtclip.clip import Clip, build_clip
from vtclip.data.decode import open_image
from vtclip.data.extract import ExtractionReport, extract_features
from vtclip.data.folders import scan_folder
from vtclip.data.threads import num_cores

CLASSES = ("meadow", "harbour", "street", "forest")
SIZE = (500, 375)


def draw_folder(root: Path, count: int) -> None:
    """JPEGs of smooth shapes with grain, about 65 kB each: the size of a photo of these sides."""
    for number in range(count):
        draw = np.random.default_rng(number)
        coarse = Image.fromarray(draw.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(SIZE, Image.Resampling.BICUBIC)).astype(np.int16)
        pixels = (smooth + draw.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)
        path = root / CLASSES[number % len(CLASSES)] / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=90)


def random_clip(arch: str) -> Clip:
    import open_clip

    torch.manual_seed(0)
    config = open_clip.get_model_config(arch)
    tokenizer = open_clip.get_tokenizer(arch)
    return Clip(build_clip(config), tokenizer, {"model_cfg": config}, name=arch)


def timed(call: Callable[[], Any], images: int) -> tuple[float, float, Any]:
    """Milliseconds per image of wall time and of processor time, and what the call returned."""
    start = time.perf_counter(), time.process_time()
    result = call()
    wall, busy = time.perf_counter() - start[0], time.process_time() - start[1]
    return wall / images * 1e3, busy / images * 1e3, result


def main() -> None:
    parser = argparse.ArgumentParser(description="Feature extraction against the encoder alone.")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="ViT-B-32")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="vtclip-extraction-") as name:
        root = Path(name)
        draw_folder(root / "images", args.images)
        clip = random_clip(args.model)
        folder = scan_folder(root / "images")
        pixels = [clip.preprocess(open_image(folder.path(name))) for name in folder.names]
        batches = torch.stack(pixels).split(args.batch_size)  # type: ignore[no-untyped-call]
        del pixels
        compare_with_encoder(clip, batches, root, args)


def compare_with_encoder(
    clip: Clip, batches: tuple[Tensor, ...], root: Path, args: argparse.Namespace
) -> None:
    def encoder() -> Tensor:
        clip.encode_text(sorted(CLASSES))
        return torch.cat([clip.encode_image(batch)[0] for batch in batches])

    def extraction() -> tuple[Tensor, ExtractionReport]:
        shutil.rmtree(root / "out", ignore_errors=True)
        features, report = extract_features(
            root / "images", root / "out", model=clip, batch_size=args.batch_size, progress=False
        )
        return features.records().batch(torch.arange(len(features))).image, report

    wanted = encoder()
    rows: list[tuple[float, ...]] = []
    stages: list[dict[str, float]] = []
    for number in range(args.rounds):
        pair: dict[str, Any] = {}
        for way in (encoder, extraction) if number % 2 else (extraction, encoder):
            pair[way.__name__] = timed(way, args.images)
        image, report = pair["extraction"][2]
        if not torch.equal(image, wanted):
            raise SystemExit("the extracted features are not those of the encoder")
        rows.append((*pair["encoder"][:2], *pair["extraction"][:2]))
        stages.append(report.stages)
    print(
        f"{args.model}, {args.images} JPEGs of {SIZE[0]} x {SIZE[1]}, batch {args.batch_size}, "
        f"{args.threads} threads of {num_cores()} cores, torch {torch.__version__}, "
        f"median of {args.rounds} rounds"
    )
    wall = [row[0] / row[2] for row in rows]
    busy = [row[1] / row[3] for row in rows]
    middle = [median(column) for column in zip(*rows, strict=True)]
    print(f"{'ms per image':<14} {'wall':>9} {'processor':>10}")
    print(f"{'encoder':<14} {middle[0]:>9.2f} {middle[1]:>10.2f}")
    print(f"{'extraction':<14} {middle[2]:>9.2f} {middle[3]:>10.2f}")
    print(f"{'ratio':<14} {100 * median(wall):>8.1f}% {100 * median(busy):>9.1f}%", end="")
    print(f"   wall {100 * min(wall):.1f}..{100 * max(wall):.1f}% over the rounds")
    named = {
        name: median(stage[name] for stage in stages) / args.images * 1e3 for name in stages[0]
    }
    rest = middle[2] - sum(named.values())
    parts = ", ".join(f"{name} {value:.2f}" for name, value in named.items())
    print(f"wall time of extraction: {parts}, the rest {rest:.2f} ms per image")


if __name__ == "__main__":
    main()
