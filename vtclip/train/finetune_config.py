# SPDX-License-Identifier: Apache-2.0
"""RAda with both encoders trained, and the settings it is trained with.

The authors' settings for this case were not published. "flyp" is inferred from the public FLYP
protocol, whose benchmark their table repeats: AdamW, 10 epochs, rate 1e-5, weight decay 0.1, 500
steps of warm-up, half a cosine, batch 512, 80 templates, one of them drawn per class and step.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from vtclip.files import Json
from vtclip.heads.config import check_integers, check_rates, check_weight
from vtclip.names import PRECISIONS

TEMPLATES = "imagenet80"
# Few images: at least so many steps an epoch, as long as a batch keeps as many images.
FEW = 16


@dataclass(frozen=True)
class FinetuneConfig:
    """How encoders and head are trained together.

    lr: peak rate of both encoders; the head's own is `head_lr`. Both rise linearly over
        `warmup_steps` and then fall to 0 as half a cosine, step by step.
    weight_decay: of matrices only; biases, norms and the logit scale have none.
    penalty_weight: what the head's penalty, averaged over the batch, counts next to cross-entropy.
    least_area: of a random crop, as a share of the image.
    precision "bf16": both towers under bfloat16 autocast; weights, head and loss stay float32.
    """

    recipe: str
    epochs: int
    lr: float
    head_lr: float
    weight_decay: float
    batch_size: int
    warmup_steps: int
    penalty_weight: float = 0.1
    least_area: float = 0.08
    precision: str = "fp32"
    grad_checkpointing: bool = False
    checkpoint_every: int = 1  # epochs between checkpoints and looks at the validation rows
    head: Json = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be fp32 or bf16, got {self.precision!r}")
        check_integers(self, 1, "epochs", "batch_size", "checkpoint_every")
        check_integers(self, 0, "warmup_steps")
        check_rates(self, "lr", "head_lr")
        if not 0 < self.least_area <= 1:
            raise ValueError(f"least_area must be above 0 and at most 1, got {self.least_area!r}")
        check_weight(self, "weight_decay", 1e3)
        check_weight(self, "penalty_weight", 1e3)

    def is_due(self, epoch: int) -> bool:
        """Whether a checkpoint and a look at the validation rows follow this epoch."""
        return epoch + 1 == self.epochs or (epoch + 1) % self.checkpoint_every == 0

    def rate(self, number: int, total: int) -> float:
        """The share of the peak rate at step `number` of `total`."""
        if number < self.warmup_steps:
            return (number + 1) / self.warmup_steps
        done = (number - self.warmup_steps) / max(1, total - self.warmup_steps)
        return (1 + math.cos(math.pi * done)) / 2


def get_config(
    images: int, *, model: str = "", overrides: Mapping[str, object] | None = None
) -> FinetuneConfig:
    """The settings for `images` training images, with `overrides` in place of some.

    Batch: 512, but few images give at least 16 steps an epoch of at least 16 images:
    min(512, max(16, images // 16)), never more than there are. Warm-up: 500 steps, but no more
    than a tenth of all. Both follow `overrides` of epochs and batch size.

    "demo", for the bundled model, differs in what is named there: a small tower far from the new
    domain needs larger rates. Chosen on other scenes than those the demo draws (seed 1001).

    Command: vtclip fit SOURCE --method rada --train-encoders --model ViT-B-16:openai
    """
    values: Json = {"recipe": "flyp", "epochs": 10, "weight_decay": 0.1}
    values |= {"lr": 1e-5, "head_lr": 1e-4}
    if model == "demo":
        values |= {"recipe": "demo", "lr": 3e-4, "head_lr": 1e-3, "least_area": 0.5}
    values |= overrides or {}
    values["batch_size"] = min(values.get("batch_size", max(FEW, min(512, images // FEW))), images)
    steps = values["epochs"] * max(1, images // max(1, values["batch_size"]))
    values.setdefault("warmup_steps", min(500, steps // 10))
    return FinetuneConfig(**values)
