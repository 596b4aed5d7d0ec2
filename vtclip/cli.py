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

from . import __version__
from .choices import nearest

METHODS = ("vtclip", "zeroshot")
OPTIMIZERS = ("sgd", "adamw")
OVERRIDES = ("epochs", "lr", "optimizer", "weight_decay", "batch_size")
DEMO_NOTE = (
    "note: --model demo is a small model for 64-pixel synthetic pictures; for photos pass "
    "--model ViT-B-32:openai, or a local file as --model ViT-B-32:/path/to/weights.safetensors"
)


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, no abbreviations, and the nearest choice for a wrong name."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        fail(f"{self.prog}: {message}")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        args, extra = self.parse_known_args(argv)
        if extra:
            known: list[str] = getattr(args, "options", [])
            hint = nearest(extra[0], known) if extra[0].startswith("-") else ""
            self.error(f"unknown argument {extra[0]!r}{hint}")
        return args


class Once(argparse.Action):
    """Stores a value, and refuses to be given twice."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option: Any = None,
    ) -> None:
        seen = vars(namespace).setdefault("seen", set())
        if self.dest in seen:
            parser.error(f"{option} is given twice")
        seen.add(self.dest)
        setattr(namespace, self.dest, values)


def fail(message: str, status: int = 2) -> NoReturn:
    line = " ".join(message.replace("\n", "\\n").split(" "))
    sys.stderr.write(f"{line}\n")
    raise SystemExit(status)


def one_of(*choices: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        if value not in choices:
            raise argparse.ArgumentTypeError(f"unknown name {value!r}{nearest(value, choices)}")
        return value

    return check


def number(kind: type, low: float, high: float, above: bool = False) -> Callable[[str], Any]:
    """A number in low..high; `above`: strictly above low."""

    def check(value: str) -> Any:
        try:
            parsed = kind(value)
        except ValueError:
            word = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{value!r} is not {word}") from None
        if not low <= parsed <= high or (above and parsed == low):
            bounds = f"above {low:g} and at most {high:g}" if above else f"in {low:g}..{high:g}"
            raise argparse.ArgumentTypeError(f"must be {bounds}, got {value}")
        return parsed

    return check


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
    fit.add_argument(
        "source", metavar="SOURCE", help="class_name/*.jpg folder, features folder, .npz"
    )
    fit.add_argument("--method", type=one_of(*METHODS), default="vtclip", help=" | ".join(METHODS))
    fit.add_argument(
        "--shots",
        type=number(int, 0, 1_000_000),
        help="images per class (default: 16, or fewer where a class has fewer)",
    )
    fit.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=1, help="draws the shots")
    fit.add_argument("--spatial", metavar="OPT", help="kind of spatial features (vtclip.clip)")
    fit.add_argument("--prompt", metavar="NAME", help="one prompt of an .npz with several")
    fit.add_argument(
        "--templates", metavar="NAME|FILE", help="imagenet7, imagenet80, a .txt, or text with {}"
    )
    fit.add_argument("--test-fraction", type=number(float, 0, 1), default=0.5, metavar="F")
    fit.add_argument("--augment-passes", type=number(int, 0, 1000), default=0, metavar="N")
    fit.add_argument("--epochs", type=number(int, 1, 1_000_000), metavar="N")
    fit.add_argument("--lr", type=number(float, 0, 1000, above=True))
    fit.add_argument("--optimizer", type=one_of(*OPTIMIZERS), help=" | ".join(OPTIMIZERS))
    fit.add_argument("--weight-decay", type=number(float, 0, 1000), metavar="W")
    fit.add_argument("--batch-size", type=number(int, 1, 1_000_000), metavar="N")
    fit.add_argument("--out", metavar="RUN", help="default runs/SOURCE-METHOD-SHOTSshot-seedSEED")
    fit.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    fit.add_argument("--resume", action="store_true", help="go on with the run in --out")

    evaluate = command(
        "evaluate", run_evaluate, "metrics of a run, on its test images or on SOURCE"
    )
    evaluate.add_argument("folder", metavar="RUN")
    evaluate.add_argument("source", metavar="SOURCE", nargs="?")

    predict = command("predict", run_predict, "the most probable classes of images")
    predict.add_argument("folder", metavar="RUN")
    predict.add_argument("images", metavar="IMAGE", nargs="+", action="extend")
    predict.add_argument("--topk", type=number(int, 1, 1_000_000), default=5)

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

    demo = command("demo", run_demo_command, "the whole way on bundled data, without network")
    demo.add_argument("--out", metavar="DIR", default="vtclip-demo")

    command("info", run_info, "what is installed, which kernels run, and why others do not")

    for sub in (fit, features):
        sub.add_argument(
            "--model", default="demo", help="demo, ViT-B-32:openai, ViT-B-32:/file, local-dir:/dir"
        )
    for sub in (predict, explain):
        sub.add_argument("--model", help="another place of the weights the run was fitted on")
    for sub in (fit, evaluate, features):
        sub.add_argument(
            "--cache-dir", metavar="DIR", help="where features of image folders are kept"
        )
    for sub in (fit, evaluate, predict, explain, features, demo):
        sub.add_argument("--device", help="cpu, cuda, cuda:N; default: a GPU where there is one")
        sub.add_argument("--threads", type=number(int, 1, 4096), metavar="N", help="CPU threads")
    for sub in (fit, evaluate, predict):
        sub.add_argument("--json", action="store_true", help="print JSON")
    for name, sub in commands.choices.items():
        known = [option for action in sub._actions for option in action.option_strings]
        sub.set_defaults(options=known, command=name)
    return parser


def emit(text: str) -> None:
    print(text)


def emit_json(value: Any) -> None:
    from .files import to_json

    emit(to_json(value).decode("ascii").rstrip())


def existing(name: str, path: str) -> Path:
    """A path that is there, or exit 2 naming the argument."""
    found = Path(path).expanduser()
    if not found.exists():
        fail(f"vtclip: {name} {path!a} does not exist")
    return found


def run_fit(args: argparse.Namespace) -> int:
    source = existing("SOURCE", args.source)
    if source.is_dir() and args.model == "demo" and not (source / "manifest.json").exists():
        sys.stderr.write(DEMO_NOTE + "\n")
    from . import api

    run = api.fit(
        source,
        method=args.method,
        shots=args.shots,
        seed=args.seed,
        model=args.model,
        spatial=args.spatial,
        prompt=args.prompt,
        templates=None if args.templates is None else [args.templates],
        test_fraction=args.test_fraction,
        augment_passes=args.augment_passes,
        overrides={name: getattr(args, name) for name in OVERRIDES},
        out=args.out,
        overwrite=args.overwrite,
        resume=args.resume,
        device=args.device,
        threads=args.threads,
        cache_dir=args.cache_dir,
        progress=sys.stderr is not None and sys.stderr.isatty(),
    )
    if args.json:
        emit_json(run.result)
        return 0
    result = run.result
    counts = result["images"]
    emit(
        f"{result['method']} on {result['source']}: {len(result['classes'])} classes, "
        f"{counts['train']} training, {counts['val']} validation and {counts['test']} test images, "
        f"seed {result['seed']}"
    )
    emit(run.table())
    broken = result["test"]["unreadable"]
    if broken:
        emit(f"unreadable, not counted: {len(broken)} ({', '.join(broken[:3])}, ...)")
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in result["seconds"].items())
    emit(f"{seconds}; peak memory {result['peak_memory_mb'] or 0:.0f} MB; {result['device']}")
    files = ", ".join(sorted(path.name for path in run.folder.iterdir()))
    emit(f"run in {run.folder}: {files}")
    return 0


def run_evaluate(args: argparse.Namespace) -> int:
    folder = existing("RUN", args.folder)
    source = None if args.source is None else existing("SOURCE", args.source)
    from . import api
    from .result import rows_table

    values = api.evaluate(
        folder, source, device=args.device, threads=args.threads, cache_dir=args.cache_dir
    )
    if args.json:
        emit_json(values)
    else:
        emit(f"{values['method']} on {values['source']}: {values['test']['images']} images")
        emit(rows_table({values["method"]: values}))
    return 0


def run_predict(args: argparse.Namespace) -> int:
    folder = existing("RUN", args.folder)
    for path in args.images:
        existing("IMAGE", path)
    classifier = load_classifier(args, folder)
    found = classifier.predict(args.images, topk=args.topk)
    if args.json:
        rows = [
            {"image": path, "predictions": [one._asdict() for one in best]}
            for path, best in zip(args.images, found, strict=True)
        ]
        emit_json(rows)
        return 0
    for path, best in zip(args.images, found, strict=True):
        emit(
            f"{path!s}: " + ", ".join(f"{one.label} {100 * one.probability:.1f} %" for one in best)
        )
    return 0


def run_explain(args: argparse.Namespace) -> int:
    folder, image = existing("RUN", args.folder), existing("IMAGE", args.image)
    out = Path(args.out).expanduser()
    if out.suffix.lower() != ".png":
        fail(f"vtclip explain: --out must end in .png, got {args.out!a}")
    if out.exists() and out.samefile(image):
        fail("vtclip explain: --out is the image itself")
    picture = load_classifier(args, folder).explain(image, args.class_name)
    import io

    from .files import write_atomic

    data = io.BytesIO()
    picture.save(data, format="PNG")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(out, data.getvalue())
    emit(f"{out}: {picture.width} x {picture.height}")
    return 0


def load_classifier(args: argparse.Namespace, folder: Path) -> Any:
    from . import api
    from .classifier import Classifier

    api.set_threads(args.threads)
    return Classifier.load(folder, model=args.model, device=args.device)


def run_features(args: argparse.Namespace) -> int:
    source = existing("SOURCE", args.source)
    if args.model == "demo":
        sys.stderr.write(DEMO_NOTE + "\n")
    from . import api

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
    emit(f"{args.out}: {records!r}")
    return 0


def run_demo_command(args: argparse.Namespace) -> int:
    from .demo.run import run_demo

    summary = run_demo(args.out, threads=args.threads, device=args.device)
    emit(summary["table"])
    emit(f"{args.out}: table.txt, result.json, heat_maps.png, shots.png, images and runs")
    return 0


def run_info(args: argparse.Namespace) -> int:
    from . import info

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
