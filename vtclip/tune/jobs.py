# SPDX-License-Identifier: Apache-2.0
"""What `vtclip tune` times: launcher calls of the shapes of both methods' published settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from vtclip.backends.triton import launcher_of
from vtclip.testing.problems import OPS, Op, tensors_of
from vtclip.tune.search import Call, TileJob

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


def _jobs_of(
    op: Op, variant: str, sizes: dict[str, int], dtype: torch.dtype, device: str
) -> Iterator[TileJob]:
    """Jobs of the forward launcher of an operator, and of its backward on what that returns."""

    def draw() -> dict[str, Any]:
        return op.draw(sizes, variant=variant, dtype=dtype, device=device, heads_inside=True)

    def forward() -> Call:
        arguments = op.forward_arguments(draw())
        return lambda: tensors_of(launcher_of(f"{op.name}_fwd")(*arguments))

    def backward() -> Call:
        inputs = draw()
        outputs = tensors_of(launcher_of(f"{op.name}_fwd")(*op.forward_arguments(inputs)))
        arguments = op.backward_arguments(inputs, outputs)
        return lambda: tensors_of(launcher_of(f"{op.name}_bwd")(*arguments))

    yield TileJob(f"{op.name}_fwd", forward)
    yield TileJob(f"{op.name}_bwd", backward)


# Operators of a method's head, in the variant that training calls; matrix products are torch's.
OPERATORS = {
    "vtclip": {
        "cross_attn": "lse unused",
        "cross_attn_weights": "",
        "norm_cosine_logits": "",
        "ffn_cosine_logits": "features frozen",
        "cosine_logits": "",
    },
    "rada": {
        "rational_attn": "",
        "rational_head": "mse, features frozen",
        "unit_products": "",
        "rational_logits": "",
    },
}
HIDDEN_UNITS = 64  # few: tiles do not depend on them, torch.mm's time does


def jobs(method: str, sizes: dict[str, int], dtype: torch.dtype, device: str) -> list[TileJob]:
    """All jobs of one method at one list of sizes."""
    width = sizes["C" if method == "vtclip" else "D"]
    letters = {**sizes, "C": width, "D": width, "d": width // sizes["H"], "F": HIDDEN_UNITS}
    return [
        job
        for name, variant in OPERATORS[method].items()
        for job in _jobs_of(OPS[name], variant, letters, dtype, device)
    ]
