# SPDX-License-Identifier: Apache-2.0
"""Tip-Adapter-F: Tip-Adapter with trained keys."""

from __future__ import annotations

from vtclip.config import FitConfig


def get_config(shots: int) -> FitConfig:
    """AdamW with the published rate, epsilon and epochs; alpha and beta by validation after it.

    The published batch of 256 is one step per epoch on few classes. On images that neither train
    nor test, satellite photos of 19 classes, 32 instead gains 1.2 points with 16 shots (ViT-B/32
    and RN50, mean of six draws) and loses up to 0.9 with 4.
    """
    return FitConfig(
        epochs=20,
        optimizer="adamw",
        lr=1e-3,
        eps=1e-4,
        weight_decay=1e-2,
        batch_size=32,
        warmup="linear",
    )
