# SPDX-License-Identifier: Apache-2.0
"""Draws docs/images/first_picture.png from benchmarks/results/few_shot (needs matplotlib).

The tables are the `report.csv` that `vtclip report` writes for
    vtclip bench whurs19_CLIP_ViT-B-32.npz whurs19_CLIP_RN50.npz mira_tinyclip_fashion.npz \\
        --methods zeroshot,auto --shots 1,2,4,8,16 --seeds 1,2,3 --threads 1 --out satellite
    vtclip bench mira_tinyclip_fashion.npz --methods zeroshot,vtclip,auto \\
        --shots 1,2,4,8,16 --seeds 1,2,3 --threads 1 --out products
The first call passes the third table over, which has too few images of some of its 45 classes; the
second takes the 18 classes that have spatial features.
"""

from __future__ import annotations

import csv
from pathlib import Path

HERE = Path(__file__).parent
TABLES = HERE / "results" / "few_shot"
OUT = HERE.parent / "docs" / "images" / "first_picture.png"
PANELS = {
    "whurs19_CLIP_ViT-B-32": "Satellite photos, CLIP ViT-B/32\n19 classes, 500 test images",
    "whurs19_CLIP_RN50": "Satellite photos, CLIP RN50\n19 classes, 500 test images",
    "mira_tinyclip_fashion": "Product photos, small CLIP that\nknows them, 18 classes, 754 images",
}
SHOTS = ("1", "2", "4", "8", "16")
BLUE, GREY = "#1f5fbf", "#666666"


def accuracies() -> dict[tuple[str, str, str], float]:
    """(source, method, shots) -> mean accuracy over seeds in percent."""
    rows: dict[tuple[str, str, str], float] = {}
    for path in sorted(TABLES.glob("*_photos.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                if not row["accuracy"]:  # passed over
                    continue
                key = row["source"], row["method"], row["shots"]
                rows[key] = float(row["accuracy"])
    return rows


def main() -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    rows = accuracies()
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.5), sharey=True, dpi=110)
    for axis, (source, title) in zip(axes, PANELS.items(), strict=True):
        values = [rows[source, "auto", shots] for shots in SHOTS]
        zero = rows[source, "zeroshot", "16"]
        axis.axhline(zero, color=GREY, linestyle="--")
        axis.plot(range(5), values, color=BLUE, marker="o", linewidth=2)
        for place, value in enumerate(values):
            axis.annotate(f"{value:.1f}", (place, value), (0, 7), textcoords="offset points",
                          ha="center", color=BLUE)  # fmt: skip
        axis.annotate(f"CLIP without training {zero:.1f}", (4.2, zero), (0, -13),
                      textcoords="offset points", ha="right", color=GREY)  # fmt: skip
        axis.set(title=title, xlim=(-0.4, 4.4), ylim=(66, 104), xlabel="training images per class")
        axis.set_xticks(range(5), SHOTS)
        axis.title.set_fontsize(10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("accuracy on held-out images, %")
    axes[0].annotate("vtclip fit", (1, rows["whurs19_CLIP_ViT-B-32", "auto", "2"]), (14, -22),
                     textcoords="offset points", color=BLUE, weight="bold")  # fmt: skip
    figure.tight_layout()
    figure.savefig(OUT)


if __name__ == "__main__":
    main()
