# SPDX-License-Identifier: Apache-2.0
"""From an image's path to its class folder, and from that to the protocol's class name."""

from __future__ import annotations

import re

FACES = {
    "airplanes": "airplane",
    "Faces": "face",
    "Leopards": "leopard",
    "Motorbikes": "motorbike",
}
LAND = {
    "AnnualCrop": "Annual Crop Land",
    "Forest": "Forest",
    "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road",
    "Industrial": "Industrial Buildings",
    "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land",
    "Residential": "Residential Buildings",
    "River": "River",
    "SeaLake": "Sea or Lake",
}


def folder(name: str) -> str | None:
    """The path without its file; None for a file that is not in a folder."""
    return name.rpartition("/")[0] or None


def caltech_name(name: str) -> str | None:
    class_folder = folder(name)
    return None if class_folder is None else FACES.get(class_folder, class_folder)


def eurosat_name(name: str) -> str | None:
    return LAND.get(folder(name) or "")


def pets_folder(name: str) -> str | None:
    """All pets are in one folder: Abyssinian_12.jpg belongs to Abyssinian."""
    breed = re.fullmatch(r"(.+)_[0-9]+\.[A-Za-z]+", name.rpartition("/")[2])
    return None if breed is None else breed[1]


def pets_name(name: str) -> str | None:
    breed = pets_folder(name)
    return None if breed is None else breed.lower()


def sun_name(name: str) -> str | None:
    """a/apartment_building/outdoor/x.jpg is an "outdoor apartment_building"."""
    words = (folder(name) or "").split("/")[1:]
    return " ".join(reversed(words)) or None


def ucf_name(name: str) -> str | None:
    """The folder; a CamelCase name, as in the videos' archive, is split with underscores."""
    action = folder(name)
    if action is None or "_" in action:
        return action
    return "_".join(re.findall("[A-Z][^A-Z]*", action)) or action
