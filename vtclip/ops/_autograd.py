# SPDX-License-Identifier: Apache-2.0
"""What the `autograd.Function` of every operator shares."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from vtclip.backends.schemas import FAKES

Forward = TypeVar("Forward", bound=Callable[..., Any])


class _Bound:
    """What torch reads of `inspect.BoundArguments`."""

    kwargs: dict[str, Any] = {}

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.args = args

    def apply_defaults(self) -> None:
        pass


class _Positional(inspect.Signature):
    """Binds a call that gives every parameter by position without looking for the others."""

    def __init__(self, signature: inspect.Signature) -> None:
        parameters = list(signature.parameters.values())
        super().__init__(parameters, return_annotation=signature.return_annotation)
        self.named = sum(parameter.kind != parameter.VAR_POSITIONAL for parameter in parameters)
        self.takes_more = self.named < len(parameters)  # has a parameter such as *tensors

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or not (len(args) == self.named or (self.takes_more and len(args) > self.named)):
            return super().bind(*args, **kwargs)
        return _Bound(args)


def bound_once(forward: Forward) -> Forward:
    """Keeps the signature of an `autograd.Function.forward`, which torch binds in every call."""
    forward.__signature__ = _Positional(inspect.signature(forward))  # type: ignore[attr-defined]
    return forward


def forward_of(op: str) -> Any:
    """`forward` of an `autograd.Function`: `op`_fwd of all inputs but the last, the backend.

    It has the parameters of the schema: where no gradient is wanted, Dynamo counts them to see
    that a context is not among them. It does not trace a closure here.
    """

    def forward(*inputs: Any, name: str = f"{op}_fwd") -> Any:
        *operands, backend = inputs
        return backend.function(name)(*operands)

    operands = inspect.signature(FAKES[f"{op}_fwd"]).parameters.values()
    backend = inspect.Parameter("backend", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    signature = _Positional(inspect.Signature([*operands, backend]))
    forward.__signature__ = signature  # type: ignore[attr-defined]
    return staticmethod(forward)


def only_needed(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    """What a backward returns: `grads` of the first inputs where asked for, else None."""
    needs = ctx.needs_input_grad
    requested = [grad if need else None for grad, need in zip(grads, needs, strict=False)]
    return (*requested, *(None,) * (len(needs) - len(grads)))
