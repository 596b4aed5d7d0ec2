# SPDX-License-Identifier: Apache-2.0
"""What is run: every operator, forward and backward, at the sizes of sizes.py, against float64."""

from __future__ import annotations

import functools
import importlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from harness.build import ROOT
from harness.sizes import TABLE, USUAL

HELPERS = (ROOT / "tests" / "helpers", ROOT / "tests" / "ops")
sys.path += [str(folder) for folder in HELPERS if str(folder) not in sys.path]

from layouts import ATTENTION_LAYOUTS, LAYOUTS  # noqa: E402
from op_budget import out_of_budget  # noqa: E402

from vtclip import ops  # noqa: E402
from vtclip.names import PENALTIES  # noqa: E402
from vtclip.testing.problems import OPS  # noqa: E402

DTYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
# operators of Triton alone, without a public function
PARTS = ("column_sums", "relu_gradient", "sum_norm")
EPS = 1e-5  # of sum_norm
EXTREMES = "extremes"  # instead of a layout's name: images and texts of other magnitudes
NAN = "NaN"  # the same: every third context of the first image, and nothing asks for a gradient
EVERYTHING = "inference"  # instead of a variant's name: no tensor asks for a gradient
# variants of an operator's arguments that problems.py does not have
VARIANTS = {"image query alone": {"text_query": None, "pair_query": None}}


# of the short list; compiling for two architectures takes most of its time
SHORT_DTYPES = {
    ("triton", "sm_80"): ("float32", "bfloat16"),
    ("triton", "sm_90"): ("float16",),
}


class Case(NamedTuple):
    """One call. `stars`: 2 in the short list of every set, 1 in that of the CUDA library."""

    op: str
    sizes: str  # "B3 K5 D37"
    variant: str = ""
    layout: str = ""
    stars: int = 0

    @property
    def name(self) -> str:
        return " ".join(part for part in self[:4] if part)


def _parsed(op: str, line: str) -> Case:
    text = line.lstrip("*")
    sizes, variant, layout = ([part.strip() for part in text.split(";")] + ["", ""])[:3]
    return Case(op, sizes, variant, layout, len(line) - len(text))


CASES = tuple(
    _parsed(op, line.strip())
    for op in (*OPS, *PARTS)
    for line in TABLE.get(op, USUAL).strip().splitlines()
)


def chosen(set_name: str, everything: bool, op: str = "") -> list[Case]:
    """The cases of a set ("cuda", "triton"), of one operator if it is named."""
    here = [case for case in CASES if case.op not in PARTS or set_name == "triton"]
    least = 0 if everything else 2 if set_name == "triton" else 1
    return [case for case in here if case.stars >= least and op in ("", case.op)]


def _floor(op: str, dtype: torch.dtype) -> Any:
    """The operator's own error budget, as its tests in tests/ops have it."""
    names = {
        "cross_attn": "cancelling",
        "rational_attn": "cancelling",
        "unit_products": "cancelling",
        "norm_cosine_logits": "cancelling",
        "ffn_cosine_logits": "cancelling_everywhere",
        "rational_head": "edges",
    }
    if op not in names or (op == "unit_products" and dtype.itemsize < 4):
        return None
    floor = getattr(importlib.import_module(f"test_{op}"), names[op])
    return functools.partial(floor, exact=False) if op == "rational_attn" else floor


def _part_reference(op: str, tensors: tuple[Tensor, ...]) -> Any:
    if op == "column_sums":
        return torch.cat([x.sum(0) for x in tensors])
    if op == "sum_norm":
        return _sum_norm(*tensors)
    grad, hidden = tensors
    d_sum = torch.where(hidden <= 0, 0.0, grad)
    return d_sum, d_sum.sum(0)


