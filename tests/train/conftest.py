# SPDX-License-Identifier: Apache-2.0
"""A small table of features on which VT-CLIP has something to learn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vtclip.data.records import Records

K, C, L, PER_CLASS = 4, 16, 9, 24


def arrays() -> dict[str, np.ndarray]:
    """Global features halfway between two classes; one of the nine tokens tells which it is."""
    generator = torch.Generator().manual_seed(7)
    text = F.normalize(torch.randn(K, C, generator=generator), dim=-1)
    label = torch.arange(K).repeat_interleave(PER_CLASS)
    noise = torch.randn(len(label), C, generator=generator) * 0.15
    image = text[label] + 0.9 * text[(label + 1) % K] + noise
    spatial = torch.randn(len(label), L, C, generator=generator) * 0.2
    spatial[torch.arange(len(label)), torch.arange(len(label)) % L] += 2 * text[label]
    return {
        "image": image.numpy(),
        "label": label.numpy(),
        "text": text.numpy(),
        "classname": np.array(["ant", "bee", "cat", "dog"]),
        "spatial": spatial.numpy(),
        "temperature": np.float32(np.log(20.0)),
    }


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """These tensors are tiny; several processes with spinning threads lose a thousandfold."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def npz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "animals.npz"
    np.savez(path, **arrays())
    return path


@pytest.fixture(scope="session")
def records() -> Records:
    data = {
        name: torch.from_numpy(np.asarray(value))
        for name, value in arrays().items()
        if name != "classname"
    }
    return Records.from_tensors(
        data["image"],
        data["label"],
        data["text"],
        ["ant", "bee", "cat", "dog"],
        spatial=data["spatial"],
        logit_scale=20.0,
    )
