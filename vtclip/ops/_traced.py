# SPDX-License-Identifier: Apache-2.0
"""What torch.compile sees of operators whose gradients can be differentiated again.

Dynamo traces the backward of an `autograd.Function` into a graph that runs without grad mode: under
create_graph the gradients have no graph, and a second derivative is silently missing. It does not
look into an operator of torch.library. Backends that compile autograd (AOTAutograd, Inductor) take
such an operator apart as they trace; others run it, and torch differentiates it as always.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from vtclip.backends.problem import constant_when_traced
from vtclip.backends.schemas import argument_types
from vtclip.ops._select import BACKENDS

Code = TypeVar("Code", bound=Callable[..., Any])


def never_compiled(function: Code) -> Code:
    """The function, which Dynamo runs as it is, with all that it calls.

    `torch.compiler.disable` does so too, and imports torch._dynamo. A backward that runs inside a
    compiled function would be compiled itself, and the tensors that it makes would have no graph.
    """
    try:
        dynamo = torch._C._dynamo.eval_frame
        skip = dynamo._FrameAction.SKIP  # of this frame, and of those below it
        dynamo.set_code_exec_strategy(function.__code__, dynamo._FrameExecStrategy(skip, skip))
    except (AttributeError, TypeError):  # names of torch's own, which another version may lack
        disabled: Code = torch.compiler.disable(function)  # type: ignore[no-untyped-call, unused-ignore]
        return disabled
    return function


def define_traced(
    name: str, forward: Callable[..., Any], results: int, apply: Callable[..., Any]
) -> None:
    """Defines `vtclip::name` for `apply`, which takes what `forward` does: a backend at the end.

    The operator takes the backend's name. `results` is the number of tensors it returns.
    """
    *operands, _ = inspect.signature(forward).parameters.values()
    returned = "Tensor" if results == 1 else f"({', '.join(['Tensor'] * results)})"
    schema = f"({', '.join([*argument_types(operands), 'str impl'])}) -> {returned}"
    backends = {backend.name: backend for backend in BACKENDS}

    def run(*arguments: Any) -> Any:
        *inputs, impl = arguments
        return apply(*inputs, backends[impl])

    torch.library.define(f"vtclip::{name}", schema)
    torch.library.impl(f"vtclip::{name}", "CompositeImplicitAutograd", run)


@constant_when_traced  # Dynamo of torch 2.11 takes it for true in whatever it traces
def is_exported() -> bool:
    """Whether torch.export traces: its programs hold the operators of the forward alone."""
    return torch.compiler.is_exporting()


def wants_gradients(tensors: Iterable[object]) -> bool:
    """Whether a traced call will be differentiated."""
    if not torch.is_grad_enabled() or is_exported():
        return False
    return any(isinstance(tensor, Tensor) and tensor.requires_grad for tensor in tensors)
