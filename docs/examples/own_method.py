# SPDX-License-Identifier: Apache-2.0
"""A method of your own: registered, fitted, loaded again, and benched against two others.

python docs/examples/own_method.py OUT_DIR
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import vtclip
from vtclip.bench.jobs import Settings, path_sources
from vtclip.bench.run import run_bench
from vtclip.heads import ImageHead, Support


class Centroid(ImageHead):
    """logits = s * cos(image, share * class mean + (1 - share) * class text)."""

    def __init__(self, text: Tensor, *, share: float = 0.7, logit_scale: float = 100.0) -> None:
        super().__init__(text, logit_scale=logit_scale)  # text [K, C], the class texts
        self.share = share
        self.register_buffer("centre", F.normalize(self.text, dim=-1))  # buffers are saved

    def fit_support(self, support: Support) -> None:
        one_hot = F.one_hot(support.label, self.num_classes).to(self.text)  # [N, K]
        mean = F.normalize(one_hot.mT @ support.image, dim=-1)
        text = F.normalize(self.text, dim=-1)
        self.centre = F.normalize(self.share * mean + (1 - self.share) * text, dim=-1)

    def image_logits(self, image: Tensor) -> Tensor:
        return self.logit_scale * F.normalize(image, dim=-1) @ self.centre.mT


def make_table(path: Path, classes: int = 10, width: int = 64, per_class: int = 60) -> None:
    """Features whose class texts point beside the images, as a model's do in a new domain."""
    rng = np.random.default_rng(0)
    text = rng.normal(size=(classes, width))
    label = np.arange(classes).repeat(per_class)
    shifted = text + 1.2 * np.roll(text, 1, axis=0)
    np.savez(
        path,
        image=(shifted[label] + 3 * rng.normal(size=(len(label), width))).astype(np.float32),
        label=label,
        text=text.astype(np.float32),
        classname=np.array([f"class {k}" for k in range(classes)]),
        temperature=np.float32(np.log(50.0)),
    )


def main(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    make_table(out / "table.npz")
    vtclip.register_method("centroid", Centroid)

    run = vtclip.fit(out / "table.npz", method="centroid", shots=8, out=out / "run")
    again = vtclip.evaluate(out / "run")  # loads the saved head; registered, so it is found
    print(f"centroid: {run.accuracy:.3f}, loaded again: {again['accuracy']:.3f}")
    assert again["accuracy"] == run.accuracy

    outcome = run_bench(
        path_sources([out / "table.npz"], Settings()),
        out / "bench",
        methods=["zeroshot", "centroid", "proker"],
        shots=[4, 16],
        seeds=[1, 2, 3],
    )
    print((outcome.out / "table.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
