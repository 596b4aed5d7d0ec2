# SPDX-License-Identifier: Apache-2.0
"""Small runs with their recorded outputs, which later versions must go on reading.

`tests/runs/old` was written by this script with the package of revision c85992c, on the CPU:

    git worktree add ../before c85992c
    (cd ../before && VTCLIP_EXT=cpu pip install .)      # or PYTHONPATH with a built extension
    python tests/runs/make_old_runs.py NEW_FOLDER

It is kept to show how the data came about, and is not run again on a later version: new runs would
not be old ones. The inputs are drawn from fixed seeds. A run records where its source lay; that is
made relative to the folder, which is the one change to what `fit` wrote.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

import vtclip
from vtclip.demo.scenes import CLASS_NAMES, render_scene, shifted_scene

TABLE, PICTURES = Path("features.npz"), Path("pictures")
RUNS: dict[str, dict[str, Any]] = {
    "tip-adapter-f": {"source": TABLE, "method": "tip-adapter-f", "shots": 2},
    "rada": {"source": TABLE, "method": "rada", "shots": 4, "seed": 2},
    "rada-adapters": {
        "source": TABLE,
        "method": "rada",
        "shots": 2,
        "overrides": {"head": {"adapters": True, "penalty": "l1"}},
    },
    "auto": {"source": TABLE, "method": "auto", "shots": 4},
    "vtclip-table": {"source": TABLE, "method": "vtclip", "shots": 2},
    "tip-adapter-f-pictures": {"source": PICTURES, "method": "tip-adapter-f", "shots": 2},
    "base-to-new": {"source": TABLE, "method": "rada", "shots": 2, "base_to_new": True},
}


def write_table(path: Path) -> None:
    """48 rows of 4 classes near their class texts: image [48, 16], spatial [48, 5, 16]."""
    generator = torch.Generator().manual_seed(11)
    text = functional.normalize(torch.randn(4, 16, generator=generator), dim=-1)
    label = torch.arange(4).repeat_interleave(12)
    image = text[label] + 0.3 * torch.randn(48, 16, generator=generator)
    spatial = text[label][:, None] + 0.3 * torch.randn(48, 5, 16, generator=generator)
    np.savez(
        path,
        image=image.numpy(),
        spatial=spatial.numpy(),
        label=label.numpy(),
        text=text.numpy(),
        classname=np.array(["ant", "bee", "cat", "dog"]),
        temperature=np.float32(np.log(20.0)),
    )


def write_pictures(root: Path) -> None:
    """Six pictures of each of three classes that the demo model has seen."""
    for label in (0, 4, 8):
        draws = np.random.default_rng(label)
        folder = root / CLASS_NAMES[label]
        folder.mkdir(parents=True)
        for number in range(6):
            pixels = render_scene(shifted_scene(label, draws), draws)[0]
            coarse = pixels // 32 * 32  # eight values per channel: small files without loss
            Image.fromarray(coarse).save(folder / f"{number}.png", optimize=True)


def probabilities(folder: Path, source: Path) -> list[list[float]]:
    """Of every row of the table, or every picture in the order of names."""
    if source == PICTURES:
        classifier = vtclip.Classifier.load(folder, device="cpu")
        names = classifier.class_names
        rows = classifier.predict(sorted(source.glob("*/*.png")), topk=len(names))
        by_name = [{found.label: found.probability for found in row} for row in rows]
        return [[row[name] for name in names] for row in by_name]
    # not an import statement: this is the module's name in that revision
    adapter = importlib.import_module("vtclip.runs.adapter").load_adapter(folder)
    records = vtclip.open_source(source)
    batch = records.batch(torch.arange(len(records)))
    inputs = (batch.image, batch.spatial) if adapter.head.needs_spatial else (batch.image,)
    with torch.no_grad():
        logits = adapter.head(*inputs).double()
    rows: list[list[float]] = (logits / (adapter.temperature or 1.0)).softmax(1).tolist()
    return rows


def main(out: Path) -> None:
    out.mkdir(parents=True)
    os.chdir(out)
    torch.set_num_threads(1)
    write_table(TABLE)
    write_pictures(PICTURES)
    recorded = {}
    for name, arguments in RUNS.items():
        run = vtclip.fit(**arguments, out=name, cache_dir="../cache", device="cpu", threads=1)
        result = Path(name, "result.json")
        recorded_source = json.dumps(str(arguments["source"].resolve()))
        text = result.read_text("utf-8").replace(recorded_source, f'"{arguments["source"]}"')
        result.write_text(text, encoding="utf-8")
        recorded[name] = {
            "accuracy": run.result["accuracy"],
            "evaluate": vtclip.evaluate(name, cache_dir="../cache", device="cpu", threads=1),
            "probabilities": probabilities(Path(name), arguments["source"]),
        }
    Path("recorded.json").write_text(json.dumps(recorded) + "\n", encoding="ascii")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
