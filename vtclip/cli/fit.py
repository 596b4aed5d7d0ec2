# SPDX-License-Identifier: Apache-2.0
"""`vtclip fit`: its arguments, its call of `vtclip.fit` and what it prints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vtclip.cli.parsing import (
    FEATURES,
    Parser,
    count,
    emit,
    emit_json,
    first_process,
    note_demo_model,
    number,
    on_terminal,
    one_of,
    options_of,
    seed,
    several,
    source_path,
)
from vtclip.names import (
    LIST_SUFFIXES,
    LOSSES,
    METHODS,
    OPTIMIZERS,
    PENALTIES,
    POSITIONS,
    PRECISIONS,
    QUERIES,
)

TRAINING = ("epochs", "lr", "optimizer", "weight_decay", "batch_size")
OVERRIDES = (*TRAINING, "penalty_weight", "label_smoothing", "loss", "gce_q")
COOP_OPTIONS = {  # argument: option of the head
    "context_length": "num_context",
    "class_specific": "class_specific",
    "class_position": "class_position",
    "context_init": "init",
}
PASSED_ON = (  # to vtclip.fit as they are
    *("data", "method", "shots", "seed", "model", "spatial", "prompt", "test_fraction"),
    *(
        "augment_passes",
        "class_names",
        "encoder_batch_size",
        "follow_links",
        "train_encoders",
        "base_to_new",
        "pseudo_labels",
        "out",
        "overwrite",
    ),
    *("resume", "device", "threads", "cache_dir"),
)
HEAD_OPTIONS = ("temperature", "penalty", "queries", "adapters")


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="class_name/*.jpg folder, list of files (.csv, .tsv, .jsonl, .json, .parquet), saved "
        "dataset, features folder, .npz, or NAME of a data set",
    )
    parser.add_argument("--data", metavar="ROOT", help="data sets: SOURCE is the name of one")
    parser.add_argument(
        "--method", type=one_of(*METHODS), help="default auto: " + " | ".join(METHODS)
    )
    parser.add_argument(
        "--shots",
        type=number(int, 0, 1_000_000),
        help="images per class (default: 16, or fewer where a class has fewer)",
    )
    parser.add_argument("--seed", type=seed, default=1, help="draws the shots")
    parser.add_shared(*FEATURES, "--class-names", "--follow-links", "--encoder-batch-size")
    _add_training(parser)
    _add_methods(parser)
    parser.add_argument(
        "--out", metavar="RUN", help="default runs/SOURCE-METHOD-SHOTSshot-seedSEED"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --out")
    parser.add_shared("--model", "--cache-dir", "--device", "--threads", "--json")


def _add_training(parser: Parser) -> None:
    """How the head and the encoders are trained, and on which classes."""
    add = parser.add_argument
    add("--epochs", type=count, metavar="N")
    add("--lr", type=number(float, 0, 1000, above=True))
    add("--optimizer", type=one_of(*OPTIMIZERS), help=" | ".join(OPTIMIZERS))
    add("--weight-decay", type=number(float, 0, 1000), metavar="W")
    add("--batch-size", type=count, metavar="N")
    add("--train-encoders", action="store_true", help="train both CLIP towers too (method rada)")
    add(
        "--precision",
        type=one_of(*PRECISIONS),
        help="of the trained towers: " + " | ".join(PRECISIONS),
    )
    add("--grad-checkpointing", action="store_true", help="trained towers in less memory, slower")
    add("--base-to-new", action="store_true", help="train on half of the classes, test on both")
    add("--label-smoothing", type=number(float, 0, 0.99), metavar="E")


def _add_methods(parser: Parser) -> None:
    """Options of single methods, of the loss, and of the labels."""
    add = parser.add_argument
    add("--adapters", action="store_true", help="rada: bottleneck adapters before it")
    add("--penalty", type=one_of(*PENALTIES), help="rada: " + " | ".join(PENALTIES))
    add("--penalty-weight", type=number(float, 0, 1e6), metavar="W", help="rada")
    add(
        "--queries",
        type=several(one_of(*QUERIES)),
        metavar="LIST",
        help="rada: of " + ",".join(QUERIES),
    )
    add("--temperature", type=number(float, 0, 1e6, above=True), help="rada: of its attention")
    add("--loss", type=one_of(*LOSSES), help="ce | gce, which wrong labels pull less")
    add("--gce-q", type=number(float, 0, 1, above=True), metavar="Q", help="of gce")
    add(
        "--pseudo-labels",
        action="store_true",
        help="no labels: --shots of the images surest zero-shot, per class it names",
    )
    add(
        "--context-length",
        type=number(int, 1, 10_000),
        metavar="N",
        help="coop: learned vectors (16)",
    )
    add("--class-specific", action="store_true", help="coop: vectors for each class")
    add("--class-position", type=one_of(*POSITIONS), help="coop: " + " | ".join(POSITIONS))
    add("--context-init", metavar="WORDS", help='coop: start at these, e.g. "a photo of a"')


def run(args: argparse.Namespace) -> int:
    source = source_path(args.source, args.data)
    if args.model == "demo" and needs_model(source):
        note_demo_model()
    overrides = overrides_of(args)
    import vtclip

    fitted = vtclip.fit(
        source,
        templates=None if args.templates is None else [args.templates],
        overrides=overrides,
        progress=on_terminal(),
        **options_of(args, *PASSED_ON),
    )
    if not first_process():
        return 0
    if args.json:
        emit_json(fitted.result)
    else:
        print_fit(fitted)
    return 0


def needs_model(source: str | Path) -> bool:
    """Whether images are encoded: of any source but a table of features or their folder."""
    if isinstance(source, str):
        return True
    if source.is_dir():
        return not (source / "manifest.json").exists()
    return source.suffix.lower() in LIST_SUFFIXES


def overrides_of(args: argparse.Namespace) -> dict[str, Any]:
    """What replaces the recipe's settings; None where an option is not given."""
    overrides = options_of(args, *OVERRIDES)
    head = options_of(args, *HEAD_OPTIONS)
    head |= {option: getattr(args, name) for name, option in COOP_OPTIONS.items()}
    head = {name: value for name, value in head.items() if value not in (None, False)}
    overrides["head"] = head or None
    if args.gce_q is not None and args.loss != "gce":
        raise ValueError("--gce-q is for --loss gce, which is not given")
    if args.train_encoders:
        overrides["precision"] = args.precision
        overrides["grad_checkpointing"] = args.grad_checkpointing or None
    elif args.precision is not None or args.grad_checkpointing:
        option = "--grad-checkpointing" if args.precision is None else "--precision"
        raise ValueError(f"{option} is for --train-encoders, which is not given")
    return overrides


