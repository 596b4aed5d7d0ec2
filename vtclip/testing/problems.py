# SPDX-License-Identifier: Apache-2.0
"""Inputs of every operator, described once: tests, benchmarks and `vtclip tune` draw them here.

    op = OPS["cross_attn"]
    inputs = op.draw({"B": 3, "K": 5, "L": 7, "H": 2, "d": 8}, dtype=torch.bfloat16)
    outputs, grads = op.run(kernel, inputs)         # forward, then backward
    expected = op.reference(inputs)

An entry of `OPS` names the arguments of the registered operators `vtclip::X_fwd` and `X_bwd` and
the outputs of the forward. That is enough to call both: arguments are matched to the schemas by
name, and a backward argument `grad_Y` is the gradient of the output Y. To add an operator, add its
entry; to add a public function that is not called as its operator is, add it to `FUNCTIONS`.

Sizes are a mapping by the letters of the shapes in the docstrings of `vtclip.ops`: B images,
K classes, L tokens, H heads of width d, D or C features, F hidden units. Letters that an operator
does not use are ignored.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vtclip.names import PENALTIES

Sizes = Mapping[str, int]
Make = Callable[[tuple[int, ...], torch.dtype], Tensor]


def normal(device: torch.device | str = "cpu", seed: int | None = 0) -> Make:
    """Draws standard normal numbers in float32 and rounds them; booleans, about half of them set.

    The first of every row of booleans is set, so that no row of a mask hides all of its columns.
    Without a seed torch's own generator is drawn from.
    """
    generator = None if seed is None else torch.Generator(device).manual_seed(seed)

    def make(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        numbers = torch.randn(shape, generator=generator, device=device)
        if dtype != torch.bool:
            return numbers.to(dtype)
        numbers[..., :1] = 1.0
        return numbers > 0

    return make


def _shape(axes: str, sizes: Sizes) -> tuple[int, ...]:
    """The shape that "B H 1 d" names."""
    letters = axes.removesuffix(" bool").split()
    return tuple(int(letter) if letter.isdigit() else sizes[letter] for letter in letters)


def _draw(
    axes: str, sizes: Sizes, dtype: torch.dtype, make: Make, heads_inside: bool, unit_rows: bool
) -> Tensor:
    shape = _shape(axes, sizes)
    if heads_inside and axes.endswith(" d") and len(shape) == 4:  # [B, H, N, d]
        B, H, N, d = shape
        return make((B, N, H, d), dtype).transpose(1, 2)
    tensor = make(shape, torch.bool if axes.endswith(" bool") else dtype)
    return tensor.mul_(shape[-1] ** -0.5) if unit_rows and shape[-1] else tensor


def _is_axes(value: object) -> bool:
    return isinstance(value, str) and value not in PENALTIES


def tensors_of(results: Tensor | tuple[Tensor, ...] | list[Tensor]) -> tuple[Tensor, ...]:
    """One result or several, as a tuple."""
    return (results,) if isinstance(results, Tensor) else tuple(results)


@dataclass(frozen=True)
class Op:
    """A registered operator with its backward.

    arguments: by the names in the schemas, in the order of the public function: axes of a tensor
        as "B H L d" ("... bool" of booleans), None for an optional tensor, else a value or a
        function of the sizes.
    outputs: of the forward, by the names the backward's schema uses.
    unit_rows: tensors that are drawn with rows of length about 1, as weights and features are.
    variants: name -> arguments that differ from the usual ones.
    """

    name: str
    arguments: Mapping[str, Any]
    outputs: tuple[str, ...]
    unit_rows: tuple[str, ...] = ()
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def sizes(self) -> tuple[str, ...]:
        """The letters of the sizes it takes."""
        axes = " ".join(value for value in self.arguments.values() if _is_axes(value))
        return tuple(dict.fromkeys(letter for letter in axes.split() if letter.isalpha()))

    @property
    def differentiable(self) -> tuple[str, ...]:
        """Names of the tensors that have gradients."""
        return tuple(name for name, value in self.arguments.items() if _is_axes(value))

    def draw(
        self,
        sizes: Sizes,
        *,
        variant: str = "",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
        make: Make | None = None,
        heads_inside: bool = False,
        **changes: Any,
    ) -> dict[str, Any]:
        """Arguments by name: the usual ones, those of `variant`, and `changes`, in this order.

        `make(shape, dtype)` provides tensors, by default `normal(device, seed)`. With
        `heads_inside` tensors [B, H, N, d] lie in memory as [B, N, H, d], as projections leave
        them.
        """
        make = make or normal(device, seed)
        inputs: dict[str, Any] = {}
        wanted = {**self.arguments, **(self.variants[variant] if variant else {}), **changes}
        for name, value in wanted.items():
            if _is_axes(value):
                value = _draw(value, sizes, dtype, make, heads_inside, name in self.unit_rows)
            elif callable(value):
                value = value(sizes)
            elif name == "penalty":
                value = PENALTIES.index(value)
            inputs[name] = value
        return inputs

    def forward_arguments(self, inputs: Mapping[str, Any]) -> tuple[Any, ...]:
        """Arguments of X_fwd in the order of its schema."""
        return tuple(inputs[name] for name in _schema(f"{self.name}_fwd"))

    def backward_arguments(
        self,
        inputs: Mapping[str, Any],
        outputs: tuple[Tensor, ...],
        make: Make | None = None,
        *,
        seed: int = 1,
    ) -> tuple[Any, ...]:
        """Arguments of X_bwd in the order of its schema.

        Gradients of the outputs are drawn, but those that `inputs` holds.
        """
        make = make or normal(outputs[0].device, seed)
        results = dict(zip(self.outputs, outputs, strict=True))
        values = {**results, **inputs}  # an input may have the name of an output
        names = _schema(f"{self.name}_bwd")
        for name in names:
            if name.startswith("grad_") and name not in inputs:
                output = results[name.removeprefix("grad_")]
                values[name] = make(tuple(output.shape), output.dtype)
        return tuple(values[name] for name in names)

    def run(
        self,
        kernel: Callable[[str], Callable[..., Any]],
        inputs: Mapping[str, Any],
        make: Make | None = None,
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """What `kernel("X_fwd")` returns, and what `kernel("X_bwd")` returns for it."""
        outputs = tensors_of(kernel(f"{self.name}_fwd")(*self.forward_arguments(inputs)))
        arguments = self.backward_arguments(inputs, outputs, make)
        return outputs, tensors_of(kernel(f"{self.name}_bwd")(*arguments))

    def reference(self, inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """What plain torch returns: the first of the outputs."""
        function = getattr(importlib.import_module(f"vtclip.reference.{self.name}"), self.name)
        parameters = inspect.signature(function).parameters.values()
        names = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
        return tensors_of(function(**{name: inputs[name] for name in names}))


def _schema(name: str) -> tuple[str, ...]:
    """Names of the arguments of a registered operator."""
    importlib.import_module("vtclip.ops")  # registers all
    schema = getattr(torch.ops.vtclip, name).default._schema
    return tuple(argument.name for argument in schema.arguments)


def _per_head(sizes: Sizes) -> float:
    """The usual scale of attention, 1 for heads of no width."""
    return float(max(1, sizes["d"]) ** -0.5)


_PER_IMAGE = {"query": "B H K d"}
_MASKED = {"key_mask": "B L bool"}
_ATTENTION = {
    "query per image": _PER_IMAGE,
    "masked": _MASKED,
    "query per image, masked": _PER_IMAGE | _MASKED,
}
_COSINE = {"residual": 1.0, "scale": 100.0, "eps": 1e-5}

_ENTRIES = (
    Op(
        "cross_attn",
        {
            "query": "1 H K d",
            "key": "B H L d",
            "value": "B H L d",
            "key_mask": None,
            "scale": _per_head,
        },
        outputs=("out", "lse"),
        variants={**_ATTENTION, "lse unused": {"grad_lse": None}},
    ),
    Op(
        "cross_attn_weights",
        {"query": "1 H K d", "key": "B H L d", "key_mask": None, "scale": _per_head},
        outputs=("weights",),
        variants=_ATTENTION,
    ),
    Op(
        "cosine_logits",
        {"image": "B D", "text": "K D", "scale": 100.0},
        outputs=("logits", "image_rnorm", "text_rnorm"),
        variants={"text per image": {"text": "B K D"}},
    ),
    Op(
        "norm_cosine_logits",
        {"hidden": "B K C", "weight": "C", "bias": "C", "text": "K C", "image": "B C", **_COSINE},
        outputs=("logits", "mean", "rstd", "image_rnorm", "row_rnorm"),
    ),
    Op(
        "ffn_cosine_logits",
        {
            "hidden": "B K F",
            "weight": "C F",
            "bias": "C",
            "residual_input": "B K C",
            "norm_weight": "C",
            "norm_bias": "C",
            "text": "K C",
            "image": "B C",
            "feature_grads": True,  # with those of text and image
            **_COSINE,
        },
        outputs=("logits", "stats", "image_rnorm"),
        unit_rows=("weight",),
        variants={"features frozen": {"feature_grads": False}},
    ),
    Op(
        "rational_attn",
        {
            "image_query": "B H 1 d",
            "text_query": "1 H K d",
            "pair_query": "B H K d",
            "key": "B H K d",
            "value": "B H K d",
            "scale": _per_head,
            "keep_parts": True,
        },
        outputs=("out", "parts", "image_out", "stats"),
        variants={
            "text query per image": {"text_query": "B H K d"},
            "no image query": {"image_query": None},
            "text query alone": {"image_query": None, "pair_query": None},
        },
    ),
    Op(
        "rational_logits",
        {"image": "B D", "text": "K D", "mask": "B K D", "scale": 100.0},
        outputs=("logits",),
    ),
    Op(
        "rational_head",
        {
            "context": "B K D",
            "weight": "D D",
            "bias": "D",
            "image": "B D",
            "text": "K D",
            "scale": 100.0,
            "penalty": "mse",
            "feature_grads": True,
        },
        outputs=("logits", "penalty", "peak"),
        unit_rows=("weight", "image", "text"),
        variants={
            **{penalty: {"penalty": penalty} for penalty in PENALTIES},
            **{
                f"{penalty}, features frozen": {"penalty": penalty, "feature_grads": False}
                for penalty in PENALTIES
            },
        },
    ),
    Op(
        "unit_products",
        {"image": "B D", "text": "K D", "scale": 100.0},
        outputs=("image", "text", "products"),
    ),
)
OPS: dict[str, Op] = {entry.name: entry for entry in _ENTRIES}


@dataclass(frozen=True)
class Function:
    """A public function of `vtclip.ops`.

    tensors: axes of its positional arguments, in order.
    keywords: what it is called with besides; a caller's own come last.
    result: from what it returns to the one tensor that stands for it.
    """

    name: str
    op: Op
    tensors: tuple[str, ...]
    keywords: Mapping[str, Any] = field(default_factory=dict)
    result: Callable[[Any], Tensor] = lambda outputs: tensors_of(outputs)[0]

    def outputs(self, *tensors: Tensor, **keywords: Any) -> tuple[Tensor, ...]:
        """All that it returns."""
        return tensors_of(self._call(*tensors, **keywords))

    def __call__(self, *tensors: Tensor, **keywords: Any) -> Tensor:
        """`result` of what it returns."""
        return self.result(self._call(*tensors, **keywords))

    def _call(self, *tensors: Tensor, **keywords: Any) -> Any:
        from vtclip import ops

        return getattr(ops, self.name)(*tensors, **{**self.keywords, **keywords})

    def draw(
        self,
        sizes: Sizes,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int | None = 0,
        heads_inside: bool = False,
    ) -> list[Tensor]:
        """Its tensors as leaves that ask for gradients."""
        make = normal(device, seed)
        leaves = []
        # a packed function has fewer tensors than its op, the first of them the same
        for name, axes in zip(self.op.differentiable, self.tensors, strict=False):
            tensor = _draw(axes, sizes, dtype, make, heads_inside, name in self.op.unit_rows)
            leaves.append(tensor.requires_grad_())
        return leaves

    def variants(self) -> Iterator[tuple[str, Function]]:
        """(name, function) of those variants of its op that differ in shapes or the penalty."""
        if len(self.tensors) != len(self.op.differentiable):
            return
        for name, changes in self.op.variants.items():
            axes = {key: value for key, value in changes.items() if key in self.op.differentiable}
            rest = {key: value for key, value in changes.items() if key == "penalty"}
            if len(axes) + len(rest) < len(changes) or not all(map(_is_axes, axes.values())):
                continue
            old = zip(self.op.differentiable, self.tensors, strict=True)
            tensors = tuple(axes.get(key, usual) for key, usual in old)
            changed = replace(self, tensors=tensors, keywords={**self.keywords, **rest})
            if changed != self:
                yield name, changed


def _function(op: Op, name: str = "", **changes: Any) -> Function:
    tensors = tuple(op.arguments[argument] for argument in op.differentiable)
    known = {"penalty": op.arguments.get("penalty"), "scale": op.arguments.get("scale")}
    keywords = {key: value for key, value in known.items() if value and not callable(value)}
    return replace(Function(name or op.name, op, tensors, keywords), **changes)


FUNCTIONS: dict[str, Function] = {name: _function(op) for name, op in OPS.items()} | {
    "cross_attn_lse": _function(
        OPS["cross_attn"],
        "cross_attn_lse",
        result=lambda attended: attended.out.sum() + attended.lse.sum(),
    ),
    "rational_attn_packed": _function(
        OPS["rational_attn"], "rational_attn_packed", tensors=("B H 1 d", "1 H K d", "B K 3 H d")
    ),
    "unit_products": _function(OPS["unit_products"], result=lambda rows: rows.products),
}
