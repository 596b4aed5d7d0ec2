# SPDX-License-Identifier: Apache-2.0
"""`vtclip models`: the models that --model can name, and which of them are on this machine."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from vtclip.cli.parsing import Parser, emit, emit_json
from vtclip.files import several

if TYPE_CHECKING:
    from vtclip.clip.listing import Listed

DETAILED = 12  # at most so many are shown with their tags, parameters and spatial features


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "pattern",
        metavar="PATTERN",
        nargs="?",
        default="",
        help="only models whose ARCHITECTURE:TAG holds it, as siglip, laion or B-32; of a dozen or "
        "fewer architectures tags, parameters and spatial features are shown, too",
    )
    parser.add_shared("--json")


def run(args: argparse.Namespace) -> int:
    from vtclip.clip.listing import listed
    from vtclip.clip.names import nearest_of

    found = listed(args.pattern)
    if not found:
        near = nearest_of(args.pattern, [one.name for one in listed()])
        raise ValueError(f"PATTERN {args.pattern!a}: no model has it in its name{near}")
    detailed = len(found) <= DETAILED
    if args.json:
        emit_json("models", {"models": [_row(one, detailed) for one in found]})
    elif detailed:
        _print_detailed(found)
    else:
        _print_table(found)
    return 0


def _row(one: Listed, detailed: bool) -> dict[str, Any]:
    row: dict[str, Any] = {
        **{"name": one.name, "size": one.size, "width": one.width, "tower": one.tower},
        **{"text_tower": one.text_tower, "tags": list(one.tags), "cached": list(one.cached)},
    }
    if not detailed:
        return row
    from vtclip.clip.listing import built

    try:
        row |= built(one.name)._asdict()
    except ValueError as error:
        row["reason"] = str(error)
    return row


def _pixels(size: int | list[int]) -> str:
    return str(size) if isinstance(size, int) else "x".join(map(str, size))


def _print_detailed(found: Sequence[Listed]) -> None:
    for one in found:
        row = _row(one, True)
        text = f", text tower {one.text_tower}" if one.text_tower else ""
        emit(f"{one.name}: {_pixels(one.size)} pixels, width {one.width}, {one.tower}{text}")
        if "reason" in row:
            emit(f"  {row['reason']}")
        else:
            image, text_part = (
                f"{row[f'{part}_parameters'] / 1e6:.1f}" for part in ("image", "text")
            )
            spatial = ", ".join(f"{name} ({width})" for name, width in row["spatial"].items())
            emit(f"  {image} million parameters of the image tower, {text_part} of the text tower")
            emit(f"  spatial features: {spatial or 'none, so no --method vtclip'}")
        for tag in one.tags:
            here = "  on this machine" if tag in one.cached else ""
            emit(f"  {'demo' if one.name == 'demo' else f'{one.name}:{tag}'}{here}")


def _print_table(found: Sequence[Listed]) -> None:
    here = [f"{one.name}:{tag}" for one in found for tag in one.cached if one.name != "demo"]
    words = ", ".join(here) if here else "none"
    emit(f"weights on this machine: demo (bundled); fetched before: {words}")
    rows = [("architecture", "pixels", "width", "tower", "weights published")]
    for one in found:
        shown = ", ".join(one.tags[:2]) + (", ..." if len(one.tags) > 2 else "")
        tags = f"{len(one.tags)}: {shown}" if one.tags else "none; give a file"
        rows.append((one.name, _pixels(one.size), str(one.width), one.tower, tags))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        name, *rest = (cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        emit("  ".join((name, *rest, row[4])).rstrip())
    emit(
        f"{several(len(found), 'architecture')}; name one as ARCHITECTURE:TAG or "
        "ARCHITECTURE:FILE. vtclip models PATTERN shows more of a few"
    )
