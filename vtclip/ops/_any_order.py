# SPDX-License-Identifier: Apache-2.0
"""Derivatives of any order, `vmap` and forward mode for operators that have kernels.

A kernel's backward reads what its forward kept (log-sum-exp, norms) as if they were constants, so
its result cannot be differentiated again. The reference can, from the inputs alone: where a graph
of the backward is wanted, the backward becomes a step of that graph whose value comes from the
kernel and whose own backward recomputes through the reference.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from vtclip.backends.problem import constant_when_traced
from vtclip.ops._traced import define_traced, never_compiled, wants_gradients

_STORES: dict[str, str] = {}  # operator -> what recomputing stores
_WARNED: set[str] = set()  # operators, and options of theirs, that have said so


class _Saved:
    """A context of a forward with other saved tensors, for a backward that runs apart from it."""

    def __init__(self, ctx: Any, tensors: tuple[Tensor | None, ...]) -> None:
        self._ctx, self.saved_tensors = ctx, tensors

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


class _Constants:
    """A context that keeps numbers and drops tensors."""

    def _nothing(self, *_: Any) -> None:
        pass

    save_for_backward = mark_non_differentiable = set_materialize_grads = _nothing


def _say_once(key: str, text: str, stacklevel: int) -> None:
    if key not in _WARNED:
        _WARNED.add(key)
        warnings.warn(f"{text}; said once", stacklevel=stacklevel)


def _warn(name: str) -> None:
    """Says once per process and operator what recomputing costs."""
    text = "second derivatives, vmap and forward mode recompute through"
    _say_once(name, f'{name}: {text} impl="reference", which stores {_STORES[name]}', stacklevel=4)


@constant_when_traced
def warn_of_reference(op: str, option: str, stores: str) -> None:
    """Says once per process, operator and option that the reference runs, and what it stores."""
    text = f'{op}: {option} runs through impl="reference", which stores {stores}'
    _say_once(f"{op} {option}", text, stacklevel=6)


@constant_when_traced
def is_transformed() -> bool:
    """Whether torch.func or forward mode watch what runs now."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


@constant_when_traced
def _traced_by_reference(name: str) -> bool:
    """Whether a traced call may be differentiated twice in its graph, or in ways kernels cannot."""
    if not (is_transformed() or getattr(torch._dynamo.config, "trace_autograd_ops", False)):
        return False
    _warn(name)
    return True


