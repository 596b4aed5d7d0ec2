# SPDX-License-Identifier: Apache-2.0
"""The tables of docs/few_shot.md, made from benchmarks/results/few_shot: `--write` puts them there.

real_texts.csv and made_texts.csv are the `report.csv` that `vtclip report` writes for the two calls
of `vtclip bench` that the page names.
"""

from __future__ import annotations

import argparse
import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "few_shot"
PAGE = HERE.parent / "docs" / "few_shot.md"
PICTURE = HERE.parent / "docs" / "images" / "few_shot.png"
SHOTS = ("1", "2", "4", "8", "16")
TITLES = {
    "whurs19_CLIP_ViT-B-32": "WHU-RS19, CLIP ViT-B/32: 19 classes, 500 test images",
    "whurs19_CLIP_RN50": "WHU-RS19, CLIP RN50",
    "whurs19_GeoRSCLIP_ViT-B-32": "WHU-RS19, GeoRSCLIP ViT-B/32 (trained on satellite photos)",
    "whurs19_SkyCLIP50_ViT-L-14": "WHU-RS19, SkyCLIP ViT-L/14 (trained on satellite photos)",
    "mira_tinyclip_fashion": "Product photos (MIRA), TinyCLIP: 18 classes, spatial features",
    "dtd47_ViT-B-32_semi": "DTD, ViT-B/32: 47 classes, made texts",
    "ucf101_ViT-B-32_semi": "UCF101, ViT-B/32: 101 classes, made texts",
}
SHOWN = {  # colour and line of what the picture shows
    "auto": ("#1f5fbf", "o-"),
    "takl": ("#0f9d8a", "s-"),
    "tip-adapter-f": ("#c0392b", "^-"),
    "taskres": ("#8e44ad", "v-"),
    "linear-probe": ("#b8860b", "d-"),
    "zeroshot": ("#666666", "--"),
}
Cells = dict[tuple[str, str, str], dict[str, str]]


def load(name: str) -> Cells:
    """(source, method, shots) -> row, for methods that have every cell of every source."""
    with (RESULTS / name).open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if not row["source"].startswith("Mean of")]
    return {(row["source"], row["method"], row["shots"]): row for row in rows if row["accuracy"]}


def whole_methods(cells: Cells, sources: Sequence[str]) -> list[str]:
    methods = list(dict.fromkeys(method for _, method, _ in cells))
    return [m for m in methods if all((s, m, k) in cells for s in sources for k in SHOTS)]


def mean(cells: Cells, sources: Sequence[str], method: str, shots: str, column: str) -> float:
    return sum(float(cells[s, method, shots][column]) for s in sources) / len(sources)


def accuracy_table(cells: Cells, sources: Sequence[str]) -> Iterator[str]:
    """Methods by shots, best of each column in bold; ± of one source alone."""
    methods = whole_methods(cells, sources)
    best = [max(mean(cells, sources, m, k, "accuracy") for m in methods) for k in SHOTS]
    yield f"| method | {' | '.join(f'{k} shot{chr(115) * (k != chr(49))}' for k in SHOTS)} |"
    yield f"| --- |{' ---: |' * len(SHOTS)}"
    for method in methods:
        line = []
        for shots, top in zip(SHOTS, best, strict=True):
            value = mean(cells, sources, method, shots, "accuracy")
            shown = f"**{value:.2f}**" if value == top else f"{value:.2f}"
            row = cells[sources[0], method, shots]
            half = row["half_interval"] if len(sources) == 1 and row["interval"] == "seeds" else ""
            line.append(shown + (f" ± {float(half):.2f}" if half else ""))
        yield f"| {method} | {' | '.join(line)} |"


def cost_table(cells: Cells, sources: Sequence[str]) -> Iterator[str]:
    """Calibration and seconds of training, means over sources."""
    yield "| method | ECE at T, 1 shot | ECE at T, 16 shots | train s, 1 shot | train s, 16 shots |"
    yield "| --- | ---: | ---: | ---: | ---: |"
    for method in whole_methods(cells, list(dict.fromkeys(source for source, _, _ in cells))):
        words = []
        for column, digits in (("ece_scaled", 4), ("train_seconds", 2)):
            for shots in ("1", "16"):
                rows = [cells[source, method, shots][column] for source in sources]
                known = all(rows)
                words.append(f"{sum(map(float, rows)) / len(rows):.{digits}f}" if known else "–")
        yield f"| {method} | {' | '.join(words)} |"


def tables() -> str:
    lines: list[str] = []
    for name, what in (("real_texts.csv", "real texts"), ("made_texts.csv", "made texts")):
        cells = load(name)
        sources = [source for source in TITLES if any(s == source for s, _, _ in cells)]
        lines += [f"### Mean of the {len(sources)} tables with {what}", ""]
        lines += [*accuracy_table(cells, sources), "", *cost_table(cells, sources), ""]
        for source in sources:
            lines += [f"### {TITLES[source]}", "", *accuracy_table(cells, [source]), ""]
    return "\n".join(lines)


def draw() -> None:
    """Means over the sources of each kind, one line per method of SHOWN."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), dpi=110)
    panels = {
        "real_texts.csv": "tables with real texts",
        "made_texts.csv": "tables with made texts",
    }
    for axis, (name, what) in zip(axes, panels.items(), strict=True):
        cells = load(name)
        sources = [source for source in TITLES if any(s == source for s, _, _ in cells)]
        for method, (colour, style) in SHOWN.items():
            values = [mean(cells, sources, method, shots, "accuracy") for shots in SHOTS]
            width = 2.5 if method == "auto" else 1.3
            axis.plot(range(5), values, style, color=colour, label=method, linewidth=width)
        axis.set(title=f"mean of {len(sources)} {what}", xlabel="training images per class")
        axis.set_xticks(range(5), SHOTS)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#dddddd")
    axes[0].set_ylabel("accuracy on held-out images, %")
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(PICTURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the tables into the page")
    parser.add_argument("--figure", action="store_true", help="draw the picture (needs matplotlib)")
    args = parser.parse_args()
    if args.figure:
        draw()
    if not args.write:
        if not args.figure:
            print(tables())
        return
    text = PAGE.read_text(encoding="utf-8")
    begin, end = "<!-- tables -->\n", "<!-- end of tables -->\n"
    between = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    PAGE.write_text(between.sub(lambda _: f"{begin}\n{tables()}\n{end}", text), encoding="utf-8")


if __name__ == "__main__":
    main()
