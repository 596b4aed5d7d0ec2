# SPDX-License-Identifier: Apache-2.0
"""`vtclip demo`: all steps from pictures to heat maps, with what ships with the package.

It draws the shifted scenes as an image folder, extracts features with the bundled CLIP, fits
VT-CLIP with 1, 4 and 16 images per class, compares it with zero-shot on the same held-out images,
and asks whether a class looks at its object: the token that the true class attends to most must
fall into the object's box. Everything uses the public calls: `vtclip.fit`, the feature cache, the
adapter folder.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from vtclip.data.records import Records
from vtclip.data.sources import open_source
from vtclip.data.splits import few_shot_split
from vtclip.demo.pictures import from_pixels, heat_panel, sheet, shots_curve
from vtclip.demo.scenes import SIDE, Box, demo_set
from vtclip.files import Json, only_writer, to_json, write_atomic
from vtclip.machine import choose_device
from vtclip.runs.adapter import load_adapter
from vtclip.runs.fit import fit

SHOTS = (1, 4, 16)
SPATIAL = "projected"
IMAGES_PER_CLASS = 48
PANELS = 8
# Settings were chosen on scenes of the seeds 1 and 1001; the demo draws others.
FRESH_SCENES = 5000
# Chosen on those scenes (README.md). The attention starts as token-text similarity; the tokens
# keep their length, which distinguishes objects from background.
OVERRIDES: Json = {
    "epochs": 20,
    "optimizer": "sgd",
    "lr": 2e-3,
    "weight_decay": 5e-4,
    "warmup": "linear",
    "head": {"init": "aligned", "unit_spatial": False},
}


@dataclass(frozen=True)
class DemoImages:
    """The drawn folder; pixels and target box of each image by its file name in the folder."""

    folder: Path
    pixels: dict[str, Tensor]
    boxes: dict[str, Box]


def draw_images(out: Path, per_class: int, seed: int) -> DemoImages:
    """Writes out/images/CLASS/NNN.png and out/boxes.json, replacing those of an earlier run."""
    folder = out / "images"
    images, labels, boxes, class_names = demo_set(per_class, seed)
    pixels: dict[str, Tensor] = {}
    box_of: dict[str, Box] = {}
    for row, label in enumerate(labels.tolist()):
        name = f"{class_names[label]}/{row % per_class:03d}.png"
        x0, y0, x1, y1 = boxes[row].tolist()
        box_of[name] = (x0, y0, x1, y1)
        pixels[name] = from_pixels(images[row])
    if folder.exists():
        present = {path.relative_to(folder).as_posix() for path in folder.rglob("*.*")}
        unknown = sorted(present - set(box_of))
        if unknown:
            wish = "must hold only the images of this run"
            raise ValueError(f"demo: {folder} {wish}, got {unknown[0]!r}")
    for name, picture in pixels.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _save(Image.fromarray(picture.numpy(), mode="RGB"), folder / name)
    write_atomic(out / "boxes.json", json.dumps(box_of).encode())
    return DemoImages(folder, pixels, box_of)


def points_inside(weights: Tensor, boxes: Sequence[Box]) -> Tensor:
    """Whether the centre of the strongest token lies in the box: weights [N, L] -> bool [N]."""
    grid = round(weights.shape[1] ** 0.5)
    best = weights.argmax(dim=1)
    x = (best % grid + 0.5) * SIDE / grid
    y = (best // grid + 0.5) * SIDE / grid
    box = torch.tensor(boxes)  # [N, 4]
    inside: Tensor = (box[:, 0] <= x) & (x < box[:, 2]) & (box[:, 1] <= y) & (y < box[:, 3])
    return inside


def box_share(boxes: Sequence[Box]) -> float:
    """Mean share of the image that the boxes cover: what a random token scores."""
    box = torch.tensor(boxes, dtype=torch.float64)
    return float(((box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])).mean() / SIDE**2)


def true_class(values: Tensor, label: Tensor) -> Tensor:
    """values [N, K, L], label [N] -> [N, L]."""
    return values[torch.arange(len(label)), label]


def pointing(
    records: Records, test: Tensor, boxes: dict[str, Box], folders: dict[int, list[Path]]
) -> Json:
    """How often the true class points into its box.

    "chance": a random token; "token_text" and "token_text_product": the token with the largest
    cosine or inner product with the class text; "vtclip": the largest attention weight, by shots.
    """
    batch = records.batch(test)
    if batch.spatial is None:
        raise ValueError("pointing: records must hold spatial features, got none")
    targets = [boxes[records.names[row]] for row in test.tolist()]
    text = records.text[batch.label][:, :, None]  # [N, C, 1]
    product = (batch.spatial @ text)[:, :, 0]  # [N, L]
    cosine = (F.normalize(batch.spatial, dim=-1) @ text)[:, :, 0]
    scores: Json = {
        "chance": box_share(targets),
        "token_text": _share(points_inside(cosine, targets)),
        "token_text_product": _share(points_inside(product, targets)),
        "vtclip": {},
    }
    for shots, runs in folders.items():
        heads: list[Any] = [load_adapter(folder, device="cpu").head for folder in runs]
        weights = [true_class(head.attention(batch.spatial), batch.label) for head in heads]
        scores["vtclip"][shots] = _mean([_share(points_inside(w, targets)) for w in weights])
    return scores


def heat_maps(
    records: Records, test: Tensor, images: DemoImages, folder: Path, count: int
) -> Image.Image:
    """The first test image of each of `count` classes, with what the true class attends to."""
    head: Any = load_adapter(folder, device="cpu").head
    names = records.class_names
    step = max(1, len(names) // count)
    panels = []
    for label in range(0, step * count, step):
        row = test[records.label[test] == label][:1]
        batch = records.batch(row)
        with torch.no_grad():
            zero_shot = F.normalize(batch.image, dim=-1) @ records.text.T
            adapted = head(batch.image, batch.spatial)
            weights = head.attention(batch.spatial)[0, label]
        name = records.names[int(row)]
        lines = [
            f"{names[label]}: where its text looks",
            f"zero-shot says {names[int(zero_shot.argmax())]}",
            f"VT-CLIP says {names[int(adapted.argmax())]}",
        ]
        panels.append(heat_panel(images.pixels[name], weights, images.boxes[name], lines))
    return sheet(panels, columns=2)


def table(summary: Json) -> str:
    """The result as lines of text."""
    point = summary["pointing"]
    lines = ["shots  zero-shot  VT-CLIP   gain   points into the box"]
    for shots, row in summary["shots"].items():
        lines.append(
            f"{shots:5d}  {100 * row['zero_shot']:7.1f} %  {100 * row['vtclip']:5.1f} %"
            f"  {100 * (row['vtclip'] - row['zero_shot']):+5.1f}"
            f"   {100 * point['vtclip'][shots]:5.1f} %"
        )
    lines.append(
        f"without training: token-text cosine {100 * point['token_text']:.1f} %, "
        f"inner product {100 * point['token_text_product']:.1f} %, "
        f"a random token {100 * point['chance']:.1f} %"
    )
    lines.append(
        f"{summary['classes']} classes, {summary['test_images']} test images, mean over seeds "
        f"{', '.join(map(str, summary['seeds']))}; {summary['seconds']['total']:.0f} s"
    )
    return "\n".join(lines)


def run_demo(
    out: str | Path,
    *,
    seed: int = 1,
    threads: int | None = None,
    repeats: int = 3,
    images_per_class: int = IMAGES_PER_CLASS,
    shots: Sequence[int] = SHOTS,
    device: str | None = None,
    progress: bool = False,
) -> Json:
    """Runs the demonstration in the folder `out` and returns its numbers.

    It writes images/, boxes.json, features/, runs/, heat_maps.png, shots.png, result.json and
    table.txt; "table" of the returned dict is the text to show. The accuracies are means over the
    seeds seed .. seed + repeats - 1, which draw the training images; the test images are the same
    for all. `threads` is 1 by default: the matrices are too small to share, and threads that wait
    for each other are what makes a busy machine slow. progress: bars on stderr, where it is a
    terminal.
    """
    if repeats < 1:
        raise ValueError(f"demo: repeats must be at least 1, got {repeats}")
    if not shots or min(shots) < 1:
        raise ValueError(f"demo: shots must be at least 1, got {list(shots)}")
    choose_device(device)  # refused before anything is drawn
    before = torch.get_num_threads()
    try:
        folder = Path(out).expanduser()
        with only_writer(folder):
            return _run(
                folder, seed, threads or 1, repeats, images_per_class, shots, device, progress
            )
    finally:
        torch.set_num_threads(before)


def _run(
    out: Path,
    seed: int,
    threads: int,
    repeats: int,
    images_per_class: int,
    shots: Sequence[int],
    device: str | None,
    progress: bool,
) -> Json:
    started = time.perf_counter()
    images = draw_images(out, images_per_class, FRESH_SCENES + seed)
    drawn = time.perf_counter()
    common: Json = {"model": "demo", "spatial": SPATIAL, "cache_dir": out / "features"}
    seeds = [seed + offset for offset in range(repeats)]
    folders: dict[int, list[Path]] = {}
    rows: dict[int, Json] = {}
    bar = tqdm(total=len(shots) * repeats, desc="fits", leave=False,
               disable=None if progress else True)  # fmt: skip
    for count in shots:
        results = []
        for fit_seed in seeds:
            run = fit(
                images.folder,
                method="vtclip",
                shots=count,
                exact_shots=True,
                seed=fit_seed,
                overrides=OVERRIDES,
                out=out / "runs" / f"vtclip-{count}shot-seed{fit_seed}",
                overwrite=True,
                device=device,
                threads=threads,
                **common,
            )
            folders.setdefault(count, []).append(run.folder)
            results.append(run.result)
            bar.update()
        adapted = [result["adapted"]["accuracy"] for result in results]
        rows[count] = {
            "zero_shot": results[0]["zero_shot"]["accuracy"],
            "vtclip": _mean(adapted),
            "vtclip_seeds": adapted,
        }
    bar.close()
    fitted = time.perf_counter()
    records = open_source(images.folder, need_spatial=True, progress=False, **common)
    test = few_shot_split(records.label, records.names, shots=max(shots), seed=seed).test
    scores = pointing(records, test, images.boxes, folders)
    run_folder = folders[max(shots)][0]
    _save(heat_maps(records, test, images, run_folder, PANELS), out / "heat_maps.png")
    zero_shot = rows[max(shots)]["zero_shot"]
    curve = shots_curve(zero_shot, {count: row["vtclip_seeds"] for count, row in rows.items()})
    _save(curve, out / "shots.png")
    done = time.perf_counter()
    summary: Json = {
        "shots": rows,
        "pointing": scores,
        "seeds": seeds,
        "classes": len(records.class_names),
        "test_images": len(test),
        "seconds": {
            "draw": drawn - started,
            "features and fits": fitted - drawn,
            "pictures": done - fitted,
            "total": done - started,
        },
    }
    write_atomic(out / "result.json", to_json(summary))
    summary["table"] = table(summary)
    write_atomic(out / "table.txt", (summary["table"] + "\n").encode())
    summary["out"] = out
    return summary


def _save(picture: Image.Image, path: Path) -> None:
    data = io.BytesIO()
    picture.save(data, "PNG")
    write_atomic(path, data.getvalue())


def _share(hits: Tensor) -> float:
    return float(hits.double().mean())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
