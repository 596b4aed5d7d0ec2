# SPDX-License-Identifier: Apache-2.0
"""`vtclip export`: its arguments, its call of `vtclip.export` and what it prints."""

from __future__ import annotations

import argparse
from typing import Any

from vtclip.cli.parsing import emit, emit_json, existing, fail, number


def add_arguments(export: Any) -> None:
    export.add_argument("folder", metavar="RUN")
    export.add_argument("--out", metavar="FILE.pt2", help="a program of torch.export")
    export.add_argument("--onnx", metavar="FILE.onnx", help="an ONNX model, instead or as well")
    export.add_argument(
        "--features", action="store_true", help="from features to logits, without the encoder"
    )
    batch = export.add_mutually_exclusive_group()
    batch.add_argument("--dynamic-batch", action="store_true", help="any batch size (default)")
    batch.add_argument(
        "--fixed-batch", type=number(int, 1, 1_000_000), metavar="N", help="this batch size only"
    )
    export.add_argument(
        "--portable",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="plain torch operators, which need no vtclip (default), or vtclip's own",
    )
    export.add_argument("--overwrite", action="store_true", help="replace the files")


def run_export(args: argparse.Namespace) -> int:
    folder = existing("RUN", args.folder)
    if args.out is None and args.onnx is None:
        fail("vtclip export: --out FILE.pt2 or --onnx FILE.onnx must be given")
    from vtclip.export_run import export

    about = export(
        folder,
        args.out,
        kind="features" if args.features else "image",
        onnx=args.onnx,
        portable=args.portable,
        fixed_batch=args.fixed_batch,
        overwrite=args.overwrite,
        model=args.model,
        threads=args.threads,
        cache_dir=args.cache_dir,
    )
    if args.json:
        emit_json(about)
        return 0
    shapes = ", ".join(f"{name} {given['shape']}" for name, given in about["inputs"].items())
    output = about["output"]
    emit(f"{about['method']}: {shapes} -> {output['name']} {output['shape']}")
    for kind, seen in about["parity"].items():
        cases = ", ".join(f"{name} {error:.1e}" for name, error in seen["cases"].items())
        emit(f"{kind}: largest error {seen['max_error']:.1e} of {seen['tolerance']:g} ({cases})")
    emit(f"written: {', '.join(about['files'])}, with .json beside")
    return 0
