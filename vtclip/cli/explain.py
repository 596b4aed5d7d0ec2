# SPDX-License-Identifier: Apache-2.0
"""`vtclip explain`: why a class and not another, by training images; or where a class looks.

A table of what the prompts and the training images add to the log-odds of two classes, and with
--out a page of the image with the training images that weigh most. Of method vtclip, whose logits
are no such sum, the heat map of one class.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

from vtclip.cli.parsing import (
    Parser,
    count,
    emit,
    emit_headline,
    emit_json,
    existing,
    on_terminal,
    open_classifier,
)
from vtclip.files import escape, printable, several, write_atomic
from vtclip.names import index_of

TOP = 5
SIGN = "vtclip explain"  # in pages and heat maps, so that they may be replaced
WORDS = {"prompts": "what the prompts say", "shared": "what the training images give any image"}


def add_arguments(parser: Parser) -> None:
    parser.add_argument("folder", metavar="RUN", help="folder of a run")
    parser.add_argument("image", metavar="IMAGE", help="an image file")
    parser.add_argument(
        "--out",
        metavar="PNG",
        help="draw it: the deciding training images, or the heat map of method vtclip",
    )
    parser.add_argument("--class", dest="class_name", metavar="NAME", help="default: the predicted")
    parser.add_argument(
        "--top", type=count, metavar="N", help=f"rows for and rows against (default: {TOP} each)"
    )
    parser.add_model_of_run()
    parser.add_shared("--device", "--threads", "--json")


def run(args: argparse.Namespace) -> int:
    from vtclip.data.decode import open_image
    from vtclip.machine import doing
    from vtclip.runs.adapter import load_adapter
    from vtclip.runs.training_images import training_images
    from vtclip.runs.why import check_explainable, explain_choice, has_heat_map

    folder, image = existing("RUN", args.folder), existing("IMAGE", args.image)
    out = None if args.out is None else _checked(Path(args.out).expanduser(), image)
    adapter = load_adapter(folder)
    if has_heat_map(adapter):
        return _heat_map(args, folder, image, out)
    check_explainable(adapter)
    if args.class_name is not None:
        index_of(args.class_name, adapter.class_names)
    picture = open_image(image)
    classifier = open_classifier(args, folder)
    with doing("explaining", on_terminal()):
        why, images = explain_choice(
            classifier,
            picture,
            lambda labels: training_images(folder, labels),
            args.class_name,
            args.top or TOP,
        )
    if out is not None:
        from vtclip.runs.why_page import draw_page

        heat = classifier.heat_map(picture, why.label)
        _write(out, draw_page(picture, why, images, heat))
    if args.json:
        place = None if out is None else str(out)
        emit_json("explain", {"image": args.image, **why.to_json(), "picture": place})
        return 0
    first, *rest = _table(args.image, why)
    emit_headline(first)
    for line in rest:
        emit(line)
    if out is not None:
        emit(f"page: {printable(str(out))}")
    return 0


def _checked(out: Path, image: Path) -> Path:
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out must end in .png, got {str(out)!a}")
    if out.exists() and out.samefile(image):
        raise ValueError("--out is the image itself")
    from vtclip.runs.targets import check_target

    if out.exists():
        check_target("out", out, SIGN.encode())
    return out


def _heat_map(args: argparse.Namespace, folder: Path, image: Path, out: Path | None) -> int:
    if args.top:
        raise ValueError("--top: method vtclip is explained by a heat map alone")
    if out is None:
        raise ValueError("method vtclip is explained by a heat map; name its file as --out PNG")
    classifier = open_classifier(args, folder)
    label = classifier.predict(image)[0][0] if args.class_name is None else args.class_name
    picture = classifier.explain(image, label)
    _write(out, picture)
    if args.json:
        size = {"width": picture.width, "height": picture.height}
        emit_json("explain", {"image": args.image, "label": label, "picture": str(out), **size})
        return 0
    emit(f"{out}: {picture.width} x {picture.height}")
    return 0


def _write(out: Path, picture: Any) -> None:
    from PIL.PngImagePlugin import PngInfo

    data, info = io.BytesIO(), PngInfo()
    info.add_text("Software", SIGN)
    picture.save(data, format="PNG", pnginfo=info)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, data.getvalue())


def _table(image: str, why: Any) -> list[str]:
    """The lines of the table; names are written as in predictions.csv."""
    label, other = escape(why.label), escape(why.other)
    shares = f"{100 * why.probability:.1f} %, {other} {100 * why.other_probability:.1f} %"
    lines = [f"{printable(image)}: {label} {shares}"]
    lines += [f"note: {printable(note)}" for note in why.notes]
    lines.append(f"log-odds of {label} over {other}, in nats at T = {why.temperature:.4g}:")
    for name, nats in why.terms.items():
        lines.append(f"{_nats(nats)}  {WORDS.get(name, f'member {name}, as a whole')}")
    width = max((len(escape(row.label)) for row in why.rows), default=0)
    for row in why.rows:
        cosine = f"cosine {row.cosine:+.3f}"
        name = escape(row.name) if row.kind == "image" else "its prompts, as a training row"
        lines.append(f"{_nats(row.nats)}  {escape(row.label):<{width}}  {cosine}  {name}")
    rest = [several(why.rest_images, "other training image")] if why.rest_images else []
    rest += [f"the prompts of {several(why.rest_texts, 'class', 'classes')}"] * bool(why.rest_texts)
    if rest:
        lines.append(f"{_nats(why.rest)}  {' and '.join(rest)}")
    lines.append(f"{_nats(why.log_odds)}  sum")
    return lines


def _nats(value: float) -> str:
    return f"{round(value, 3) + 0.0:+9.3f}"  # 0 and not -0
