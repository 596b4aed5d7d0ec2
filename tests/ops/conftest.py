# SPDX-License-Identifier: Apache-2.0
"""The one comparison every operator's table of cases goes through."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from layouts import ATTENTION_LAYOUTS, LAYOUTS
from torch import Tensor

from vtclip import testing

# (inputs in float64, output gradients, fixed arguments) -> magnitude of the terms that cancel
Floor = Callable[[dict[str, Tensor], list[Tensor], dict[str, object]], dict[str, float]]
Op = Callable[..., Tensor | tuple[Tensor, ...]]
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32-tf32": torch.float32,
}


def _run(
    op: Op,
    inputs: dict[str, Tensor],
    fixed: dict[str, object],
    impl: str,
    seeds: list[Tensor] | None,
) -> tuple[list[Tensor], dict[str, Tensor], list[Tensor]]:
    # outputs, gradients by name, and the output gradients used (drawn when none are given)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
    result = op(*leaves.values(), **fixed, impl=impl)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    if seeds is None:
        seeds = [torch.randn(out.shape, dtype=torch.float32).to(out) for out in outputs]
    # an output that is constant by definition has no gradient in the reference
    pairs = [(o, s.to(o)) for s, o in zip(seeds, outputs, strict=True) if o.requires_grad]
    grads = torch.autograd.grad([o for o, _ in pairs], list(leaves.values()), [s for _, s in pairs])
    return [out.detach() for out in outputs], dict(zip(leaves, grads, strict=True)), seeds


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
        dtype = next(iter(inputs.values())).dtype
        with testing.tf32_products() if _tf32() else contextlib.nullcontext():
            peer_out, peer_grads, seeds = _run(op, inputs, fixed, "reference", None)
        wide = {name: tensor.double() for name, tensor in inputs.items()}
        wide_fixed = {
            k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in fixed.items()
        }
        oracle_out, oracle_grads, _ = _run(op, wide, wide_fixed, "reference", seeds)
        cancelling = floor(wide, seeds, wide_fixed) if floor else {}
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        fixed = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in fixed.items()}
        saved = {name: tensor.clone() for name, tensor in inputs.items()}
        out, grads, _ = _run(op, inputs, fixed, impl, seeds)
        for i, (actual, oracle, peer) in enumerate(zip(out, oracle_out, peer_out, strict=True)):
            testing.assert_within_budget(
                actual.to(home),
                oracle,
                peer,
                name=f"output {i}",
                floor=torch.finfo(dtype).eps * cancelling.get(f"output {i}", 0.0),
            )
        for name, actual in grads.items():
            testing.assert_within_budget(
                actual.to(home),
                oracle_grads[name],
                peer_grads[name],
                factor=testing.GRADIENT_FACTOR,
                name=f"grad_{name} ({dtype})",
                floor=torch.finfo(dtype).eps * cancelling.get(name, 0.0),
            )
        for name, before in saved.items():
            assert torch.equal(inputs[name], before) or before.isnan().any(), f"{name} was written"

    return check
