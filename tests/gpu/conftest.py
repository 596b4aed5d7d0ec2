# SPDX-License-Identifier: Apache-2.0
"""What only a device can show; VTCLIP_GPU_REHEARSE=1 runs the same code on CPU at tiny sizes.

The operators and their inputs come from `vtclip.testing.problems`.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vtclip import testing
from vtclip.ops._select import Problem, select
from vtclip.testing.problems import FUNCTIONS
from vtclip.testing.selftest_worker import parts, step

REHEARSE = os.environ.get("VTCLIP_GPU_REHEARSE") == "1"
TINY = {"B": 2, "K": 4, "L": 5, "H": 1, "d": 8, "C": 16}
NAMES = tuple(FUNCTIONS)


@pytest.fixture(autouse=True)
def _device_is_there() -> None:
    if not torch.cuda.is_available() and not REHEARSE:
        pytest.skip("no CUDA device")


@pytest.fixture(params=("triton", "cuda"))
def impl(request: pytest.FixtureRequest) -> str:
    """The implementations that have device code; in a rehearsal Triton's interpreter."""
    name: str = request.param
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("cuda: no CUDA device")
    return name


@pytest.fixture
def device() -> torch.device:
    """The first CUDA device, or the CPU that stands in for it."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    """Every public operator."""
    return request.param


class Call:
    """One public operator of an implementation, on inputs it draws."""

    def __init__(self, name: str, device: torch.device, impl: str) -> None:
        self.op = FUNCTIONS[name]
        self.name, self.device, self.impl = name, device, impl

    def draw(
        self, dtype: torch.dtype = torch.float32, sizes: dict[str, int] | None = None
    ) -> list[Tensor]:
        """Leaves, other ones with each call; skips what the implementation refuses."""
        wanted = TINY if REHEARSE or sizes is None else sizes
        letters = {"F": 4, "D": wanted["C"], **wanted}
        drawn = self.op.draw(letters, dtype=dtype, device=self.device, seed=None)
        problem = Problem(self.op.op.name, self.device.type, dtype, drawn[-1].shape[-1])
        try:
            select(problem, self.impl)  # type: ignore[arg-type]
        except NotImplementedError as refused:
            pytest.skip(str(refused))
        return drawn

    def run(self, leaves: list[Tensor], impl: str | None = None) -> list[Tensor]:
        """The outputs, and gradients for output gradients that differ from row to row."""
        return step(self.op, leaves, impl or self.impl)

    def within_budget(self, found: list[Tensor], leaves: list[Tensor], what: str = "") -> None:
        """Outputs and gradients against the reference: float64 as oracle, the dtype as peer."""
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
        if tf32:
            with testing.tf32_products():
                peer = self.run(leaves, "reference")
        else:
            peer = self.run(leaves, "reference")
        wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
        oracle = self.run(wide, "reference")
        found_parts = parts(found, oracle, peer, leaves, f"{self.name}{what}")
        assert [part.wrong for part in found_parts if part.wrong] == []


@pytest.fixture
def call(name: str, device: torch.device, impl: str) -> Call:
    """The operator `name` of implementation `impl` on `device`."""
    return Call(name, device, impl)


@pytest.fixture
def need_memory(device: torch.device) -> Callable[[float], None]:
    """A function that skips where less than so many GiB of device memory are free."""

    def check(gib: float) -> None:
        if device.type != "cuda":
            pytest.skip(f"needs {gib:g} GiB of device memory, there is no CUDA device")
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0] / 2**30
        if free < gib:
            pytest.skip(f"needs {gib:g} GiB of device memory, {free:.1f} are free")

    return check