def _sum_norm(
    product: Tensor, start: Tensor, weight: Tensor, bias: Tensor, shift: Tensor,
    grad: Tensor, grad_shifted: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Both results, and the gradients of the first five."""
    leaves = [x.detach().requires_grad_() for x in (product, start, weight, bias, shift)]
    with torch.enable_grad():
        u, C = leaves[0] + leaves[1], product.shape[-1]
        out = torch.nn.functional.layer_norm(u, (C,), *leaves[2:4], EPS).flatten(0, 1)
        shifted = out + leaves[4]
        both = grad.flatten(0, 1), grad_shifted.flatten(0, 1)
        d_product, d_start, *vectors = torch.autograd.grad((out, shifted), leaves, both)
    return out.detach(), shifted.detach(), d_product, d_start, torch.stack(vectors)


def _part(op: str, backend: Any) -> Callable[..., Any]:
    def function(*tensors: Tensor, impl: str) -> Any:
        if impl == "reference":
            return _part_reference(op, tensors)
        if op != "sum_norm":
            return backend.function(op)(*tensors)
        product, start, weight, bias, shift, *grads = tensors
        forward = backend.function("sum_norm_fwd")
        out, shifted, *kept = forward(product, start, weight, bias, shift, EPS)
        alone = forward(product, start, weight, bias, None, EPS)[0]
        found = backend.function("sum_norm_bwd")(*grads, product, start, weight, *kept)
        return torch.where(alone == out, out, torch.nan), shifted, *found

    return function


def _part_inputs(case: Case, sizes: dict[str, int], dtype: torch.dtype) -> dict[str, Tensor]:
    lay_out = _layout(case)
    if case.op == "sum_norm":
        B, K, C = (sizes[letter] for letter in "BKC")
        shapes = {"product": (B, K, C), "start": (K, C), "weight": (C,), "bias": (C,)}
        shapes |= {"shift": (C,), "grad": (B, K, C), "grad_shifted": (B, K, C)}
        return {name: lay_out(torch.randn(shape).to(dtype)) for name, shape in shapes.items()}
    R, N = sizes["R"], sizes["N"]
    if case.op == "column_sums":
        shapes = {"x0": (R, N), "x1": (2 * R + 1, N + 3), "x2": (R + 5, 3 * N)}
        return {name: lay_out(torch.randn(shape).to(dtype)) for name, shape in shapes.items()}
    grad, hidden = torch.randn(2, R, N).to(dtype)
    return {"grad": lay_out(grad), "hidden": hidden.relu()}  # what is kept is contiguous


def _layout(case: Case) -> Callable[[Tensor], Tensor]:
    layouts = ATTENTION_LAYOUTS if " H" in case.sizes else LAYOUTS
    return layouts.get(case.layout, lambda tensor: tensor)


class Call(NamedTuple):
    """Arguments of `out_of_budget`."""

    function: Callable[..., Any]
    inputs: dict[str, Tensor]
    frozen: tuple[str, ...]
    fixed: dict[str, object]


def _extremes(rows: Tensor) -> Tensor:
    """Of every four rows one of zeros, of tiny and of huge numbers: what a norm is scaled for."""
    powers = (0.0, 1.0, 1.0, 1.0) if rows.dtype == torch.float16 else (0.0, 2.0**-60, 2.0**60, 1.0)
    count = rows[..., 0].numel()
    factors = torch.tensor(powers, dtype=rows.dtype).repeat(-(-count // 4))[:count]
    return rows * factors.view(*rows.shape[:-1], 1)


def _infinite(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with infinity in place of NaN, which equals nothing, in its results."""

    def finds(*args: Any, **kwargs: Any) -> Any:
        return tuple(x.where(~x.isnan(), torch.inf) for x in function(*args, **kwargs))

    return finds


def prepared(case: Case, dtype: torch.dtype, backend: Any) -> Call:
    """A call of the public function, on tensors laid out as the case says."""
    sizes = {letter: int(n) for letter, n in re.findall(r"([A-Za-z])(\d+)", case.sizes)}
    if case.op in PARTS:
        inputs = _part_inputs(case, sizes, dtype)
        return Call(_part(case.op, backend), inputs, tuple(inputs), {})
    lay_out = _layout(case)
    op = OPS[case.op]
    variant = case.variant if case.variant in op.variants else ""
    numbers: dict[str, Any] = {"scale": 0.3 if "H" in op.sizes else 10.0}
    if case.variant not in ("", EVERYTHING, variant):
        numbers |= VARIANTS[case.variant]
    drawn = op.draw(sizes, variant=variant, dtype=dtype, **numbers)
    tensors = {n: lay_out(drawn[n]) for n in op.differentiable if drawn[n] is not None}
    if case.layout == EXTREMES:
        tensors |= {n: _extremes(tensors[n]) for n in ("image", "text")}
    fixed = {n: drawn[n] for n in ("scale", "residual", "eps", "key_mask") if n in drawn}
    if case.layout == EXTREMES and "residual" in fixed and dtype == torch.float16:
        fixed["residual"] = 2.0**60  # no text is so large
    if fixed.get("key_mask") is not None and len(fixed["key_mask"]) > 1:
        fixed["key_mask"][1] = False  # an image with nothing to see
    if "penalty" in drawn:
        fixed["penalty"] = PENALTIES[drawn["penalty"]]
    frozen: tuple[str, ...] = tuple(tensors) if case.variant == EVERYTHING else ()
    if drawn.get("feature_grads") is False:
        frozen = ("text", "image")
    function: Callable[..., Any] = getattr(ops, case.op)
    if case.layout == NAN:
        tensors["context"][0, ::3] = torch.nan
        function, frozen = _infinite(function), tuple(tensors)
    if case.op == "cross_attn" and case.variant != "lse unused":
        function = ops.cross_attn_lse
    if case.op == "rational_attn":
        tensors = {name.removesuffix("_query"): tensor for name, tensor in tensors.items()}
        frozen = tuple(name.removesuffix("_query") for name in frozen)
        asked = importlib.import_module("test_rational_attn").asked
        function = functools.partial(asked, list(tensors)[:-2])
    return Call(function, tensors, frozen, fixed)


def wrong(case: Case, dtype_name: str, backend: Any, backward: bool = True) -> list[str]:
    """What the kernels get wrong in this case, a line each."""
    dtype = DTYPES[dtype_name]
    tf32 = dtype_name == "tf32"
    torch.backends.cuda.matmul.fp32_precision = "tf32" if tf32 else "ieee"
    torch.manual_seed(0)
    call = prepared(case, dtype, backend)
    return out_of_budget(
        call.function,
        call.inputs,
        backend.name,
        floor=_floor(case.op, dtype),
        frozen=call.frozen if backward else tuple(call.inputs),
        tf32=tf32,
        **call.fixed,
    )


def dtypes(set_name: str, arch: str, everything: bool) -> Iterator[str]:
    """What a set's kernels are compiled for, or what of it the short list runs."""
    for dtype in DTYPES:
        exists = dtype != "tf32" or set_name == "triton"
        if exists and (everything or dtype in SHORT_DTYPES.get((set_name, arch), DTYPES)):
            yield dtype
