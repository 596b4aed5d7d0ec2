# SPDX-License-Identifier: Apache-2.0
"""Folders of small pictures, one folder per class, and small models with random weights."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from vtclip.clip import build_clip
from vtclip.clip.word_tokenizer import build_vocab
from vtclip.demo.scenes import CLASS_NAMES, render_scene, shifted_scene

DOTS = ("red dot", "green dot", "blue dot")
COLOURS = {"grass": (40, 160, 60), "ocean": (30, 60, 190), "sunset": (220, 90, 40)}
SIDE, WIDTH = 32, 16
# a model of pictures of SIDE x SIDE pixels and features of WIDTH numbers; its vocabulary is open
SMALL = {
    "model_cfg": {
        "embed_dim": WIDTH,
        "vision_cfg": {
            "image_size": SIDE, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16
        },
        "text_cfg": {"context_length": 16, "width": 16, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {"size": SIDE, "mean": [0.5, 0.4, 0.6], "std": [0.25, 0.3, 0.2]},
}  # fmt: skip


def save(pixels: np.ndarray[Any, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def noise(root: Path, classes: Iterable[str] = ("cat", "dog", "eel"), each: int = 5) -> Path:
    """PNG files root/class/number.png with different contents."""
    for k, name in enumerate(classes):
        for number in range(each):
            draw = np.random.default_rng([k, number])
            save(draw.integers(0, 256, (12, 14, 3)), root / name / f"{number}.png")
    return root


def dots(root: Path, spoiled: Collection[str] = ()) -> Path:
    """Eight pictures for each of DOTS; those in `spoiled` do not have the colour of their class."""
    for k, name in enumerate(DOTS):
        for number in range(8):
            spoil = f"{name}/{number}.png" in spoiled
            draw = np.random.default_rng([k, number, spoil])
            pixels = draw.integers(0, 256 if spoil else 200, (16, 16, 3))
            if not spoil:
                pixels[4:12, 4:12, k] = 255
            save(pixels, root / name / f"{number}.png")
    return root


def colours(root: Path, each: int, size: tuple[int, int]) -> Path:
    """Plain colours with noise, `size` = (height, width)."""
    draw = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        for number in range(each):
            pixels = np.clip(np.array(colour) + draw.integers(-40, 40, (*size, 3)), 0, 255)
            save(pixels, root / name / f"{number:02d}.png")
    return root


def scenes(folder: Path, label: int, count: int) -> Path:
    """Scenes of one class of the demo's."""
    rng = np.random.default_rng(label)
    for number in range(count):
        save(render_scene(shifted_scene(label, rng), rng)[0], folder / f"{number:02d}.png")
    return folder


def scenes_of(root: Path, labels: Iterable[int], count: int = 8) -> Path:
    """A folder of scenes for each label."""
    for label in labels:
        scenes(root / CLASS_NAMES[label], label, count)
    return root


def write_model(folder: Path, config: dict[str, Any], words: Iterable[str], seed: int) -> Path:
    """A folder that `local-dir:` reads, with random weights and a tokenizer of `words`."""
    vocab, config = build_vocab(words), deepcopy(config)
    config["model_cfg"]["text_cfg"].setdefault("vocab_size", len(vocab))
    torch.manual_seed(seed)
    state = build_clip(config["model_cfg"]).state_dict()
    folder.mkdir(parents=True)
    tensors = {name: value.contiguous() for name, value in state.items()}
    save_file(tensors, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    (folder / "vocab.json").write_text(json.dumps(vocab))
    return folder


def small_model(folder: Path, seed: int = 1) -> Path:
    """SMALL, which reads the names of COLOURS."""
    return write_model(folder, SMALL, ["a", "photo", "of", *COLOURS], seed)
