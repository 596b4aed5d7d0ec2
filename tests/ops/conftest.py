# SPDX-License-Identifier: Apache-2.0
"""The one comparison every operator's table of cases goes through."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from layouts import ATTENTION_LAYOUTS, LAYOUTS
from op_budget import Floor, Op, out_of_budget
from torch import Tensor

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32-tf32": torch.float32,
}


@pytest.fixture
def inputs(request: pytest.FixtureRequest, device: str, runnable: Callable) -> dict[str, Tensor]:
    """The ordinary case in float32 of the operator that the file is about, where `impl` runs."""
    drawn = request.module.draw("ordinary")
    width = drawn["image" if "image" in drawn else "query"].shape[-1]
    runnable(request.module.__name__.rpartition("test_")[2], torch.float32, width)
    return {name: tensor.to(device) for name, tensor in drawn.items()}


@pytest.fixture(params=LAYOUTS)
def layout(request: pytest.FixtureRequest) -> Callable[[Tensor], Tensor]:
    """A function that lays the elements of a tensor out in another way."""
    return LAYOUTS[request.param]


@pytest.fixture(params=ATTENTION_LAYOUTS)
def attention_layout(request: pytest.FixtureRequest) -> Callable[[Tensor], Tensor]:
    """The same for tensors [B, H, L, d]."""
    return ATTENTION_LAYOUTS[request.param]


@pytest.fixture
def refuses() -> Callable[..., None]:
    """A function that holds a call to an error of one line, which begins with the operator."""

    def check(
        error: type[Exception], message: str, op: Op, *args: object, **kwargs: object
    ) -> None:
        with pytest.raises(error, match=message) as caught:
            op(*args, **kwargs)
        assert str(caught.value).startswith(f"{op.__name__}: ")
        assert "\n" not in str(caught.value)

    return check


def _tf32() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


@pytest.fixture(params=DTYPES)
def dtype(request: pytest.FixtureRequest, device: str) -> Iterator[torch.dtype]:
    """Every dtype the operators accept; float32 a second time with TF32 allowed."""
    name: str = request.param
    if name == "float32-tf32" and device != "cuda":
        pytest.skip("float32-tf32: no CUDA device runs this")
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if name == "float32-tf32" else "ieee"
    yield DTYPES[name]
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.fixture
def compare(impl: str, device: str) -> Callable[..., None]:
    """Outputs and every gradient of `impl` within budget of the float64 reference.

    Oracle and peer are the reference on the device of `impl`; for the reference itself on CPU.
    With TF32 allowed, the peer's products take operands of that precision, whatever the library
    behind torch.matmul chooses for a shape.
    """
    home = "cpu" if impl == "reference" else device

    def check(
        op: Op, inputs: dict[str, Tensor], floor: Floor | None = None, **fixed: object
    ) -> None:
        inputs = {name: tensor.to(home) for name, tensor in inputs.items()}
        fixed = {k: v.to(home) if isinstance(v, Tensor) else v for k, v in fixed.items()}
        wrong = out_of_budget(op, inputs, impl, floor=floor, tf32=_tf32(), device=device, **fixed)
        assert not wrong, "\n".join(wrong)

    return check
