# SPDX-License-Identifier: Apache-2.0
"""Training of both CLIP towers, or of adapters in them, in one process or several.

Step n draws the images of the shuffled epoch (random crop and flip), one template per class, and
minimises the cross-entropy of the head on top plus its penalty. Order, crops and templates are
functions of seed, epoch, image and step alone: a resumed run and a run in several processes see the
same ones. For the same reason every module stays in evaluation mode: batch norms keep their
statistics (their weights are trained), and dropout, which open_clip's models have none of by
default, stays off; that of adapters is drawn by seed and step (vtclip.train.lora).

Several processes: images and class texts are split, the text features gathered with their
gradient, and gradients averaged by DistributedDataParallel. The loss of a process is its images'
part of the mean over the whole batch, times the number of processes, so that the average is the
gradient of that mean.
"""

from __future__ import annotations

import hashlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtclip.clip import Clip
from vtclip.clip.augment import pass_generator
from vtclip.data.decode import ImageError, content_digest, decode
from vtclip.data.image_files import ImageFiles
from vtclip.data.threads import ahead, decode_pool
from vtclip.distributed import World
from vtclip.files import Json
from vtclip.heads import RAda
from vtclip.machine import BatchSize
from vtclip.names import option
from vtclip.train import metrics
from vtclip.train.finetune_config import FinetuneConfig
from vtclip.train.lora import CosineHead, LoRA
from vtclip.train.rows import epoch_rows, epoch_size
from vtclip.train.steps import TrainingRun, backward, check_weights_finite, not_finite

MAX_SCALE = 100.0  # CLIP's own bound on the logit scale
VALIDATION_BATCH = 256
AHEAD = 128  # decoded images that wait for their step


class TrainingImages:
    """The files of the rows that training may see; any other row is an IndexError."""

    def __init__(
        self,
        images: Path | ImageFiles,
        manifest: Json,
        clip: Clip,
        *indices: Tensor,
        seed: int,
        least_area: float,
    ) -> None:
        self.label = torch.tensor(manifest["label"], dtype=torch.long)
        self._images = images if isinstance(images, ImageFiles) else ImageFiles.below(images)
        self._clip, self._seed, self._least_area = clip, seed, least_area
        self._names: list[str] = manifest["names"]
        self._digests: list[str] = manifest["digests"]
        self._allowed = torch.zeros(len(self._names), dtype=torch.bool)
        for index in indices:
            self._allowed[index] = True

    def stream(self, rows: Tensor, epoch: int | None) -> Iterator[Tensor]:
        """Pixels [3, H, W] of `rows` in order: a random view of `epoch`, or None for the plain."""
        outside = rows[~self._allowed[rows]]
        if len(outside):
            raise IndexError(f"row {int(outside[0])} is neither a training nor a validation row")
        with decode_pool() as pool:
            yield from ahead(pool, lambda row: self._load(row, epoch), rows.tolist(), AHEAD)

    def _load(self, row: int, epoch: int | None) -> Tensor:
        name, digest = self._names[row], self._digests[row]
        path, data = self._images.path(name), self._images.read(name)
        if content_digest(data) != digest:
            raise ImageError(path, "the file changed after the run began")
        image = decode(data, path)
        if epoch is None:
            return self._clip.preprocess(image)
        generator = pass_generator(f"{digest} seed {self._seed}", epoch)
        return self._clip.augment(image, generator, self._least_area)


