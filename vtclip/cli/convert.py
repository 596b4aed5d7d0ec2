# SPDX-License-Identifier: Apache-2.0
"""`vtclip convert`: a file of weights as safetensors that says what it is."""

from __future__ import annotations

import argparse

from vtclip.cli.parsing import Parser, emit, emit_json, existing, on_terminal


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "source",
        metavar="FILE",
        help="OpenAI's .pt archive, .pt, .pth, .bin, or a folder of transformers",
    )
    parser.add_argument("--out", metavar="OUT.safetensors", help="default: FILE with that suffix")
    parser.add_argument(
        "--model",
        metavar="ARCH[:TAG]",
        help="what the weights are, e.g. ViT-B-32:openai, where FILE does not tell",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT")
    parser.add_shared("--json")


def run(args: argparse.Namespace) -> int:
    source = existing("FILE", args.source)
    from vtclip.clip import convert_file
    from vtclip.machine import doing

    with doing("converting", on_terminal()):
        out, facts = convert_file(source, args.out, model=args.model, overwrite=args.overwrite)
    if args.json:
        emit_json("convert", {"out": str(out), **facts})
        return 0
    activation = "QuickGELU" if facts["model_cfg"].get("quick_gelu") else "GELU"
    emit(
        f"{out}: {facts['architecture'] or 'a model of no known architecture'}, {activation}; "
        f"use it as --model {out}"
    )
    return 0
