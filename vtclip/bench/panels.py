# SPDX-License-Identifier: Apache-2.0
"""Pictures of a report as SVG: accuracy against shots, one panel per source, and reliability.

Colours are CSS variables of `THEME`, so that one picture serves light and dark pages. Every text is
escaped. A picture is made of strings, without a drawing library.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from vtclip.bench.cells import Cell, Group, method_of
from vtclip.bench.published import matching, mean_over, read_published
from vtclip.bench.tables import margin_of
from vtclip.files import printable
from vtclip.names import SHOTS

Bin = tuple[float, float, int]  # confidence, accuracy, count
Style = tuple[str, str, bool]  # colour, mark, hollow
NUM_BINS = 15
WIDTH, HEIGHT = PANEL = 330, 240
DIAGRAM = 166, 192
LEFT, RIGHT, TOP, BOTTOM = 40, 322, 30, 208
LIGHT = "2a78d6 eb6834 1baf7a e87ba4 b87c00 4a3aa7 008300 e34948"
DARK = "3987e5 d95926 199e70 d55181 c98500 9085e9 4aa84a e66767"
MARKS = ("circle", "square", "up", "diamond", "down", "plus", "bar", "cross")
# marks of radius 1 about the origin, as SVG paths
PATHS = {
    "circle": "M-1 0a1 1 0 1 0 2 0a1 1 0 1 0 -2 0Z",
    "square": "M-.9 -.9H.9V.9H-.9Z",
    "up": "M0 -1.15L1.1 .85H-1.1Z",
    "down": "M0 1.15L1.1 -.85H-1.1Z",
    "diamond": "M0 -1.25L1.25 0L0 1.25L-1.25 0Z",
    "plus": "M-.4 -1.1H.4V-.4H1.1V.4H.4V1.1H-.4V.4H-1.1V-.4H-.4Z",
    "bar": "M-.5 -1.2H.5V1.2H-.5Z",
    "cross": "M-1 -.5L-.5 -1L0 -.5L.5 -1L1 -.5L.5 0L1 .5L.5 1L0 .5L-.5 1L-1 .5L-.5 0Z",
}


def _variables(ground: str, ink: str, soft: str, rule: str, panel: str, colours: str) -> str:
    named = {"ground": ground, "ink": ink, "soft": soft, "rule": rule, "panel": panel}
    named |= {f"s{number}": colour for number, colour in enumerate(colours.split())}
    return ";".join(f"--{name}:#{value}" for name, value in named.items())


THEME = (
    f":root{{color-scheme:light dark;"
    f"{_variables('ffffff', '1b1b1a', '5f5e5a', 'dddcd6', 'f6f6f3', LIGHT)}}}"
    "@media(prefers-color-scheme:dark){:root{"
    f"{_variables('191918', 'ecebe6', 'a5a49d', '3d3c39', '232321', DARK)}}}}}"
    "svg text{fill:var(--ink);font:11px system-ui,sans-serif}"
    "svg .title{font-weight:600;font-size:13px}svg .soft{fill:var(--soft)}"
    "svg .grid{stroke:var(--rule);stroke-width:1}svg .frame{fill:none;stroke:var(--soft)}"
    "svg .line{fill:none;stroke-width:1.8;stroke-linejoin:round}svg .error{stroke-width:1.2}"
    "svg .published{fill:none;stroke-width:1.4;stroke-dasharray:5 3;opacity:.85}"
    "svg .zero{stroke:var(--soft);stroke-width:1.6;stroke-dasharray:1.5 2.5}"
)


def escape(text: str) -> str:
    """Text for HTML and SVG: markup is harmless, and what cannot be printed is spelled out."""
    return html.escape(printable(text), quote=True)


def styles_of(lines: Sequence[str]) -> dict[str, Style]:
    """Colour, mark and whether it is hollow, of every line but zero-shot; auto has the ink's."""
    others = [line for line in lines if line not in ("zeroshot", "auto")]
    count = len(MARKS)
    styles = {
        line: (f"var(--s{number % count})", MARKS[number % count], number >= count)
        for number, line in enumerate(others)
    }
    return {**styles, **({"auto": ("var(--ink)", "circle", False)} if "auto" in lines else {})}