class Encoders(nn.Module):
    """Both towers of a CLIP and a head over them, as one module to train.

    lora: where it is given, its adapters alone are trained.
    """

    def __init__(
        self,
        clip: Clip,
        head: RAda | CosineHead,
        world: World | None = None,
        lora: LoRA | None = None,
    ) -> None:
        super().__init__()
        self.model, self.head, self.lora = clip.model, head, lora
        self.world = world or World()
        self.device_type = clip.device.type

    @property
    def log_scale(self) -> nn.Parameter:
        """The logarithm of the logit scale."""
        return self.model.get_parameter("logit_scale")

    def drawing(self, seed: int, number: int) -> AbstractContextManager[None]:
        """What is drawn in the passes of step `number`: an adapter's dropout, or nothing."""
        return (
            nullcontext() if self.lora is None else self.lora.dropout(seed, number, self.world.rank)
        )

    def forward(self, pixels: Tensor, tokens: Tensor, bf16: bool) -> tuple[Tensor, Tensor]:
        """pixels [B, 3, H, W], tokens [K, context] -> logits [B, K], penalty [B], float32.

        B are this process's images, K all classes; the tokens are the same in all processes.
        """
        own_classes = self.world.padded_share(len(tokens)).to(tokens.device)
        model: Any = self.model
        with torch.autocast(self.device_type, torch.bfloat16, enabled=bf16):
            image, text = model.encode_image(pixels), model.encode_text(tokens[own_classes])
        classes = self.world.gather(text.float(), len(tokens))
        scale = self.log_scale.float().exp().reshape(())
        return self.head.forward_with_penalty(image.float(), classes, scale)


def make_trainable(
    module: Encoders, size: int | list[int], tokens: Tensor, device: torch.device
) -> None:
    """Switch on what the loss depends on; the rest (e.g. a caption decoder) stays frozen.

    Found by one backward pass over a blank image; of adapters they are what is trained.
    """
    if module.lora is not None:
        return
    module.eval().requires_grad_(True)
    height, width = (size, size) if isinstance(size, int) else size
    blank = torch.zeros(1, 3, height, width, device=device)
    logits, penalty = module(blank, tokens.to(device), False)
    (logits.sum() + penalty.sum()).backward()
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.grad is not None)
        parameter.grad = None


def build_optimizer(module: Encoders, config: FinetuneConfig) -> torch.optim.AdamW:
    """AdamW in four groups: encoders and head, each with decayed matrices and the rest."""
    groups = []
    for trained, peak in (module.model, config.lr), (module.head, config.head_lr):
        parameters = [p for p in trained.parameters() if p.requires_grad]
        for decay, chosen in (
            (config.weight_decay, [p for p in parameters if p.ndim >= 2]),
            (0.0, [p for p in parameters if p.ndim < 2]),
        ):
            groups.append({"params": chosen, "lr": peak, "peak": peak, "weight_decay": decay})
    return torch.optim.AdamW(groups)


def drawn_templates(count: int, classes: int, seed: int, number: int) -> Tensor:
    """The template [K] of each class at step `number`."""
    seeded = hashlib.sha256(f"templates seed {seed} step {number}".encode()).digest()[:8]
    generator = torch.Generator().manual_seed(int.from_bytes(seeded, "little") >> 1)
    return torch.randint(count, (classes,), generator=generator)


def check_batch(config: FinetuneConfig, world: World) -> None:
    if config.batch_size < world.size:
        raise ValueError(
            f"{option('batch_size')} must give each of {world.size} processes an image, got "
            f"{config.batch_size}"
        )


