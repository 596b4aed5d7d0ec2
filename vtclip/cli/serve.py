# SPDX-License-Identifier: Apache-2.0
"""`vtclip serve`: its arguments, and what it prints: the address, then a line per request."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from typing import Any

from vtclip.cli.parsing import (
    Parser,
    count,
    emit,
    emit_json,
    existing,
    note,
    number,
    open_classifier,
)

NEEDED = ("fastapi", "uvicorn", "python_multipart")
INSTALL = "pip install 'vtclip[serve]'"
MEGABYTE = 2**20


def add_arguments(parser: Parser) -> None:
    parser.add_argument("folder", metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="default: 127.0.0.1, this machine"
    )
    parser.add_argument(
        "--port", type=number(int, 0, 65535), default=8000, help="default: 8000; 0: a free one"
    )
    parser.add_argument(
        "--allow-host",
        metavar="NAME,...",
        help="further names by which the service is called, e.g. by a reverse proxy",
    )
    parser.add_argument(
        "--max-upload", type=number(float, 0, 1024, above=True), default=32.0, metavar="MB",
        help="of one request (default: 32)",
    )  # fmt: skip
    parser.add_argument(
        "--max-images", type=count, default=100, metavar="N", help="of one request (default: 100)"
    )
    parser.add_argument(
        "--max-pixels", type=number(float, 0, 89, above=True), default=50.0, metavar="MILLIONS",
        help="of one image (default: 50)",
    )  # fmt: skip
    parser.add_argument(
        "--timeout", type=number(float, 0, 3600, above=True), default=30.0, metavar="S",
        help="seconds from a request to its answer (default: 30)",
    )  # fmt: skip
    parser.add_argument(
        "--unknown",
        type=number(float, 0, 1),
        metavar="RATE",
        help='say "unknown" of images of no class; of the others at most this share is lost; '
        "0: never (default: 0.05, or the least that the run allows)",
    )
    parser.add_model_of_run()
    parser.add_shared("--device", "--threads", "--json")


def run(args: argparse.Namespace) -> int:
    """Until a signal ends it."""
    folder = existing("RUN", args.folder)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{', '.join(missing)} not found; {INSTALL} brings what is needed")
    from vtclip.runs.adapter import load_adapter
    from vtclip.serve.limits import Limits
    from vtclip.serve.server import address_of, bind, is_local, serve

    _check_unknown(load_adapter(folder), args.unknown)
    limits = Limits(
        max_upload=round(args.max_upload * MEGABYTE),
        max_images=args.max_images,
        max_pixels=round(args.max_pixels * 1_000_000),
        timeout=args.timeout,
    )
    with bind(args.host, args.port) as bound:
        if not is_local(bound):
            note(
                f"note: {args.host} is reached by other machines, and there is neither a password "
                "nor TLS; put a reverse proxy with both before it"
            )
        predictor = _predictor(args, folder, limits)
        names = None if args.allow_host is None else _names(args.allow_host)

        def ready() -> None:
            if args.json:
                emit_json("serve", {"address": address_of(bound), **predictor.health()})
            else:
                emit(f"{address_of(bound)}  {_in_words(predictor.health())}")
            if sys.stdout is not None:
                sys.stdout.flush()

        serve(predictor, bound, names=names, ready=ready, log=note)
    return 0


def _check_unknown(adapter: Any, unknown: float | None) -> None:
    """Refuse a rate that the run does not allow before its model is loaded."""
    from vtclip.runs.answers import Rule

    if unknown:
        Rule(adapter, unknown, None)


def _predictor(args: argparse.Namespace, folder: Any, limits: Any) -> Any:
    from vtclip.serve.predictor import Predictor

    return Predictor(folder, open_classifier(args, folder), limits, args.unknown)


def _names(text: str) -> frozenset[str]:
    names = frozenset(part.strip().lower() for part in text.split(","))
    if "" in names:
        raise ValueError(f"--allow-host must be names with commas between, got {text!a}")
    return names


def _in_words(health: dict[str, Any]) -> str:
    of = f"{health['method']} of {health['classes']} classes"
    return f"run {health['run']}, {of}, model {health['model']}, {health['device']}"