def mark(style: Style, x: float, y: float, radius: float = 3.2) -> str:
    colour, name, hollow = style
    fill = "var(--ground)" if hollow else colour
    return (
        f'<path d="{PATHS[name]}" transform="translate({x:.1f} {y:.1f}) scale({radius})" '
        f'fill="{fill}" stroke="{colour}" stroke-width="{1.3 / radius:.2f}"/>'
    )


def swatch(style: Style | None) -> str:
    """A line's sample for a legend; None: that of zero-shot."""
    if style is None:
        body = '<line class="zero" x1="1" x2="27" y1="7" y2="7"/>'
    else:
        body = f'<line class="line" x1="1" x2="27" y1="7" y2="7" stroke="{style[0]}"/>'
        body += mark(style, 14, 7, 3.6)
    return f'<svg class="swatch" viewBox="0 0 28 14" width="28" height="14">{body}</svg>'


def ticks(low: float, high: float) -> list[float]:
    """Round values within low..high, three to six of them."""
    step = 10.0 ** math.floor(math.log10(high - low))
    step = next(size for size in (step / 5, step / 2, step, 2 * step) if (high - low) / size <= 6)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def published_of(group: Group, line: str, members: Sequence[Group]) -> dict[int, float]:
    """Printed accuracies of a line's method in percent, by shots.

    Of an average those over the data sets of `members`, where every one has a number, or the
    printed mean of just these sets.
    """
    if group.backbone is None or group.part is not None:
        return {}
    printed: dict[int, float] = {}
    names = [member.name for member in members if member.name is not None]
    means = [name for name, sets in read_published().averages.items() if set(sets) == set(names)]
    method = method_of(line)
    for shots in SHOTS:
        value = None
        for name in [group.name] if group.name else means if len(names) == len(members) else []:
            rows = matching(method, name, group.backbone, shots, templates=group.templates)
            value = rows[0].accuracy if rows else None
        if group.name is None and len(names) == len(members):
            mean = mean_over(method, names, group.backbone, shots, templates=group.templates)
            value = value if mean is None else mean
        if value is not None:
            printed[shots] = value
    return printed


@dataclass(frozen=True)
class Axes:
    """Shots on a logarithmic axis, percent on a plain one."""

    columns: Sequence[int]
    low: float
    high: float

    def x(self, shots: int) -> float:
        first, last = math.log2(self.columns[0]), math.log2(self.columns[-1])
        share = (math.log2(shots) - first) / (last - first) if last > first else 0.5
        return LEFT + 22 + share * (RIGHT - LEFT - 44)

    def y(self, percent: float) -> float:
        inside = min(max(percent, self.low), self.high)
        return BOTTOM - (inside - self.low) / (self.high - self.low) * (BOTTOM - TOP)


def axes_of(columns: Iterable[int], values: Sequence[float]) -> Axes:
    low, high = min(values), max(values)
    pad = max(1.0, 0.06 * (high - low))
    return Axes(sorted(columns) or [1], max(0.0, low - pad), min(100.0, high + pad))


