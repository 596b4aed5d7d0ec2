# SPDX-License-Identifier: Apache-2.0
"""Trains the demonstration's CLIP from scratch on scenes that it draws itself.

    python -m vtclip.demo.train [--minutes M] [--out DIR] [--seed S]

Two contrastive losses share one text tower: image against caption, and the mean of the image
tokens under an item against a phrase for that item, which keeps local information in the tokens.
In both, every true pair of the batch is a positive. The run ends after `--minutes`; the folder
written is an open_clip "local-dir" folder with a word vocabulary in it.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from vtclip.clip import build_clip
from vtclip.clip.word_tokenizer import WordTokenizer, build_vocab
from vtclip.demo import captions, scenes
from vtclip.files import Json, write_together

log = logging.getLogger(__name__)

PATCH = 8
GRID = scenes.SIDE // PATCH
CONTEXT = 20
MUON_PEAK = 5e-3
ADAMW_PEAK = 2e-3
MEAN = (0.48, 0.46, 0.44)
STD = (0.27, 0.27, 0.27)
ATTRIBUTE_SIZES = (len(scenes.SHAPES), len(scenes.TEXTURES), len(scenes.COLOUR_NAMES))
ASSETS = Path(__file__).parent / "assets"


def model_config(vocab_size: int) -> Json:
    """The contents of open_clip_config.json."""
    return {
        "model_cfg": {
            "embed_dim": 128,
            "vision_cfg": {
                "image_size": scenes.SIDE,
                "patch_size": PATCH,
                "width": 128,
                "head_width": 32,
                "layers": 5,
                "pool_type": "avg",
            },
            "text_cfg": {
                "context_length": CONTEXT,
                "vocab_size": vocab_size,
                "width": 96,
                "heads": 3,
                "layers": 2,
            },
        },
        "preprocess_cfg": {
            "mean": list(MEAN),
            "std": list(STD),
            "interpolation": "bicubic",
            "resize_mode": "shortest",
            "size": [scenes.SIDE, scenes.SIDE],
        },
    }


@dataclass(frozen=True)
class TrainBatch:
    """B scenes and R regions; `captions` and `phrases` hold one text per scene and region."""

    pixels: Tensor  # [B, 3, 64, 64], normalised
    captions: list[str]
    caption_true: Tensor  # bool [B, B], scene x caption
    region_row: Tensor  # [R], the scene of a region
    region_weight: Tensor  # [R, L], rows sum to 1
    phrases: list[str]
    phrase_true: Tensor  # bool [R, R], region x phrase
    attributes: Tensor  # [R, 3], shape, texture and colour of a region


def normalise(pixels: scenes.Pixels) -> Tensor:
    """uint8 [B, 64, 64, 3] -> float32 [B, 3, 64, 64] with the model's mean and deviation."""
    image = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (image - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def draw_batch(rng: np.random.Generator, size: int, *, regions: int = 2) -> TrainBatch:
    """`size` fresh training scenes with captions, and up to `regions` items of each."""
    pixels = np.empty((size, scenes.SIDE, scenes.SIDE, 3), np.uint8)
    texts, claims, attributes = [], [], []
    rows, weights, phrases, phrase_claims, region_attributes = [], [], [], [], []
    for row in range(size):
        scene = scenes.training_scene(rng)
        pixels[row], _ = scenes.render_scene(scene, rng)
        text, claim = captions.caption(scene, rng)
        texts.append(text)
        claims.append(claim)
        attributes.append(captions.scene_attributes(scene))
        for index in rng.permutation(len(scene.items))[:regions].tolist():
            cover = scenes.item_mask(scene.items[index])
            weight = cover.reshape(GRID, PATCH, GRID, PATCH).sum((1, 3)).ravel()
            phrase, claimed = captions.describe(scene.items[index], rng)
            rows.append(row)
            weights.append(weight / weight.sum())
            phrases.append("a " + phrase)
            phrase_claims.append(claimed)
            region_attributes.append(attributes[-1][index])
    claimed_items = np.asarray(phrase_claims).reshape(-1, 1, captions.NUM_ATTRIBUTES)
    drawn_items = np.asarray(region_attributes).reshape(-1, 1, captions.NUM_ATTRIBUTES)
    return TrainBatch(
        pixels=normalise(pixels),
        captions=texts,
        caption_true=torch.from_numpy(captions.true_pairs(np.stack(attributes), np.stack(claims))),
        region_row=torch.tensor(rows),
        region_weight=torch.from_numpy(np.stack(weights)),
        phrases=phrases,
        phrase_true=torch.from_numpy(captions.true_pairs(drawn_items, claimed_items)),
        attributes=torch.from_numpy(drawn_items[:, 0, : len(ATTRIBUTE_SIZES)].copy()),
    )


def contrastive_loss(logits: Tensor, true: Tensor) -> Tensor:
    """Cross-entropy of rows and of columns; the target is spread evenly over the true pairs."""
    target = true.to(logits.dtype)
    rows = F.cross_entropy(logits, target / target.sum(1, keepdim=True))
    columns = F.cross_entropy(logits.T, (target / target.sum(0)).T)
    return (rows + columns) / 2


def batch_loss(
    model: Any, tokenizer: WordTokenizer, attribute_head: nn.Module, batch: TrainBatch
) -> Tensor:
    """Image against caption, plus region against phrase, plus the region's attributes.

    The last term classifies shape, texture and colour from a region's feature. It does not depend
    on the text tower, so that the image tower learns from the first steps; its head is dropped.
    """
    pooled, tokens = model.visual(batch.pixels)  # [B, C], [B, L, width]
    unique = sorted({*batch.captions, *batch.phrases})
    place = {text: index for index, text in enumerate(unique)}
    text = F.normalize(model.encode_text(tokenizer(unique)).float(), dim=-1)
    image_captions = text[torch.tensor([place[caption] for caption in batch.captions])]
    phrases = text[torch.tensor([place[phrase] for phrase in batch.phrases])]
    scale = model.logit_scale.exp()
    logits = scale * F.normalize(pooled.float(), dim=-1) @ image_captions.T
    # [R, 1, L] @ [R, L, width] -> [R, width]
    region_tokens = (batch.region_weight[:, None] @ tokens[batch.region_row].float())[:, 0]
    regions = region_tokens @ model.visual.proj
    region_logits = scale * F.normalize(regions, dim=-1) @ phrases.T
    guesses = attribute_head(regions).float().split(ATTRIBUTE_SIZES, dim=1)
    attribute_losses = [
        F.cross_entropy(guess, batch.attributes[:, column]) for column, guess in enumerate(guesses)
    ]
    return (
        contrastive_loss(logits, batch.caption_true)
        + contrastive_loss(region_logits, batch.phrase_true)
        + torch.stack(attribute_losses).sum()
    )


def build_optimizers(model: nn.Module, head: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the transformer blocks' matrices, AdamW for the rest.

    At this size Muon needs about half the steps that AdamW does.
    """
    named = list(model.named_parameters())
    matrices = [p for name, p in named if "resblocks" in name and p.ndim == 2]
    in_muon = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in in_muon] + list(head.parameters())
    return [
        torch.optim.Muon(matrices, lr=MUON_PEAK, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=ADAMW_PEAK, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def schedule(progress: float, warm_up: float = 0.03) -> float:
    """Share of the peak rate: linear warm-up, then a cosine to 1 %; `progress` in 0..1."""
    if progress < warm_up:
        return max(progress, 0.001) / warm_up
    share = min((progress - warm_up) / (1 - warm_up), 1.0)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share))


def save_assets(model: nn.Module, config: Json, vocab: dict[str, int], out: Path) -> None:
    """Writes the local-dir folder, weights as float16."""
    out.mkdir(parents=True, exist_ok=True)
    state = {name: value.detach().half().contiguous() for name, value in model.state_dict().items()}
    texts = {
        "open_clip_config.json": json.dumps(config, indent=2),
        "vocab.json": json.dumps(vocab, indent=0),
    }
    written = {out / name: (text + "\n").encode() for name, text in texts.items()}
    write_together({**written, out / "open_clip_model.safetensors": save(state)})


def train(
    *,
    minutes: float = 40.0,
    seed: int = 1,
    batch_size: int = 64,
    max_steps: int | None = None,
    bf16: bool = False,
    out: Path | None = None,
) -> tuple[nn.Module, list[float]]:
    """Trains for `minutes` of wall time, at most `max_steps`; returns the model and its losses.

    The folder `out`, if any, is rewritten every five minutes and at the end.
    """
    if not minutes > 0 or (max_steps is not None and max_steps < 1):
        raise ValueError(f"train: minutes and max_steps must be > 0, got {minutes}, {max_steps}")
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    vocab = build_vocab(captions.caption_words())
    config = model_config(len(vocab))
    model: Any = build_clip(config)
    head = nn.Linear(config["model_cfg"]["embed_dim"], sum(ATTRIBUTE_SIZES))
    tokenizer = WordTokenizer(vocab, CONTEXT)
    model.visual.output_tokens = True
    model.train()
    optimizers = build_optimizers(model, head)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    losses: list[float] = []
    start = saved = logged = time.monotonic()
    while True:
        now = time.monotonic()
        progress = (now - start) / (60 * minutes)
        if max_steps is not None:
            progress = max(progress, len(losses) / max_steps)
        if progress >= 1:
            break
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * schedule(progress)
            optimizer.zero_grad(set_to_none=True)
        batch = draw_batch(rng, batch_size)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = batch_loss(model, tokenizer, head, batch)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100.0))
        losses.append(loss.item())
        if now - logged > 20:
            logged = now
            recent = sum(losses[-50:]) / len(losses[-50:])
            rate = len(losses) * batch_size / (now - start)
            log.info(
                "%4.0f %%  step %d  loss %.3f  %.0f images/s",
                100 * progress, len(losses), recent, rate,
            )  # fmt: skip
        if out is not None and now - saved > 300:
            saved = now
            save_assets(model, config, vocab, out)
    if out is not None:
        save_assets(model, config, vocab, out)
        log.info("%d steps, %.0f s, written to %s", len(losses), time.monotonic() - start, out)
    model.visual.output_tokens = False
    return model.eval(), losses


def main(argv: Sequence[str] | None = None) -> None:
    """Command line of `python -m vtclip.demo.train`."""
    parser = argparse.ArgumentParser(description="Train the demonstration's CLIP.")
    parser.add_argument("--minutes", type=float, default=40.0, help="wall time (default 40)")
    parser.add_argument("--steps", type=int, help="stop after so many steps (default: no limit)")
    parser.add_argument("--out", type=Path, default=ASSETS, help="folder to write")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own)")
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if args.threads:
        torch.set_num_threads(args.threads)
    train(minutes=args.minutes, seed=args.seed, max_steps=args.steps, bf16=args.bf16, out=args.out)


if __name__ == "__main__":
    main()