def print_fit(fitted: Any) -> None:
    """The table of a run, with what was fitted to what above it and the cost below."""
    from vtclip.runs.predictions import confused_line

    result = fitted.result
    counts = result["images"]
    emit(
        f"{result['method']} on {result['source']}: {len(result['classes'])} classes, "
        f"{counts['train']} training, {counts['val']} validation and {counts['test']} test images, "
        f"seed {result['seed']}"
    )
    if "new" in result:
        new = result["new"]
        emit(f"new: {len(new['classes'])} classes, {new['adapted']['count']} test images")
    emit(fitted.table())
    confused = confused_line(result["confusion"]) if "confusion" in result else ""
    if confused:
        emit(confused)
    unreadable = result["test"]["unreadable"]
    if unreadable:
        emit(f"unreadable, not counted: {len(unreadable)} ({', '.join(unreadable[:3])}, ...)")
    memory = {name: f" in {peak:.0f} MB" for name, peak in result.get("memory_mb", {}).items()}
    memory["total"] = f" in {result['peak_memory_mb'] or 0:.0f} MB"
    stages = ", ".join(
        f"{name} {value:.1f} s{memory.get(name, '')}" for name, value in result["seconds"].items()
    )
    emit(f"{stages}; {result['device']}")
    files = ", ".join(sorted(path.name for path in fitted.folder.iterdir()))
    emit(f"run in {fitted.folder}: {files}")