def shots_panel(
    group: Group,
    styles: Mapping[str, Style],
    published: Mapping[str, Mapping[int, float]] | None = None,
) -> str:
    """Accuracy in percent against images per class: a line per method, bars for 95 % intervals.

    Zero-shot is dotted. published: line -> shots -> percent, dashed in the colour of its line.
    """
    published = published or {}
    lines = {line: cells for line, cells in group.lines.items() if line in styles}
    zero = [100 * cell.mean for cell in group.lines.get("zeroshot", {}).values()]
    columns = {n for cells in lines.values() for n in cells if n > 0}
    columns |= {n for printed in published.values() for n in printed}
    values = zero + [value for printed in published.values() for value in printed.values()]
    for cell in (cell for cells in lines.values() for cell in cells.values()):
        values += [100 * value for value in _ends(cell)]
    axes = axes_of(columns, values)
    parts = [f'<text class="title" x="{LEFT}" y="18">{escape(_shortened(group.title))}</text>']
    parts.append(_grid(axes))
    if zero:
        y = axes.y(sum(zero) / len(zero))
        parts.append(f'<line class="zero" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    parts += [_dashed(printed, styles[line][0], axes) for line, printed in published.items()]
    gap = min(4.0, 24 / max(1, len(lines)))
    for place, (line, cells) in enumerate(lines.items()):
        shift = (place - (len(lines) - 1) / 2) * gap  # so that bars do not cover each other
        parts.append(_curve(line, cells, styles[line], axes, shift))
    parts.append(
        f'<rect class="frame" x="{LEFT}" y="{TOP}" width="{RIGHT - LEFT}" height="{BOTTOM - TOP}"/>'
    )
    label = f"{group.title}: accuracy in percent against images per class"
    return _svg(WIDTH, HEIGHT, label, "".join(parts))


def _grid(axes: Axes) -> str:
    parts = []
    for value in ticks(axes.low, axes.high):
        y = axes.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_soft(LEFT - 6, y + 4, f"{value:g}", "end"))
    parts += [_soft(axes.x(shots), BOTTOM + 16, str(shots)) for shots in axes.columns]
    return "".join(parts) + _soft((LEFT + RIGHT) / 2, HEIGHT - 3, "images per class")


def _soft(x: float, y: float, text: str, anchor: str = "middle") -> str:
    return f'<text class="soft" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{text}</text>'


def _dashed(printed: Mapping[int, float], colour: str, axes: Axes) -> str:
    """A published line; a single number is a short one."""
    points = [(axes.x(n), axes.y(value)) for n, value in sorted(printed.items())]
    if len(points) == 1:
        x, y = points[0]
        points = [(x - 14, y), (x + 14, y)]
    text = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="published" stroke="{colour}" points="{text}"/>' if points else ""


def _shortened(text: str, limit: int = 36) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _svg(width: int, height: int, label: str, body: str) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{body}</svg>'
    )


def _curve(line: str, cells: Mapping[int, Cell], style: Style, axes: Axes, shift: float) -> str:
    width = ' style="stroke-width:2.6"' if method_of(line) == "auto" else ""
    places = {n: (axes.x(n) + shift, axes.y(100 * cell.mean)) for n, cell in cells.items() if n > 0}
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places.values())
    parts = [f'<polyline class="line" stroke="{style[0]}"{width} points="{points}"/>']
    for shots, (x, y) in places.items():
        cell = cells[shots]
        title, bar = f"{line}, {shots} shots: {100 * cell.mean:.2f} %", ""
        if cell.half is not None:
            title += f" {margin_of(cell)}"
            foot, top = (axes.y(100 * value) for value in _ends(cell))
            ends = "".join(f"M{x - 2:.1f} {end:.1f}h4" for end in (top, foot))
            path = f"M{x:.1f} {top:.1f}V{foot:.1f}{ends}"
            bar = f'<path class="error" stroke="{style[0]}" fill="none" d="{path}"/>'
        title += f", {cell.shortfall}" if cell.missing else ""
        parts.append(f"<g><title>{escape(title)}</title>{bar}{mark(style, x, y)}</g>")
    return "".join(parts)


def _ends(cell: Cell) -> tuple[float, float]:
    """mean - half and mean + half within 0..1."""
    half = cell.half or 0.0
    return max(0.0, cell.mean - half), min(1.0, cell.mean + half)


def pooled_bins(cell: Cell, key: str) -> list[Bin | None] | None:
    """The bins of "raw" or "scaled" over all seeds of a cell, or None where a row has none."""
    sums = [[0.0, 0.0, 0] for _ in range(NUM_BINS)]
    for value in cell.values:
        bins = (value.get("reliability") or {}).get(key)
        if not isinstance(bins, list) or len(bins) != NUM_BINS:
            return None
        for total, (confidence, share, count) in zip(sums, bins, strict=True):
            if count:
                total[0] += confidence * count
                total[1] += share * count
                total[2] += count
    if not any(count for _, _, count in sums):
        return None
    return [(c / n, a / n, int(n)) if n else None for c, a, n in sums]


