# SPDX-License-Identifier: Apache-2.0
"""`vtclip fit`: its arguments, its call of `vtclip.fit` and what it prints."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from vtclip.cli.method_help import check_settings, method_in, more_help, of_another_method, setting
from vtclip.cli.parsing import (
    Parser,
    a_method,
    count,
    demo_model_noted,
    emit,
    emit_headline,
    emit_json,
    emit_table,
    existing,
    number,
    number_or_all,
    on_terminal,
    one_of,
    options_of,
    seed,
    several,
    source_path,
)
from vtclip.environment import is_first
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
        "val",
        "test",
        "refit",
        "final",
        "unlabelled",
        "budget",
        "strict",
        "class_names",
        "follow_links",
        "base_to_new",
        "pseudo_labels",
    ),
    *("augment_passes", "encoder_batch_size", "train_encoders", "lora", "out", "overwrite"),
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
    _add_images(parser)
    _add_model(parser)
    _add_training(parser)
    _add_methods(parser)
    _add_run(parser)
    parser.hidden = lambda action: of_another_method(action, method_in(parser.words))
    parser.more_help = lambda: more_help(method_in(parser.words))


def _add_images(parser: Parser) -> None:
    """Which images train, validate and test."""
    group = parser.add_argument_group("images")
    add = group.add_argument
    add("--data", metavar="ROOT", help="folder of data sets; SOURCE is the name of one")
    add(
        "--shots",
        type=number_or_all(0),
        metavar="N|all",
        help="training images per class at most, or all; a class with fewer trains on those it "
        "has (default: 16)",
    )
    add("--seed", type=seed, default=1, help="seed that draws the training images (default: 1)")
    add(
        "--test",
        metavar="SOURCE",
        help="folder or list of test images (default: --test-fraction of each class)",
    )
    add(
        "--val",
        metavar="SOURCE",
        help="folder or list of validation images (default: up to 4 of each class)",
    )
    parser.add_shared("--test-fraction", group=group)
    add(
        "--refit",
        action=argparse.BooleanOptionalAction,
        help="train on the validation images too, once they have chosen the settings (default: on "
        "images of your own)",
    )
    add(
        "--final",
        action="store_true",
        help="after the evaluation, fit once more on all images, the test's too, and save that",
    )
    add(
        "--unlabelled",
        metavar="FOLDER|test",
        help="also decide the test images as one batch, alone (test) or with the images of FOLDER, "
        "whose labels are not read; reported apart",
    )
    add(
        "--strict",
        action="store_true",
        help="refuse images that are in training and test at once (default: count them)",
    )
    parser.add_shared("--class-names", "--follow-links", group=group)
    add("--base-to-new", action="store_true", help="train on half of the classes, test on both")
    add(
        "--pseudo-labels",
        action="store_true",
        help="ignore labels; train on the most confident zero-shot predictions (--shots "
        "per predicted class)",
    )


def _add_model(parser: Parser) -> None:
    """The model, and the features that it makes."""
    group = parser.add_argument_group("model and features")
    parser.add_shared(
        *("--model", "--spatial", "--prompt", "--templates", "--augment-passes"),
        *("--encoder-batch-size", "--cache-dir", "--device", "--threads"),
        group=group,
    )


def _add_training(parser: Parser) -> None:
    """How the head and the encoders are trained."""
    group = parser.add_argument_group("training (defaults: the method's recipe)")
    add = group.add_argument
    add(
        "--method",
        type=a_method(),
        metavar="NAME",
        help="default auto, which fits several methods and pools their probabilities; "
        + " | ".join(METHODS),
    )
    add(
        "--budget",
        type=number(float, 0, 1e9, above=True),
        metavar="SECONDS",
        help="auto: also try slower candidates that are expected to fit into this time of one "
        "processor, and leave out what does not",
    )
    add("--epochs", type=count, metavar="N", help="passes over the training images")
    add("--lr", type=number(float, 0, 1000, above=True), help="largest learning rate")
    add("--optimizer", type=one_of(*OPTIMIZERS), help=" | ".join(OPTIMIZERS))
    add(
        "--weight-decay",
        type=number(float, 0, 1000),
        metavar="W",
        help="weight decay of the optimizer",
    )
    add("--batch-size", type=count, metavar="N", help="training images per step")
    add(
        "--label-smoothing",
        type=number(float, 0, 0.99),
        metavar="E",
        help="share of the target that goes to the other classes",
    )
    add(
        "--loss",
        type=one_of(*LOSSES),
        help="ce | gce (generalised cross-entropy, robust to label noise)",
    )
    add(
        "--gce-q",
        type=number(float, 0, 1, above=True),
        metavar="Q",
        help="gce: its exponent; 0 is cross-entropy, 1 is the mean absolute error (default: 0.5)",
    )
    add("--train-encoders", action="store_true", help="train both CLIP towers too (method rada)")
    add(
        "--lora",
        action="store_true",
        help="train low-rank adapters in both towers alone (CLIP-LoRA; needs vtclip[lora])",
    )
    add(
        "--lora-rank",
        type=number(int, 1, 10_000),
        metavar="R",
        help="rank of the adapters (default: 2)",
    )
    add(
        "--precision",
        type=one_of(*PRECISIONS),
        help="precision of the trained towers: " + " | ".join(PRECISIONS) + " (default: fp32)",
    )
    add(
        "--grad-checkpointing",
        action="store_true",
        help="train the towers in less memory, but slower",
    )


def _add_methods(parser: Parser) -> None:
    """Options of single methods."""
    group = parser.add_argument_group(
        "options of one method (vtclip fit --method NAME --help lists all of NAME)"
    )
    add = group.add_argument
    add(
        "--set",
        dest="settings",
        action="append",
        type=setting,
        metavar="NAME=VALUE",
        help="an option of the method's head, as often as needed; VALUE is JSON or text",
    )
    add(
        "--adapters", action="store_true", help="rada: add bottleneck adapters before the attention"
    )
    add(
        "--penalty",
        type=one_of(*PENALTIES),
        help="rada: penalty that holds the mask near 1, " + " | ".join(PENALTIES),
    )
    add(
        "--penalty-weight",
        type=number(float, 0, 1e6),
        metavar="W",
        help="rada: weight of the penalty in the loss",
    )
    add(
        "--queries",
        type=several(one_of(*QUERIES)),
        metavar="LIST",
        help="rada: attention maps to compute, of " + ",".join(QUERIES),
    )
    add(
        "--temperature",
        type=number(float, 0, 1e6, above=True),
        metavar="T",
        help="rada: temperature of the softmax",
    )
    add(
        "--context-length",
        type=number(int, 1, 10_000),
        metavar="N",
        help="coop: learned vectors (default: 16, or as many as the class names leave room for)",
    )
    add("--class-specific", action="store_true", help="coop: learned vectors for each class")
    add(
        "--class-position",
        type=one_of(*POSITIONS),
        help="coop: where the class name stands among the vectors, " + " | ".join(POSITIONS),
    )
    add("--context-init", metavar="WORDS", help='coop: start at these, e.g. "a photo of a"')


def _add_run(parser: Parser) -> None:
    """Where the run is written."""
    group = parser.add_argument_group("the run")
    add = group.add_argument
    add(
        "--out",
        metavar="RUN",
        help="folder of the run (default: runs/SOURCE-METHOD-SHOTSshot-seedSEED)",
    )
    add("--overwrite", action="store_true", help="replace the run in --out")
    add("--resume", action="store_true", help="continue the run in --out")
    parser.add_shared("--json", group=group)


def run(args: argparse.Namespace) -> int:
    source = source_path(args.source, args.data)
    for name in ("val", "test"):
        if getattr(args, name) is not None:
            existing(f"--{name}", getattr(args, name))
    if args.unlabelled not in (None, "test"):
        existing("--unlabelled", args.unlabelled)
    overrides = overrides_of(args)
    import vtclip

    with demo_model_noted(args.model == "demo" and needs_model(source)):
        fitted = vtclip.fit(
            source,
            templates=None if args.templates is None else [args.templates],
            overrides=overrides,
            progress=on_terminal(),
            **options_of(args, *PASSED_ON),
        )
    if not is_first():
        return 0
    if args.json:
        emit_json("fit", {**fitted.result, "run": str(fitted.folder)})
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
    settings = check_settings(args.settings or (), head, args.method)
    overrides["head"] = {**head, **settings} or None
    if args.context_init is not None and args.method not in (None, "auto", "coop"):
        # other heads have an option of that name, with another meaning
        raise ValueError(f"method {args.method} has no option --context-init")
    if args.gce_q is not None and args.loss != "gce":
        raise ValueError("--gce-q is for --loss gce, which is not given")
    if args.lora_rank is not None and not args.lora:
        raise ValueError("--lora-rank is for --lora, which is not given")
    if args.lora:
        overrides["lora_rank"] = args.lora_rank
    if args.train_encoders or args.lora:
        overrides["precision"] = args.precision
        overrides["grad_checkpointing"] = args.grad_checkpointing or None
    elif args.precision is not None or args.grad_checkpointing:
        option = "--grad-checkpointing" if args.precision is None else "--precision"
        raise ValueError(f"{option} is for --train-encoders, which is not given")
    return overrides


def headline(result: dict[str, Any]) -> str:
    """The number that matters, in one sentence."""
    if "harmonic_mean" in result:
        means = result["harmonic_mean"]
        return (
            f"{_percent(means['adapted'])} harmonic mean of base and new classes; "
            f"without training {_percent(means['zero_shot'])}"
        )
    adapted, zero_shot = result["adapted"], result["zero_shot"]
    images = f"{adapted['count']:,} images it did not train on"
    if "map" in adapted:
        return (
            f"{_percent(adapted['map'])} mean average precision on {images}; "
            f"without training {_percent(zero_shot['map'])}"
        )
    low, high = adapted["interval95"]
    return (
        f"{_percent(adapted['accuracy'])} right on {images} "
        f"(95 % interval {100 * low:.1f}-{100 * high:.1f} %); "
        f"without training {_percent(zero_shot['accuracy'])}"
    )


def _percent(share: float | None) -> str:
    """A share that has no value where no image counts."""
    return "-" if share is None else f"{100 * share:.1f} %"


def print_fit(fitted: Any) -> None:
    """The table of a run, with what was fitted to what above it, its images and cost below."""
    from vtclip.files import several
    from vtclip.runs.class_counts import class_table
    from vtclip.runs.predictions import confused_line
    from vtclip.runs.refit import refit_line
    from vtclip.runs.together import together_line

    result = fitted.result
    emit_headline(headline(result))
    counts = result["images"]
    classes = several(len(result["classes"]), "class", "classes")
    emit(
        f"{result['method']} on {result['source']}: {classes}, "
        f"{counts['train']} training, {counts['val']} validation and "
        f"{several(counts['test'], 'test image')}, "
        f"seed {result['seed']}"
    )
    if "new" in result:
        new = result["new"]
        classes = several(len(new["classes"]), "class", "classes")
        emit(f"new: {classes}, {several(new['adapted']['count'], 'test image')}")
    emit_table(fitted.table())
    if "refit" in result:
        emit(refit_line(result))
    if "together" in result:
        emit(together_line(result["together"]))
    if "final" in result:
        emit(
            "the numbers are of the fit before --final; the saved adapter has seen the test images "
            f"({several(result['final']['images'], 'image')})"
        )
    emit_table(class_table(result["images_per_class"]))
    confused = confused_line(result["confusion"]) if "confusion" in result else ""
    if confused:
        emit(confused)
    unreadable = result["test"]["unreadable"]
    if unreadable:
        more = ", ..." if len(unreadable) > 3 else ""
        emit(f"unreadable, not counted: {len(unreadable)} ({', '.join(unreadable[:3])}{more})")
    memory = {name: f" in {peak:.0f} MB" for name, peak in result.get("memory_mb", {}).items()}
    memory["total"] = f" in {result['peak_memory_mb'] or 0:.0f} MB"
    stages = ", ".join(
        f"{name} {value:.1f} s{memory.get(name, '')}" for name, value in result["seconds"].items()
    )
    emit(f"{stages}; {result['device'].replace('(1 threads)', '(1 thread)')}")
    files = ", ".join(sorted(path.name for path in fitted.folder.iterdir()))
    emit(f"run in {fitted.folder}: {files}")