class AnyOrder:
    """An operator of `any_order`.

    kernels: the Function, differentiable once.
    again: the same, with a backward that is a step of a graph where one is wanted.
    everywhere: that with `vmap` and forward mode, which need copies and inputs kept.
    reference: (ctx, *inputs) -> outputs.
    inputs, outputs, statistics: numbers of tensors; see `any_order`.
    """

    def __init__(
        self, name: str, kernels: Any, reference: Callable[..., Any], outputs: int, statistics: int
    ) -> None:
        self.name, self.kernels, self.reference = name, kernels, reference
        self.inputs = len(inspect.signature(reference).parameters) - 1
        self.outputs, self.statistics = outputs, statistics
        name = kernels.__name__
        self.again: Any = type(name, (kernels,), {"backward": _backward_again(self)})
        self.everywhere: Any = type(name, (self.again,), _transformed_members(self))
        define_traced(self.name, kernels.forward, outputs + statistics, self._eagerly)

    def apply(self, *arguments: Any) -> Any:
        """`Function.apply`.

        A traced call that wants gradients is one operator in the graph; see `_traced`. Where
        torch.func is traced too, the reference is, which may be differentiated as often as the
        graph says.
        """
        if not torch.compiler.is_compiling():
            return (self.everywhere if is_transformed() else self.again).apply(*arguments)
        if not _traced_by_reference(self.name):
            if not wants_gradients(arguments[: self.inputs]):
                return self.kernels.apply(*arguments)
            *operands, backend = arguments
            return getattr(torch.ops.vtclip, self.name)(*operands, backend.name)
        results = self.of_inputs(arguments)(*arguments[: self.inputs])
        if self.outputs + self.statistics == 1:
            return results[0]
        return (*results, *(None,) * self.statistics)

    def _eagerly(self, *arguments: Any) -> Any:
        return (self.everywhere if is_transformed() else self.again).apply(*arguments)

    def by_reference(self, ctx: Any, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        """The outputs of the reference, without autocast: the inputs have their dtype."""
        device = next(tensor for tensor in inputs if tensor is not None).device.type
        with torch.autocast(device, enabled=False):
            results = self.reference(ctx, *inputs)
        return (results,) if isinstance(results, Tensor) else tuple(results)

    def of_inputs(self, arguments: tuple[Any, ...]) -> Callable[..., tuple[Tensor, ...]]:
        """The reference as a function of the inputs, with the constants of these arguments."""
        ctx = _Constants()
        results = (None,) * (self.outputs + self.statistics)
        self.kernels.setup_context(ctx, arguments, results)
        return partial(self.by_reference, ctx)


class _Backward(NamedTuple):
    """One backward: gradients of the inputs `wanted` from those of the outputs and the inputs."""

    operator: AnyOrder
    ctx: Any  # of the forward, for its constants
    wanted: tuple[int, ...]

    def by_kernel(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """From gradients of the outputs, inputs and statistics."""
        outputs = self.operator.outputs
        saved = _Saved(self.ctx, tensors[outputs:])
        no_grads = (None,) * self.operator.statistics
        grads = self.operator.kernels.backward(saved, *tensors[:outputs], *no_grads)
        return tuple(grads[i] for i in self.wanted)

    def by_reference(self, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        """From gradients of the outputs and inputs, differentiable."""
        operator = self.operator
        grads, inputs = tensors[: operator.outputs], tensors[operator.outputs :]
        return _vjp(partial(operator.by_reference, self.ctx), inputs, self.wanted, grads)


def _vjp(
    function: Callable[..., tuple[Tensor, ...]],
    tensors: Sequence[Tensor | None],
    wanted: Sequence[int],
    seeds: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    """Gradients of function(*tensors) by those `wanted`, differentiable in tensors and seeds."""

    def of_wanted(*chosen: Tensor) -> tuple[Tensor, ...]:
        arguments = list(tensors)
        for i, tensor in zip(wanted, chosen, strict=True):
            arguments[i] = tensor
        return function(*arguments)

    chosen: list[Any] = [tensors[i] for i in wanted]
    if torch._C._are_functorch_transforms_active():
        values, pull = torch.func.vjp(of_wanted, *chosen)[:2]
        filled = zip(values, seeds, strict=True)
        found = pull(tuple(torch.zeros_like(v) if seed is None else seed for v, seed in filled))
        return tuple(found)
    # torch.func refuses to run where saved tensors have hooks, as under checkpoints
    keep = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = [
            t.view_as(t) if keep and t.requires_grad else t.detach().requires_grad_()
            for t in chosen
        ]
        results = zip(of_wanted(*leaves), seeds, strict=True)
        pairs = [(v, seed) for v, seed in results if v.requires_grad and seed is not None]
        if not pairs:
            return tuple(torch.zeros_like(leaf) for leaf in leaves)
        return torch.autograd.grad(
            [value for value, _ in pairs], leaves, [seed for _, seed in pairs],
            create_graph=keep, allow_unused=True, materialize_grads=True,
        )  # fmt: skip


def _jvp(
    function: Callable[..., tuple[Tensor, ...]],
    tensors: Sequence[Tensor | None],
    tangents: Sequence[Tensor | None],
) -> tuple[Tensor, ...]:
    """The derivative of function(*tensors) along the tangents.

    By two backwards, as forward mode does not nest: a vjp is linear in its seeds, and the
    derivative by them is the transposed Jacobian's transpose.
    """
    along = [i for i, tangent in enumerate(tangents) if tangent is not None]
    unpack: Any = forward_ad.unpack_dual
    primals = [None if tensor is None else unpack(tensor).primal for tensor in tensors]

    def pulled(*some: Tensor) -> tuple[Tensor, ...]:
        return _vjp(function, primals, along, some)

    # torch switches forward mode off in here, and with it that of the transforms outside
    with forward_ad._set_fwd_grad_enabled(torch._C._are_functorch_transforms_active()):
        with torch.no_grad():
            seeds = [torch.zeros_like(value) for value in function(*primals)]
        return _vjp(pulled, seeds, range(len(seeds)), [tangents[i] for i in along])


def _copies(results: Any) -> Any:
    """Copies, since forward mode wants tangents laid out as a result that is a view."""
    if isinstance(results, Tensor):
        return results.clone()
    return tuple(result.clone() for result in results)


class _Gradients(Function):
    """The kernel's backward as a step of a graph, whose derivative is that of the reference."""

    @staticmethod
    def forward(backward: _Backward, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        results = backward.by_kernel(*tensors)
        return results if forward_ad._current_level < 0 else _copies(results)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.call, *tensors = inputs
        operator = ctx.call.operator
        tensors = tensors[: operator.outputs + operator.inputs]
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        if is_transformed():
            ctx.save_for_forward(*tensors)

    @staticmethod
    @never_compiled
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        _, *needs = ctx.needs_input_grad
        results: list[Tensor | None] = [None] * len(needs)
        tensors = ctx.saved_tensors
        wanted = [i for i in range(len(tensors)) if needs[i]]
        if wanted and any(grad is not None for grad in grads):
            _warn(ctx.call.operator.name)
            for i, grad in zip(
                wanted, _vjp(ctx.call.by_reference, tensors, wanted, grads), strict=True
            ):
                results[i] = grad
        return (None, *results)

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        _warn(ctx.call.operator.name)
        tensors = ctx.saved_tensors
        return _jvp(ctx.call.by_reference, tensors, tangents[: len(tensors)])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], backward: _Backward, *tensors: Any) -> Any:
        operator = backward.operator
        _warn(operator.name)
        count = operator.outputs + operator.inputs
        dims = tuple(in_dims[1 : 1 + count])
        grads = torch.func.vmap(backward.by_reference, in_dims=dims)(*tensors[:count])
        return grads, (0,) * len(grads)


def any_order(
    name: str, reference: Callable[..., Any], *, outputs: int = 1, statistics: int = 0, stores: str
) -> Callable[[type[Function]], AnyOrder]:
    """Makes an `autograd.Function` of kernels differentiable any number of times and in any way.

    Its backward stays as it is for the first derivative. Beyond that, for `vmap` and for forward
    mode the inputs go through the reference again; the first time a warning says so.

    Args:
        name: of the operator, in the warning.
        reference: (ctx, *inputs) -> outputs, of the context for its constants and the tensors that
            are the first arguments of the forward and the first to be saved for the backward.
        outputs, statistics: numbers of results that have gradients, and of those after them that
            are kept for the backward alone.
        stores: what the reference keeps and the kernels do not.
    """

    _STORES[name] = stores
    return lambda kernels: AnyOrder(name, kernels, reference, outputs, statistics)


def _backward_again(operator: AnyOrder) -> Any:
    """The kernel's backward, as a step of a graph where one is wanted."""
    kernel, count, outputs = operator.kernels.backward, operator.inputs, operator.outputs

    @never_compiled
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        if not (torch.is_grad_enabled() or is_transformed()):
            return kernel(ctx, *grads)
        results: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        wanted = tuple(i for i in range(count) if ctx.needs_input_grad[i])
        if wanted and any(grad is not None for grad in grads[:outputs]):
            saved = ctx.saved_tensors
            constants = (tensor.detach() for tensor in saved[count:])
            call = _Backward(operator, ctx, wanted)
            found = _Gradients.apply(call, *grads[:outputs], *saved[:count], *constants)
            for i, grad in zip(wanted, found, strict=True):
                results[i] = grad
        return tuple(results)

    return staticmethod(backward)


def _transformed_members(operator: AnyOrder) -> dict[str, Any]:
    """What a Function needs under torch.func and in forward mode."""
    usual_forward, usual_context = operator.kernels.forward, operator.kernels.setup_context
    count, outputs, statistics = operator.inputs, operator.outputs, operator.statistics

    def forward(*arguments: Any) -> Any:
        results = usual_forward(*arguments)
        return results if forward_ad._current_level < 0 else _copies(results)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        usual_context(ctx, inputs, output)
        ctx.save_for_forward(*inputs[:count])

    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Any, ...]:
        _warn(operator.name)
        inputs = ctx.saved_tensors
        found = _jvp(partial(operator.by_reference, ctx), inputs, tangents[:count])
        return (*found, *(None,) * statistics)

    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        _warn(operator.name)
        by_reference = torch.func.vmap(operator.of_inputs(arguments), tuple(in_dims[:count]))
        results = by_reference(*arguments[:count])
        if outputs + statistics == 1:
            return results[0], 0
        unused = [results[0].new_empty(0) for _ in range(statistics)]  # only kernels read them
        return (*results, *unused), (*(0,) * outputs, *(None,) * statistics)

    members = forward, setup_context, jvp, vmap
    return {member.__name__: staticmethod(member) for member in members}