def bins_error(bins: Sequence[Bin | None]) -> float:
    """The expected calibration error of pooled bins."""
    filled = [bin_ for bin_ in bins if bin_ is not None]
    return sum(n * abs(a - c) for c, a, n in filled) / sum(n for _, _, n in filled)


def reliability(title: str, raw: Sequence[Bin | None], scaled: Sequence[Bin | None] | None) -> str:
    """Accuracy against confidence: columns as the head gives it, dots at the fitted temperature.

    The area of a dot and the strength of a column say what share of the images it holds.
    """
    side, left, top = 128, 30, 26
    foot, width = top + side, side / NUM_BINS
    total = sum(bin_[2] for bin_ in raw if bin_ is not None)
    parts = [f'<text class="title" x="4" y="15">{escape(_shortened(title, 22))}</text>']
    for value in (0.0, 0.5, 1.0):
        y = foot - value * side
        parts.append(f'<line class="grid" x1="{left}" x2="{left + side}" y1="{y}" y2="{y}"/>')
        parts.append(_soft(left - 5, y + 4, f"{value:g}", "end"))
        parts.append(_soft(left + value * side, foot + 14, f"{value:g}"))
    for number, (confidence, share, count) in ((i, bin_) for i, bin_ in enumerate(raw) if bin_):
        tooltip = f"confidence {confidence:.3f}, accuracy {share:.3f}, {count} images"
        parts.append(
            f'<rect x="{left + number * width + 0.5:.1f}" y="{foot - share * side:.1f}" '
            f'width="{width - 1:.1f}" height="{share * side:.1f}" fill="var(--s0)" '
            f'opacity="{0.3 + 0.7 * math.sqrt(count / total):.2f}"><title>{tooltip}</title></rect>'
        )
    parts.append(
        f'<line class="zero" x1="{left}" y1="{foot}" x2="{left + side}" y2="{top}"/>'
        f'<rect class="frame" x="{left}" y="{top}" width="{side}" height="{side}"/>'
    )
    note = f"ECE {bins_error(raw):.3f}"
    if scaled is not None:
        note += f", at T {bins_error(scaled):.3f}"
    for confidence, share, count in filter(None, scaled or ()):
        parts.append(
            f'<circle cx="{left + confidence * side:.1f}" cy="{foot - share * side:.1f}" '
            f'r="{1.2 + 4.5 * math.sqrt(count / total):.1f}" fill="var(--s1)" '
            'stroke="var(--ground)" stroke-width=".8"/>'
        )
    parts.append(f'<text x="{left}" y="{foot + 32}">{note}</text>')
    return _svg(*DIAGRAM, f"{title}: {note}", "".join(parts))


def sheet(
    pictures: Sequence[str], columns: int, size: tuple[int, int], legend: Mapping[str, str]
) -> str:
    """Pictures of one size in rows, with a legend of swatches below, as one SVG file."""
    width, height = size
    columns = min(columns, len(pictures))
    per_row = max(1, columns * width // 150)
    rows = math.ceil(len(pictures) / columns)
    foot = rows * height + 16
    parts = []
    for number, picture in enumerate(pictures):
        x, y = number % columns * width, number // columns * height
        place = f'<svg x="{x}" y="{y}" width="{width}" height="{height}" '
        parts.append(picture.replace("<svg ", place, 1))
    for number, (name, sample) in enumerate(legend.items()):
        x, y = number % per_row * 150 + 14, foot + number // per_row * 18
        parts.append(sample.replace("<svg ", f'<svg x="{x}" y="{y}" ', 1))
        parts.append(f'<text x="{x + 34}" y="{y + 11}">{escape(_shortened(name, 20))}</text>')
    total = foot + math.ceil(len(legend) / per_row) * 18 + 8
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {columns * width} {total}" '
        f'width="{columns * width}" height="{total}"><!-- vtclip report -->'
        f'<style>{THEME}</style><rect width="100%" height="100%" fill="var(--ground)"/>'
        f"{''.join(parts)}</svg>\n"
    )
