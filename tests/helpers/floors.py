# SPDX-License-Identifier: Apache-2.0
"""The room for terms that cancel, by operator, as its own file in tests/ops has it."""

from __future__ import annotations

import functools
import importlib.util
import inspect
from pathlib import Path
from types import ModuleType

import torch
from op_budget import Floor
from torch import Tensor

from vtclip.testing.problems import Function

OPS = Path(__file__).parents[1] / "ops"
NAMES = ("cancelling_everywhere", "cancelling", "edges")


@functools.cache
def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"floors_of_{name}", OPS / f"test_{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def floor_of(call: Function, exact: bool = True) -> Floor | None:
    """Of a public function whose tensors go by the names of its operator's arguments.

    Not `exact`: of an implementation that rounds scores once more, before the exponential.
    """
    module = _module(call.op.name)
    for name in NAMES:
        if hasattr(module, name):
            floor = getattr(module, name)
            if "exact" in inspect.signature(floor).parameters:
                floor = functools.partial(floor, exact=exact)
            floor = _by_short_names(floor)
            return _in_float32(floor) if call.op.name == "unit_products" else floor
    return None


def _in_float32(floor: Floor) -> Floor:
    """Where 16-bit results are rounded once, from float32."""

    def scaled(
        inputs: dict[str, Tensor], seeds: list[Tensor], fixed: dict[str, object]
    ) -> dict[str, float]:
        dtype = seeds[0].dtype
        step = torch.finfo(torch.promote_types(dtype, torch.float32)).eps / torch.finfo(dtype).eps
        return {name: step * size for name, size in floor(inputs, seeds, fixed).items()}

    return scaled


def _by_short_names(floor: Floor) -> Floor:
    """The floor of test_rational_attn calls the image's query "image"."""

    def renamed(
        inputs: dict[str, Tensor], seeds: list[Tensor], fixed: dict[str, object]
    ) -> dict[str, float]:
        if "pairs" in inputs:
            parts = inputs["pairs"].permute(2, 0, 3, 1, 4).unbind()
            inputs = {**inputs, **dict(zip(("pair_query", "key", "value"), parts, strict=True))}
            del inputs["pairs"]
        short = {name.removesuffix("_query"): tensor for name, tensor in inputs.items()}
        rational = "text_query" in inputs
        sizes = floor(short if rational else inputs, seeds, fixed)
        return (
            sizes
            | {f"{name}_query": size for name, size in sizes.items()}
            | {"pairs": max(sizes.get(name, 0.0) for name in ("pair", "key", "value"))}
        )

    return renamed
