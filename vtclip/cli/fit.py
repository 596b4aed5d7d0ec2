# SPDX-License-Identifier: Apache-2.0
"""`vtclip fit`: its arguments, its call of `vtclip.api.fit` and what it prints."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from vtclip.cli.parsing import emit, emit_json, fail, number, one_of, some_of, source_path
from vtclip.names import LOSSES, METHODS, OPTIMIZERS, PENALTIES, POSITIONS, PRECISIONS, QUERIES

TRAINING = ("epochs", "lr", "optimizer", "weight_decay", "batch_size")
OVERRIDES = (*TRAINING, "penalty_weight", "label_smoothing", "loss", "gce_q")
COOP_OPTIONS = {  # argument: option of the head
    "context_length": "num_context",
    "class_specific": "class_specific",
    "class_position": "class_position",
    "context_init": "init",
}
HEAD_OPTIONS = ("temperature", "penalty", "queries", "adapters")
DEMO_NOTE = (
    "note: --model demo is a small model for 64-pixel synthetic pictures; for photos pass "
    "--model ViT-B-32:openai, or a local file as --model ViT-B-32:/path/to/weights.safetensors"
)


def add_arguments(fit: Any) -> None:
    fit.add_argument(
        "source", metavar="SOURCE", help="class_name/*.jpg folder, features folder, .npz, NAME"
    )
    fit.add_argument("--data", metavar="ROOT", help="data sets: SOURCE is the name of one")
    fit.add_argument("--method", type=one_of(*METHODS), help="default auto: " + " | ".join(METHODS))
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
    fit.add_argument(
        "--train-encoders", action="store_true", help="train both CLIP towers too (method rada)"
    )
    fit.add_argument(
        "--precision", type=one_of(*PRECISIONS), help="of the trained towers: fp32 | bf16"
    )
    fit.add_argument(
        "--grad-checkpointing", action="store_true", help="trained towers in less memory, slower"
    )
    fit.add_argument(
        "--base-to-new", action="store_true", help="train on half of the classes, test on both"
    )
    fit.add_argument("--label-smoothing", type=number(float, 0, 0.99), metavar="E")
    fit.add_argument("--adapters", action="store_true", help="rada: bottleneck adapters before it")
    fit.add_argument("--penalty", type=one_of(*PENALTIES), help="rada: " + " | ".join(PENALTIES))
    fit.add_argument("--penalty-weight", type=number(float, 0, 1e6), metavar="W", help="rada")
    fit.add_argument(
        "--queries", type=some_of(*QUERIES), metavar="LIST", help="rada: of " + ",".join(QUERIES)
    )
    fit.add_argument(
        "--temperature", type=number(float, 0, 1e6, above=True), help="rada: of its attention"
    )
    fit.add_argument("--loss", type=one_of(*LOSSES), help="ce | gce, which wrong labels pull less")
    fit.add_argument("--gce-q", type=number(float, 0, 1, above=True), metavar="Q", help="of gce")
    fit.add_argument(
        "--pseudo-labels",
        action="store_true",
        help="no labels: --shots of the images surest zero-shot, per class it names",
    )
    fit.add_argument(
        "--context-length",
        type=number(int, 1, 10_000),
        metavar="N",
        help="coop: learned vectors (16)",
    )
    fit.add_argument("--class-specific", action="store_true", help="coop: vectors for each class")
    fit.add_argument("--class-position", type=one_of(*POSITIONS), help="coop: end | middle | front")
    fit.add_argument(
        "--context-init", metavar="WORDS", help='coop: start at these, e.g. "a photo of a"'
    )
    fit.add_argument("--out", metavar="RUN", help="default runs/SOURCE-METHOD-SHOTSshot-seedSEED")
    fit.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    fit.add_argument("--resume", action="store_true", help="go on with the run in --out")


def first_process() -> bool:
    """Whether this process is the only one, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def run_fit(args: argparse.Namespace) -> int:
    source = source_path(args.source, args.data)
    images = isinstance(source, str) or (
        source.is_dir() and not (source / "manifest.json").exists()
    )
    if images and args.model == "demo":
        sys.stderr.write(DEMO_NOTE + "\n")
    overrides = {name: getattr(args, name) for name in OVERRIDES}
    head = {name: getattr(args, name) for name in HEAD_OPTIONS}
    head |= {option: getattr(args, name) for name, option in COOP_OPTIONS.items()}
    head = {name: value for name, value in head.items() if value not in (None, False)}
    overrides["head"] = head or None
    if args.gce_q is not None and args.loss != "gce":
        fail("vtclip fit: --gce-q is for --loss gce, which is not given")
    if args.train_encoders:
        overrides["precision"] = args.precision
        overrides["grad_checkpointing"] = args.grad_checkpointing or None
    elif args.precision is not None or args.grad_checkpointing:
        option = "--grad-checkpointing" if args.precision is None else "--precision"
        fail(f"vtclip fit: {option} is for --train-encoders, which is not given")
    from vtclip import api

    run = api.fit(
        source,
        data=args.data,
        method=args.method,
        shots=args.shots,
        seed=args.seed,
        model=args.model,
        spatial=args.spatial,
        prompt=args.prompt,
        templates=None if args.templates is None else [args.templates],
        test_fraction=args.test_fraction,
        augment_passes=args.augment_passes,
        train_encoders=args.train_encoders,
        base_to_new=args.base_to_new,
        pseudo_labels=args.pseudo_labels,
        overrides=overrides,
        out=args.out,
        overwrite=args.overwrite,
        resume=args.resume,
        device=args.device,
        threads=args.threads,
        cache_dir=args.cache_dir,
        progress=sys.stderr is not None and sys.stderr.isatty(),
    )
    if not first_process():
        return 0
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
    if "new" in result:
        new = result["new"]
        emit(f"new: {len(new['classes'])} classes, {new['adapted']['count']} test images")
    emit(run.table())
    broken = result["test"]["unreadable"]
    if broken:
        emit(f"unreadable, not counted: {len(broken)} ({', '.join(broken[:3])}, ...)")
    held = {name: f" in {most:.0f} MB" for name, most in result.get("memory_mb", {}).items()}
    held["total"] = f" in {result['peak_memory_mb'] or 0:.0f} MB"
    stages = ", ".join(
        f"{name} {value:.1f} s{held.get(name, '')}" for name, value in result["seconds"].items()
    )
    emit(f"{stages}; {result['device']}")
    files = ", ".join(sorted(path.name for path in run.folder.iterdir()))
    emit(f"run in {run.folder}: {files}")
    return 0
