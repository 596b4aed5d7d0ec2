# SPDX-License-Identifier: Apache-2.0
"""What the package offers to programs and to the command line: `fit`, `evaluate`, features."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from vtclip.data.records import Records
from vtclip.distributed import device_of_rank, joined
from vtclip.evaluate_run import evaluate
from vtclip.fit_run import fit
from vtclip.result import Run
from vtclip.settings import choose_device, set_threads

__all__ = ["Run", "evaluate", "fit", "write_features"]


def write_features(
    source: str | Path,
    out: str | Path,
    *,
    model: str = "demo",
    spatial: str | None = "default",
    templates: Sequence[str] | None = None,
    augment_passes: int = 0,
    device: str | torch.device | None = None,
    threads: int | None = None,
    progress: bool = False,
) -> Records:
    """Features of an image folder in the folder `out`, which `fit` then takes as its source.

    Processes that torchrun started share the work, and each answers the same.
    """
    from vtclip.data.extract import extract_features

    set_threads(threads)
    where = choose_device(device)
    named = device is not None and torch.device(device).index is not None
    where = device_of_rank(where, named)
    with joined(where) as world:
        found, _ = extract_features(
            source,
            out,
            model=model,
            spatial=spatial,
            templates=None if templates is None else list(templates),
            augment_passes=augment_passes,
            device=where,
            progress=progress and world.first,
            world=world,
        )
    return found.records()
