# SPDX-License-Identifier: Apache-2.0
"""Both encoders trained, with RAda or by low-rank adapters, and the settings they are trained with.

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
LORA_TEMPLATE = "a photo of a {}."
STEPS_PER_SHOT = 500
DEMO_STEPS_PER_SHOT = 10
DEMO_LORA: Json = {"lr": 3e-3, "least_area": 0.5, "lora_rank": 8, "lora_dropout": 0.0}
CHECKPOINTS = 10  # of a training by adapters, whose epochs are many and short


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


@dataclass(frozen=True, kw_only=True)
class LoraConfig(FinetuneConfig):
    """As `FinetuneConfig`, of adapters of `lora_rank` in the attentions (vtclip.train.lora).

    lora_alpha: the change counts lora_alpha / sqrt(lora_rank).
    lora_dropout: share of the entries of an adapter's input that are dropped.
    """

    lora_rank: int = 2
    lora_alpha: float = 1.0
    lora_dropout: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integers(self, 1, "lora_rank")
        check_rates(self, "lora_alpha")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout must lie in 0..1, 1 excluded, got {self.lora_dropout}")


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


def get_lora_config(
    images: int,
    shots: int,
    *,
    model: str = "demo",
    overrides: Mapping[str, object] | None = None,
) -> LoraConfig:
    """CLIP-LoRA's settings for `images` training images, `shots` per class, with `overrides`.

    500 * shots steps of 32 images, in whole epochs; AdamW at 2e-4, half a cosine without warm-up;
    arXiv 2405.18541.

    "demo", for the bundled model, takes 10 * shots steps at 3e-3, rank 8 and no dropout: it is a
    small tower far from the new domain. The rate was chosen on other scenes than those the demo
    draws (seed 1001), the rest set by hand.

    Command: vtclip fit SOURCE --lora --model ViT-B-16:openai
    """
    values: Json = {"recipe": "clip-lora", "lr": 2e-4, "weight_decay": 1e-2, "batch_size": 32}
    values |= {"warmup_steps": 0, "penalty_weight": 0.0}
    steps = STEPS_PER_SHOT
    if model == "demo":
        values |= {"recipe": "clip-lora demo", **DEMO_LORA}
        steps = DEMO_STEPS_PER_SHOT
    values |= overrides or {}
    values["batch_size"] = min(values["batch_size"], images)
    per_epoch = max(1, images // max(1, values["batch_size"]))
    values.setdefault("epochs", math.ceil(steps * max(1, shots) / per_epoch))
    values.setdefault("checkpoint_every", max(1, values["epochs"] // CHECKPOINTS))
    return LoraConfig(**{**values, "head_lr": values["lr"]})