def train_encoders(
    module: Encoders,
    images: TrainingImages,
    tokens: Tensor,
    train_index: Tensor,
    config: FinetuneConfig,
    run: TrainingRun,
    validate: Callable[[], dict[str, float]],
) -> None:
    """Train `module` in place; the weights of the last step stay in it.

    tokens: [T, K, context] of T templates. An epoch is floor(N / batch_size) full batches. Only
    the first process logs, validates and saves. A loss or gradient that is not finite raises
    FloatingPointError before its step; SIGINT or SIGTERM in any process saves a checkpoint after
    the running step and raises `Interrupted` in all.
    """
    world, device, checkpoint = module.world, run.device, run.checkpoint
    check_batch(config, world)
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = build_optimizer(module, config)
    label = images.label[train_index] if run.balanced else None
    steps = max(1, epoch_size(train_index, label) // config.batch_size)  # per epoch
    total, tokens = config.epochs * steps, tokens.to(device)
    classes = torch.arange(tokens.shape[1], device=device)
    bound = max(math.log(MAX_SCALE), float(module.log_scale.detach().max()))
    first, loss_sum = run.start(module, optimizer)
    parallel = in_parallel(module, device)
    feed: Iterator[Tensor] = iter(())
    order, last_loss, started = train_index, math.nan, time.perf_counter()

    with world.stop_signal() as stop:
        for number in run.steps(first, total):
            epoch, step = divmod(number, steps)
            if step == 0 or number == first:
                order = epoch_rows(train_index, label, run.seed, epoch)
                batches = torch.split(order[: steps * config.batch_size], config.batch_size)
                feed = images.stream(torch.cat([world.share(b) for b in batches[step:]]), epoch)
            rate = set_rate(optimizer, config, number, total)
            rows = order[step * config.batch_size : (step + 1) * config.batch_size]
            own_rows = world.share(rows)
            pixels = torch.stack([next(feed) for _ in own_rows.tolist()]).to(device)
            template = drawn_templates(len(tokens), len(classes), run.seed, number).to(device)
            prompts = tokens[template, classes]
            with module.drawing(run.seed, number):
                logits, penalty = parallel(pixels, prompts, config.precision == "bf16")
                loss = F.cross_entropy(logits, images.label[own_rows].to(device), reduction="sum")
                loss = loss + config.penalty_weight * penalty.sum()
                norm = backward(loss * (world.size / len(rows)), optimizer, parameters).item()
            sums = [loss.item() / len(rows), norm, float(stop.received)]
            value, norms, stopped = world.sum(sums, device)
            if not math.isfinite(value + norms):
                last = value if math.isfinite(value) else last_loss
                raise not_finite(value, number, epoch, rate, rows, last)
            optimizer.step()
            with torch.no_grad():
                module.log_scale.clamp_(max=bound)
            loss_sum, last_loss = loss_sum + value, value

            row = {"epoch": epoch, "step": number + 1, "lr": rate, "loss": value}
            if step + 1 == steps:
                row["epoch_loss"], loss_sum = loss_sum / steps, 0.0
            due = step + 1 == steps and config.is_due(epoch)
            if due:
                row |= world.by_first(validate) or {}
            if checkpoint is not None and (due or stopped):
                world.by_first(partial(checkpoint.save, module, optimizer, number + 1, loss_sum))
            run.log(row | {"seconds": time.perf_counter() - started})
            if stopped:
                raise run.interrupted(stop.received or signal.SIGTERM, number + 1)
    check_weights_finite(parameters)


def in_parallel(module: Encoders, device: torch.device) -> nn.Module:
    """The module whose backward averages gradients over all processes; alone, itself."""
    if module.world.size == 1:
        return module
    place = [device.index] if device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(module, device_ids=place)


def set_rate(
    optimizer: torch.optim.Optimizer, config: FinetuneConfig, number: int, total: int
) -> float:
    """Set the rates of step `number` of `total`; returns that of the encoders."""
    rate = config.rate(number, total)
    for group in optimizer.param_groups:
        group["lr"] = group["peak"] * rate
    return config.lr * rate


@torch.no_grad()
def validation(
    module: Encoders, clip: Clip, images: TrainingImages, index: Tensor, text: Callable[[], Tensor]
) -> dict[str, float]:
    """Accuracy and NLL of the rows `index`, the texts being the ensemble of all templates."""
    if len(index) == 0:
        return {}
    ensemble, scale = text(), module.log_scale.float().exp().reshape(())
    logits, feed, at_a_time = [], images.stream(index, None), BatchSize()
    for rows in torch.split(index, VALIDATION_BATCH):
        pixels = torch.stack([next(feed) for _ in rows.tolist()])
        image = torch.cat([image for image, _ in at_a_time.map(clip.encode_image, pixels)])
        logits.append(module.head.forward_with_penalty(image.float(), ensemble, scale)[0].cpu())
    return metrics.validation_metrics(torch.cat(logits), images.label[index])
