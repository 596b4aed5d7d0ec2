# SPDX-License-Identifier: Apache-2.0
"""What `vtclip tune` times: launcher calls of the shapes of both methods' published settings."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from vtclip.tune import Call, Job

# sizes by the names a user gives: VT-CLIP over RN50's and ViT-B/16's tokens, RAda; B is a batch
VTCLIP_SHAPES = (
    {"B": 32, "K": 100, "C": 1024, "L": 49, "H": 8},
    {"B": 8, "K": 100, "C": 1024, "L": 49, "H": 8},
    {"B": 32, "K": 100, "C": 1024, "L": 196, "H": 8},
    {"B": 32, "K": 100, "C": 512, "L": 196, "H": 8},
    {"B": 8, "K": 100, "C": 1024, "L": 576, "H": 8},
    {"B": 32, "K": 1000, "C": 1024, "L": 49, "H": 8},
    {"B": 128, "K": 1000, "C": 512, "L": 196, "H": 8},
)
RADA_SHAPES = (
    {"B": 32, "K": 50, "D": 512, "H": 8},
    {"B": 8, "K": 500, "D": 512, "H": 8},
    {"B": 32, "K": 500, "D": 512, "H": 8},
    {"B": 32, "K": 1000, "D": 512, "H": 8},
)
SHAPES = {"vtclip": VTCLIP_SHAPES, "rada": RADA_SHAPES}
NAMES = {method: tuple(shapes[0]) for method, shapes in SHAPES.items()}


def _launcher(name: str) -> Callable[..., Any]:
    module = f"vtclip.kernels.{name.removesuffix('_fwd').removesuffix('_bwd')}"
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def _tensors(results: Any) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def _pair(
    name: str, draw: Callable[[], tuple[Any, ...]], after: Callable[..., tuple[Any, ...]]
) -> Iterator[Job]:
    """Jobs of a forward launcher on `draw()` and of its backward on `after(inputs, results)`."""

    def forward() -> Call:
        inputs = draw()
        return lambda: _tensors(_launcher(f"{name}_fwd")(*inputs))

    def backward() -> Call:
        inputs = draw()
        results = _tensors(_launcher(f"{name}_fwd")(*inputs))
        arguments = after(inputs, results)
        return lambda: _tensors(_launcher(f"{name}_bwd")(*arguments))

    yield Job(f"{name}_fwd", forward)
    yield Job(f"{name}_bwd", backward)


def vtclip_jobs(
    dtype: torch.dtype, device: str, B: int, K: int, C: int, L: int, H: int
) -> Iterator[Job]:
    """The kernels of a VT-CLIP head; its matrix products are torch's."""

    def new(*shape: int) -> Tensor:
        return torch.randn(shape, device=device).to(dtype)

    d = C // H

    def heads(rows: int, batch: int) -> Tensor:  # memory [B, rows, H, d], as a projection leaves it
        return new(batch, rows, H, d).transpose(1, 2)

    yield from _pair(
        "cross_attn",
        lambda: (heads(K, 1), heads(L, B), heads(L, B), None, d**-0.5),
        lambda given, out: (out[0], None, *given[:4], *out, given[4]),
    )
    yield from _pair(
        "cross_attn_weights",
        lambda: (heads(K, 1), heads(L, B), None, d**-0.5),
        lambda given, out: (out[0], out[0], *given[:2], given[3]),
    )
    yield from _pair(
        "norm_cosine_logits",
        lambda: (new(B, K, C), new(C), new(C), new(K, C), new(B, C), 1.0, 100.0, 1e-5),
        lambda given, out: (out[0], *given[:5], *out, *given[5:]),
    )
    yield from _pair(
        "cosine_logits",
        lambda: (new(B, C), new(K, C), 100.0),
        lambda given, out: (out[0], *given[:2], *out[1:], given[2]),
    )


def rada_jobs(dtype: torch.dtype, device: str, B: int, K: int, D: int, H: int) -> Iterator[Job]:
    """The kernels of a RAda head with its three queries."""

    def new(*shape: int, size: float = 1.0) -> Tensor:
        return (size * torch.randn(shape, device=device)).to(dtype)

    d = D // H

    def heads(rows: int, batch: int) -> Tensor:
        return new(batch, rows, H, d).transpose(1, 2)

    yield from _pair(
        "rational_attn",
        lambda: (
            *(heads(1, B), heads(K, 1), heads(K, B), heads(K, B), heads(K, B)),
            d**-0.5,
            True,
        ),  # fmt: skip
        lambda given, out: (out[0], *given[:5], *out[1:], given[5]),
    )
    unit = D**-0.5
    yield from _pair(
        "rational_head",
        lambda: (
            *(new(B, K, D), new(D, D, size=unit), new(D, size=0.1)),
            *(new(B, D, size=unit), new(K, D, size=unit), 100.0, 2),
        ),
        lambda given, out: (out[0], out[1], *given[:5], out[2], 100.0, 2, False),
    )
    yield from _pair(
        "unit_products",
        lambda: (new(B, D), new(K, D), 100.0),
        lambda given, out: (*out, *given),
    )
    yield from _pair(
        "rational_logits",
        lambda: (new(B, D), new(K, D), new(B, K, D), 100.0),
        lambda given, out: (out[0], *given),
    )


JOBS = {"vtclip": vtclip_jobs, "rada": rada_jobs}


def jobs(method: str, sizes: dict[str, int], dtype: torch.dtype, device: str) -> list[Job]:
    """All jobs of one method at one list of sizes."""
    make: Any = JOBS[method]
    return list(make(dtype, device, **sizes))
