# SPDX-License-Identifier: Apache-2.0
"""Small data roots in the layout of the real ones, with JPEGs of 20 x 16 pixels."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vtclip.data.sets import SETS

# class folder and class name of three classes; "{}" is the number of an image
NAMES = {
    "caltech101": [("Faces", "face"), ("airplanes", "airplane"), ("anchor", "anchor")],
    "oxford_pets": [("Abyssinian", "abyssinian"), ("Bengal", "bengal"), ("pug", "pug")],
    "stanford_cars": [("", "2012 Audi A4 Sedan"), ("", "2007 BMW X5 SUV"), ("", "1993 Volvo 240")],
    "oxford_flowers": [("", "passion flower"), ("", "water lily"), ("", "cyclamen")],
    "food101": [("apple_pie", "apple_pie"), ("tacos", "tacos"), ("waffles", "waffles")],
    "sun397": [
        ("a/abbey", "abbey"),
        ("a/apartment_building/outdoor", "outdoor apartment_building"),
        ("z/zoo", "zoo"),
    ],
    "dtd": [("banded", "banded"), ("dotted", "dotted"), ("woven", "woven")],
    "eurosat": [("AnnualCrop", "Annual Crop Land"), ("River", "River"), ("SeaLake", "Sea or Lake")],
    "ucf101": [("Apply_Lipstick", "Apply_Lipstick"), ("Archery", "Archery"), ("Yo_Yo", "Yo_Yo")],
}
SYNSETS = ["n01440764", "n03773504", "n04008634", "n04355933"]
SYNSET_NAMES = ["tench", "missile", "missile", "sunglasses"]
COUNTS = {"train": 6, "val": 3, "test": 4}


def picture(path: Path, number: int, k: int = 0) -> None:
    """A JPEG whose colour shows its class and whose noise differs with `number`."""
    draw = np.random.default_rng([number, k])
    pixels = draw.integers(0, 90, (16, 20, 3)) + 150 * (np.arange(3) == k % 3)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path, quality=90)


def image_path(name: str, folder: str, number: int, k: int) -> str:
    """The name of an image as the real set has it."""
    if name == "oxford_pets":
        return f"{folder}_{number}.jpg"
    if name == "stanford_cars":
        return f"cars_train/{10 * number + k:05d}.jpg"
    if name == "oxford_flowers":
        return f"image_{10 * number + k:05d}.jpg"
    return f"{folder}/image_{number:04d}.jpg"


def make_split(root: Path, name: str) -> Path:
    """A set with a split file: three classes, listed from the last label to the first."""
    spec = SETS[name]
    rows: dict[str, list[Any]] = {role: [] for role in COUNTS}
    number = 0
    for role, count in COUNTS.items():
        for k in (2, 1, 0):
            folder, class_name = NAMES[name][k]
            for _ in range(count):
                number += 1
                path = image_path(name, folder, number, k)
                picture(spec.image_root(root) / path, number, k)
                rows[role].append([path, k, class_name])
    write_split(root, name, rows)
    return root


def split_file(root: Path, name: str) -> Path:
    return SETS[name].place(root) / SETS[name].files[0]


def write_split(root: Path, name: str, rows: dict[str, Any]) -> None:
    split_file(root, name).parent.mkdir(parents=True, exist_ok=True)
    split_file(root, name).write_text(json.dumps(rows))


def read_rows(root: Path, name: str) -> dict[str, Any]:
    rows: dict[str, Any] = json.loads(split_file(root, name).read_text())
    return rows


def make_aircraft(root: Path) -> Path:
    place = SETS["fgvc_aircraft"].place(root)
    variants = ["707-320", "A300B4", "F-16A/B"]
    place.mkdir(parents=True)
    (place / "variants.txt").write_text("\n".join(variants) + "\n")
    number = 34000
    for role, count in COUNTS.items():
        lines = []
        for _ in range(count):
            for k in (1, 0, 2):
                number += 1
                picture(place / "images" / f"{number:07d}.jpg", number, k)
                lines.append(f"{number:07d} {variants[k]}")
        (place / f"images_variant_{role}.txt").write_text("\n".join(lines) + "\n")
    return root


def make_imagenet(root: Path) -> Path:
    place = SETS["imagenet"].place(root)
    number = 0
    for k, synset in enumerate(SYNSETS):
        for role, count in (("train", 8), ("val", 3)):
            for _ in range(count):
                number += 1
                picture(place / "images" / role / synset / f"{synset}_{number}.JPEG", number, k)
    write_classnames(place)
    return root


def write_classnames(place: Path) -> None:
    place.mkdir(parents=True, exist_ok=True)
    lines = [f"{s} {name}\n" for s, name in zip(SYNSETS, SYNSET_NAMES, strict=True)]
    (place / "classnames.txt").write_text("".join(lines))


def make_variant(root: Path, name: str, classes: tuple[int, ...] = (0, 1, 2, 3)) -> Path:
    """imagenetv2 (numbered folders) or one of those with folders of synsets."""
    spec = SETS[name]
    for k in classes:
        folder = str(k) if name == "imagenetv2" else SYNSETS[k]
        for number in range(2):
            picture(spec.image_root(root) / folder / f"{number}.jpg", 900 + 10 * k + number, k)
    return root


def make_set(root: Path, name: str) -> Path:
    """The small tree of any data set."""
    if name in NAMES:
        return make_split(root, name)
    if name == "fgvc_aircraft":
        return make_aircraft(root)
    if name == "imagenet":
        return make_imagenet(root)
    make_variant(root, name, (0, 2) if name in ("imagenet_a", "imagenet_r") else (0, 1, 2, 3))
    write_classnames(SETS[name].place(root))
    return root


def fingerprint(root: Path) -> str:
    """Names, times, modes and bytes of everything below `root`: any write changes it."""
    total = hashlib.sha256()
    for folder, folders, files in os.walk(root):
        folders.sort()
        for name in [".", *sorted(files)]:
            path = Path(folder) / name
            status = path.stat()
            data = path.read_bytes() if name != "." else b""
            line = f"{path.relative_to(root)} {status.st_mtime_ns} {status.st_mode} {len(data)}"
            total.update(line.encode() + hashlib.sha256(data).digest())
    return total.hexdigest()
