# SPDX-License-Identifier: Apache-2.0
"""`vtclip explain`: a picture of where a class looks in an image."""

from __future__ import annotations

import argparse
import io
from pathlib import Path

from vtclip.cli.parsing import Parser, emit, existing, open_classifier
from vtclip.files import write_atomic


def add_arguments(parser: Parser) -> None:
    parser.add_argument("folder", metavar="RUN")
    parser.add_argument("image", metavar="IMAGE")
    parser.add_argument("--out", metavar="PNG", required=True)
    parser.add_argument("--class", dest="class_name", metavar="NAME", help="default: the predicted")
    parser.add_model_of_run()
    parser.add_shared("--device", "--threads")


def run(args: argparse.Namespace) -> int:
    folder, image = existing("RUN", args.folder), existing("IMAGE", args.image)
    out = Path(args.out).expanduser()
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out must end in .png, got {args.out!a}")
    if out.exists() and out.samefile(image):
        raise ValueError("--out is the image itself")
    picture = open_classifier(args, folder).explain(image, args.class_name)
    data = io.BytesIO()
    picture.save(data, format="PNG")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, data.getvalue())
    emit(f"{out}: {picture.width} x {picture.height}")
    return 0
