# SPDX-License-Identifier: Apache-2.0
"""FGVC Aircraft: variants.txt names the classes, images_variant_ROLE.txt has `id variant` lines."""

from __future__ import annotations

import hashlib
from pathlib import Path

from vtclip.data.sets.listing import ROLES, ImageList, Listing, Spec

FILES = ("variants.txt", *(f"images_variant_{role}.txt" for role in ROLES))


def read_variants(spec: Spec, root: Path) -> Listing:
    """Labels are the lines of variants.txt; images are `id`.jpg."""
    total = hashlib.sha256()
    class_names = _lines(spec, root, FILES[0], total)
    number = {name: k for k, name in enumerate(class_names)}
    lists = []
    for file in FILES[1:]:
        images = ImageList()
        for line in _lines(spec, root, file, total):
            image, _, variant = line.partition(" ")
            if variant.strip() not in number:
                raise spec.error(f"{file}: line {line!a} names no variant of {FILES[0]}")
            images.names.append(f"{image}.jpg")
            images.label.append(number[variant.strip()])
        lists.append(images)
    train, val, test = lists
    return Listing(
        spec, spec.image_root(root), class_names, class_names, train, val, test, total.hexdigest()
    ).check()


def _lines(spec: Spec, root: Path, file: str, total: hashlib._Hash) -> list[str]:
    data = (spec.place(root) / file).read_bytes()
    total.update(data)
    return [line.strip() for line in spec.decoded(file, data).splitlines() if line.strip()]
