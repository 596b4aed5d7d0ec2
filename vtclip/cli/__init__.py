# SPDX-License-Identifier: Apache-2.0
"""The `vtclip` command: parsing here, the work in `vtclip.api` and `vtclip.classifier`.

Exit status: 0 done, 1 the work failed, 2 bad input, 128 + n stopped by signal n. An error of the
user's is one line on stderr. Torch is imported only by the commands that compute.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from vtclip import __version__
from vtclip.cli import bench as bench_command
from vtclip.cli import data as data_command
from vtclip.cli import evaluate as evaluate_command
from vtclip.cli import export as export_command
from vtclip.cli import extend as extend_command
from vtclip.cli import predict as predict_command
from vtclip.cli import repeat as repeat_command
from vtclip.cli import report as report_command
from vtclip.cli import tune as tune_command
from vtclip.cli.fit import DEMO_NOTE, add_arguments, first_process, run_fit
from vtclip.cli.parsing import Once, Parser, emit, existing, fail, number
from vtclip.names import nearest


def build_parser() -> Parser:
    parser = Parser(
        prog="vtclip", description="Adapt a frozen CLIP to your images with a few shots."
    )
    parser.add_argument("--version", action="version", version=f"vtclip {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)

    def command(name: str, run: Callable[[argparse.Namespace], int], summary: str) -> Any:
        sub = commands.add_parser(name, help=summary, description=summary)
        sub.register("action", None, Once)
        sub.set_defaults(run=run, parser=sub)
        return sub

    fit = command("fit", run_fit, "adapt to SOURCE, and compare with zero-shot on held-out images")
    add_arguments(fit)

    evaluate = command(
        "evaluate",
        evaluate_command.run_evaluate,
        "metrics of a run, on its test images or on SOURCE",
    )
    evaluate_command.add_arguments(evaluate)

    predict = command("predict", predict_command.run_predict, "the most probable classes of images")
    predict_command.add_arguments(predict)

    explain = command("explain", run_explain, "heat map of where a class looks in an image")
    explain.add_argument("folder", metavar="RUN")
    explain.add_argument("image", metavar="IMAGE")
    explain.add_argument("--out", metavar="PNG", required=True)
    explain.add_argument(
        "--class", dest="class_name", metavar="NAME", help="default: the predicted"
    )

    features = command("features", run_features, "write the features of SOURCE to a folder")
    features.add_argument("source", metavar="SOURCE")
    features.add_argument("--out", metavar="DIR", required=True)
    features.add_argument(
        "--spatial", metavar="OPT", default="default", help="or none: global only"
    )
    features.add_argument("--templates", metavar="NAME|FILE")
    features.add_argument("--augment-passes", type=number(int, 0, 1000), default=0, metavar="N")

    extend = command("extend", extend_command.run_extend, "a run with new classes added to it")
    extend_command.add_arguments(extend)

    repeat = command("repeat", repeat_command.run_repeat, "run RUN again, and compare")
    repeat_command.add_arguments(repeat)

    report = command("report", report_command.run_report, "tables and a page of a benchmark's rows")
    report_command.add_arguments(report)

    export = command("export", export_command.run_export, "a run as a .pt2 or an .onnx file")
    export_command.add_arguments(export)

    data = command("data", data_command.run_data, "which of the field's data sets lie in ROOT")
    data_command.add_arguments(data)

    bench = command("bench", bench_command.run_bench_command, "sources x methods x shots x seeds")
    bench_command.add_arguments(bench)

    tune = command("tune", tune_command.run_tune, "time the GPU kernels' tiles, and keep a table")
    tune_command.add_arguments(tune)

    demo = command("demo", run_demo_command, "the whole way on bundled data, without network")
    demo.add_argument("--out", metavar="DIR", default="vtclip-demo")

    command("info", run_info, "what is installed, which kernels run, and why others do not")

    for sub in (fit, features, bench):
        sub.add_argument(
            "--model", default="demo", help="demo, ViT-B-32:openai, ViT-B-32:/file, local-dir:/dir"
        )
    for sub in (predict, explain, extend, export):
        sub.add_argument("--model", help="another place of the weights the run was fitted on")
    for sub in (fit, evaluate, extend, features, bench, export):
        sub.add_argument(
            "--cache-dir", metavar="DIR", help="where features of image folders are kept"
        )
    for sub in (fit, evaluate, predict, explain, extend, features, bench, demo):
        sub.add_argument("--device", help="cpu, cuda, cuda:N; default: a GPU where there is one")
        sub.add_argument("--threads", type=number(int, 1, 4096), metavar="N", help="CPU threads")
    export.add_argument("--threads", type=number(int, 1, 4096), metavar="N", help="CPU threads")
    for sub in (fit, evaluate, predict, extend, data, bench, export):
        sub.add_argument("--json", action="store_true", help="print JSON")
    for name, sub in commands.choices.items():
        known = [option for action in sub._actions for option in action.option_strings]
        sub.set_defaults(options=known, command=name)
    return parser


def run_explain(args: argparse.Namespace) -> int:
    folder, image = existing("RUN", args.folder), existing("IMAGE", args.image)
    out = Path(args.out).expanduser()
    if out.suffix.lower() != ".png":
        fail(f"vtclip explain: --out must end in .png, got {args.out!a}")
    if out.exists() and out.samefile(image):
        fail("vtclip explain: --out is the image itself")
    picture = load_classifier(args, folder).explain(image, args.class_name)
    import io

    from vtclip.files import write_atomic

    data = io.BytesIO()
    picture.save(data, format="PNG")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, data.getvalue())
    emit(f"{out}: {picture.width} x {picture.height}")
    return 0


def load_classifier(args: argparse.Namespace, folder: Path) -> Any:
    from vtclip.classifier import Classifier
    from vtclip.settings import set_threads

    set_threads(args.threads)
    return Classifier.load(folder, model=args.model, device=args.device)


def run_features(args: argparse.Namespace) -> int:
    source = existing("SOURCE", args.source)
    if args.model == "demo" and first_process():
        sys.stderr.write(DEMO_NOTE + "\n")
    from vtclip import api

    records = api.write_features(
        source,
        args.out,
        model=args.model,
        spatial=None if args.spatial == "none" else args.spatial,
        templates=None if args.templates is None else [args.templates],
        augment_passes=args.augment_passes,
        device=args.device,
        threads=args.threads,
        progress=sys.stderr is not None and sys.stderr.isatty(),
    )
    if first_process():
        emit(f"{args.out}: {records!r}")
    return 0


def run_demo_command(args: argparse.Namespace) -> int:
    from vtclip.demo.run import run_demo

    summary = run_demo(args.out, threads=args.threads, device=args.device)
    emit(summary["table"])
    emit(f"{args.out}: table.txt, result.json, heat_maps.png, shots.png, images and runs")
    return 0


def run_info(args: argparse.Namespace) -> int:
    from vtclip import info

    return info.main() or 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; answers the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    parser = build_parser()
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(parser, words)
    except BrokenPipeError:
        # the reader has gone: keep the interpreter from flushing into the closed pipe at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 128 + signal.SIGINT


def _run(parser: Parser, words: list[str]) -> int:
    known = list(parser._subparsers._group_actions[0].choices)  # type: ignore[union-attr, arg-type]
    if words and not words[0].startswith("-") and words[0] not in known:
        fail(f"vtclip: unknown command {words[0]!r}{nearest(words[0], known)}")
    args = parser.parse(words)
    if args.command is None:
        parser.print_help()
        return 2
    name = f"vtclip {args.command}"
    stop = signal.signal(signal.SIGTERM, _terminated)
    try:
        status: int = args.run(args)
        if sys.stdout is not None:
            sys.stdout.flush()
        return status
    except BrokenPipeError:
        raise
    except (ValueError, TypeError, NotImplementedError, IndexError) as error:
        fail(f"{name}: {error}")
    except (
        FileNotFoundError,
        FileExistsError,
        NotADirectoryError,
        IsADirectoryError,
        PermissionError,
    ) as error:
        fail(f"{name}: {error}")
    except OSError as error:
        fail(f"{name}: {error}", status=1)
    except FloatingPointError as error:
        fail(f"{name}: {error}", status=1)
    except Exception as error:
        signum = getattr(error, "signum", None)  # checkpoint.Interrupted, without importing torch
        if signum is None:
            raise
        fail(f"{name}: {error}; go on with --resume", status=128 + signum)
    finally:
        signal.signal(signal.SIGTERM, stop)


def _terminated(_signum: int, _frame: Any) -> NoReturn:
    raise SystemExit(128 + signal.SIGTERM)
