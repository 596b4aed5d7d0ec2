# SPDX-License-Identifier: Apache-2.0
"""The one comparison every operator's table of cases goes through."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vtclip import testing

# (inputs in float64, output gradients, fixed arguments) -> magnitude of the terms that cancel
Floor = Callable[[dict[str, Tensor], list[Tensor], dict[str, object]], dict[str, float]]
Op = Callable[..., Tensor | tuple[Tensor, ...]]
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


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


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Every dtype the operators accept."""
    return request.param


@pytest.fixture
def compare(impl: str, device: str) -> Callable[..., None]:
    """Outputs and every gradient of `impl` within budget of the float64 reference."""

    def check(
        op: Op, inputs: dict[str, Tensor], floor: Floor | None = None, **fixed: object
    ) -> None:
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        fixed = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in fixed.items()}
        dtype = next(iter(inputs.values())).dtype
        peer_out, peer_grads, seeds = _run(op, inputs, fixed, "reference", None)
        wide = {name: tensor.double() for name, tensor in inputs.items()}
        wide_fixed = {
            k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in fixed.items()
        }
        oracle_out, oracle_grads, _ = _run(op, wide, wide_fixed, "reference", seeds)
        cancelling = floor(wide, seeds, wide_fixed) if floor else {}
        saved = {name: tensor.clone() for name, tensor in inputs.items()}
        out, grads, _ = _run(op, inputs, fixed, impl, seeds)
        for i, (actual, oracle, peer) in enumerate(zip(out, oracle_out, peer_out, strict=True)):
            testing.assert_within_budget(
                actual,
                oracle,
                peer,
                name=f"output {i}",
                floor=torch.finfo(dtype).eps * cancelling.get(f"output {i}", 0.0),
            )
        for name, actual in grads.items():
            testing.assert_within_budget(
                actual,
                oracle_grads[name],
                peer_grads[name],
                factor=testing.GRADIENT_FACTOR,
                name=f"grad_{name} ({dtype})",
                floor=torch.finfo(dtype).eps * cancelling.get(name, 0.0),
            )
        for name, before in saved.items():
            assert torch.equal(inputs[name], before) or before.isnan().any(), f"{name} was written"

    return check
