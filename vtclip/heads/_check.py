# SPDX-License-Identifier: Apache-2.0
"""Input checks the heads share: argument, wish and fact in one line, no device synchronisation."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def check_text(head: str, text: Tensor) -> None:
    if not isinstance(text, Tensor) or not text.is_floating_point():
        kind = text.dtype if isinstance(text, Tensor) else type(text).__name__
        raise TypeError(f"{head}: text must be a floating-point tensor [K, C], got {kind}")
    if text.ndim != 2 or 0 in text.shape:
        raise ValueError(f"{head}: text must be [K, C] with K, C >= 1, got {list(text.shape)}")


def check_image(head: str, image: Tensor, text: Tensor) -> None:
    if image.ndim != 2 or image.shape[1] != text.shape[1]:
        raise ValueError(f"{head}: image must be [B, {text.shape[1]}], got {list(image.shape)}")
    check_dtype(head, "image", image, text.dtype)


def check_spatial(
    head: str, spatial: Tensor, spatial_mask: Tensor | None, width: int, dtype: torch.dtype
) -> None:
    if spatial.ndim != 3 or spatial.shape[2] != width:
        raise ValueError(f"{head}: spatial must be [B, L, {width}], got {list(spatial.shape)}")
    check_dtype(head, "spatial", spatial, dtype)
    if spatial_mask is None:
        return
    if spatial_mask.dtype != torch.bool:
        raise TypeError(f"{head}: spatial_mask must be bool, got {spatial_mask.dtype}")
    if spatial_mask.shape != spatial.shape[:2]:
        wish = list(spatial.shape[:2])
        raise ValueError(
            f"{head}: spatial_mask must be [B, L] = {wish}, got {list(spatial_mask.shape)}"
        )


def check_share(head: str, name: str, value: float) -> None:
    if not 0 <= value <= 1:  # also refuses NaN
        raise ValueError(f"{head}: {name} must lie in 0..1, got {value}")


def check_positive(head: str, **values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{head}: {name} must be finite and above 0, got {value}")


def check_not_negative(head: str, **values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{head}: {name} must be finite and at least 0, got {value}")


def check_finite(head: str, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{head}: {name} must be finite, got {value}")


def check_least(head: str, least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{head}: {name} must be at least {least}, got {value}")


def check_choice(head: str, name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        wish = ", ".join(choices)
        raise ValueError(f"{head}: {name} must be one of {wish}, got {value!r}")


def check_same_batch(head: str, image: Tensor, spatial: Tensor) -> None:
    if image.shape[0] != spatial.shape[0]:
        fact = f"{image.shape[0]} and {spatial.shape[0]}"
        raise ValueError(f"{head}: image and spatial must have the same B, got {fact}")


def check_dtype(head: str, name: str, x: Tensor, dtype: torch.dtype) -> None:
    # autocast brings every operand to its own type, so there any float type will do
    if x.is_floating_point() and torch.is_autocast_enabled(x.device.type):
        return
    if x.dtype != dtype:
        raise TypeError(f"{head}: {name} must be {dtype} like the head, got {x.dtype}")
