# SPDX-License-Identifier: Apache-2.0
"""From what was asked for to what is done: device, recipe, shots, rows, head, temperature."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import engine, metrics
from .choices import pick
from .config import FitConfig
from .data.records import Records
from .data.splits import Split, few_shot_split, split_by_roles
from .heads import HEADS
from .recipes import RECIPES

logger = logging.getLogger(__name__)
# how many images per class are tried where none are named
SHOTS = (16, 8, 4, 2, 1)


def check_threads(threads: int | None) -> None:
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")


def set_threads(threads: int | None) -> None:
    check_threads(threads)
    if threads is not None:
        torch.set_num_threads(threads)


def choose_device(device: str | torch.device | None) -> torch.device:
    """The named device, or the first GPU where there is one, else the CPU."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {str(device)!r}") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {chosen}: this torch sees {torch.cuda.device_count()} GPUs")
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be cpu, cuda or cuda:N, got {str(device)!r}")
    return chosen


def takes_images(method: str) -> bool:
    """Whether the method learns from labelled images, by training or by keeping them."""
    head: Any = HEADS[method]
    return not getattr(head, "fixed", False)


def recipe_config(method: str, shots: int, overrides: Mapping[str, Any] | None) -> FitConfig:
    """The recipe's settings with `overrides` in place of some; `head` adds to the recipe's.

    Epochs that are asked for are trained, all of them. A head without a penalty takes no
    penalty_weight; where its kind is "none" the weight is 0.
    """
    config = RECIPES[method](shots)
    given = {name: value for name, value in (overrides or {}).items() if value is not None}
    options = dict(given.pop("head", None) or {})
    if method == "auto" and (given or options):
        raise ValueError(
            "method auto fits several methods, each with its own settings; to set "
            f"{', '.join([*given, *options])}, name one method"
        )
    if given and not config.epochs:
        raise ValueError(f"method {method} has no training, so {', '.join(given)} cannot be set")
    if options and not config.epochs and not takes_images(method):
        raise ValueError(f"method {method} has no training, so {', '.join(options)} cannot be set")
    takes = inspect.signature(HEADS[method]).parameters
    for name in options:
        if name == "text" or name not in takes:
            raise ValueError(f"method {method} has no option {name}")
    for name in given:
        pick("override", name, [field.name for field in dataclasses.fields(FitConfig)])
    weight = given.get("penalty_weight")
    if weight and not hasattr(HEADS[method], "forward_with_penalty"):
        raise ValueError(f"method {method} has no penalty, so penalty_weight cannot be set")
    if {**config.head, **options}.get("penalty") == "none":
        if weight:
            raise ValueError(f"penalty_weight must be 0 where the penalty is none, got {weight:g}")
        given["penalty_weight"] = 0.0
    given["head"] = {**config.head, **options}
    if "epochs" in given:
        given.setdefault("enough_pairs", 0)
    if given.get("epochs", 1) < 1:
        raise ValueError(f"epochs must be at least 1, got {given['epochs']}")
    return dataclasses.replace(config, **given)


def usual_shots(records: Records, test_fraction: float) -> int:
    """16, or the largest of 8, 4, 2, 1 that every class has beside its test share."""
    counts = torch.bincount(records.label, minlength=len(records.class_names)).tolist()
    smallest = min((count - int(count * test_fraction) for count in counts), default=0)
    shots = next((known for known in SHOTS if known <= smallest), min(SHOTS))
    if shots < max(SHOTS) and test_fraction < 1:
        logger.warning(
            "shots %d: the smallest class has %d images beside the test share", shots, smallest
        )
    return shots


def split_rows(
    records: Records, learns: bool, shots: int, seed: int, test_fraction: float
) -> Split:
    """Train, validation and test rows; a method that learns nothing may test on every row.

    Rows that have roles were drawn already, and keep them.
    """
    if not learns and test_fraction == 1:
        shots = 0
    elif learns and shots < 1:
        raise ValueError(f"shots must be at least 1 to train, got {shots}")
    if records.roles is not None:
        return split_by_roles(records.label, records.names, records.roles)
    split = few_shot_split(
        records.label,
        records.names,
        shots=shots,
        seed=seed,
        test_fraction=test_fraction,
        class_names=records.class_names,
    )
    if len(split.test) == 0:
        raise ValueError(f"test_fraction {test_fraction} leaves no test images")
    return split


def test_rows(records: Records) -> Tensor:
    """Every row, or those that the source calls test rows."""
    if records.roles is None:
        return torch.arange(len(records))
    return (records.roles == 2).nonzero().flatten()


def build_head(method: str, records: Records, config: FitConfig, device: torch.device) -> nn.Module:
    """The head of `method` over the records' class texts, with the recipe's options."""
    options: dict[str, Any] = {"logit_scale": records.logit_scale, **config.head}
    if "spatial_dim" in inspect.signature(HEADS[method]).parameters:
        options.setdefault("spatial_dim", records.spatial_width)
    head: Any = HEADS[method](records.text, **options).to(device)
    if hasattr(head, "set_text_views"):
        head.set_text_views(records.text_views)
    built: nn.Module = head
    return built


def calibrate(
    head: nn.Module, rows: engine.TrainingRows, val: Tensor, device: torch.device
) -> float | None:
    """The temperature fitted on the validation images; None where there are none."""
    if len(val) == 0:
        return None
    return metrics.fit_temperature(*engine.all_logits(head, rows, val, device=device))
