# SPDX-License-Identifier: Apache-2.0
"""What is run: every operator, forward and backward, over a list of sizes, layouts and variants.

The sizes were chosen by coverage: each remainder of the widths that are read at once, two passes of
every loop, several tiles with a part of one, and one of everything.
"""

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
    "float64": torch.float64,
}
EVERYTHING = "inference"  # instead of a variant's name: no tensor asks for a gradient


class Case(NamedTuple):
    """One call. `short`: part of the list that every change is tested with."""

    op: str
    sizes: str  # "B3 K5 D37"
    variant: str = ""
    layout: str = ""
    short: bool = False

    @property
    def name(self) -> str:
        return " ".join(part for part in self[:4] if part)


# operator -> (sizes; variant; layout), with a star where the case is in the short list
TABLE = {
    "rational_logits": """
        * B3 K5 D37
        * B2 K70 D136
        B1 K1 D1
        B2 K9 D64 ;; gaps
        B4 K8 D129
        B2 K65 D8 ;; misaligned
        B33 K40 D200
        B5 K7 D300 ;; transposed
        B3 K5 D38
        B3 K5 D39
    """,
    "unit_products": """
        * B3 K5 D37
        * B2 K300 D16
        B1 K1 D1
        B70 K90 D40
        B2 K9 D64 ;; gaps
        B4 K8 D129
        B33 K40 D200 ;; misaligned
        B5 K7 D300 ;; transposed
        B3 K1100 D20
    """,
    "cosine_logits": """
        * B5 K39 D37
        * B3 K7 D37 ; text per image
        * B130 K200 D24
        B513 K961 D8
        B1 K1 D1
        B1 K1 D1 ; text per image
        B2 K9 D64 ;; gaps
        B2 K9 D64 ; text per image ; gaps
        B4 K8 D129
        B33 K40 D200 ;; misaligned
        B5 K7 D300 ; text per image ; misaligned
        B5 K70 D136 ; text per image
        B5 K7 D300 ;; transposed
    """,
    "norm_cosine_logits": """
        * B3 K5 C37
        * B2 K9 C136
        B1 K1 C2
        B2 K9 C64 ;; gaps
        B4 K8 C129
        B33 K40 C200
        B5 K7 C300 ;; misaligned
        B2 K65 C8 ;; transposed
    """,
    "ffn_cosine_logits": """
        * B3 K5 C37 F11
        * B2 K18 C40 F8 ; features frozen
        B1 K5 C1030 F3
        B1 K1 C5 F1
        B2 K9 C64 F5 ;; gaps
        B4 K8 C129 F16
        B33 K40 C200 F5
        B5 K7 C300 F9 ;; misaligned
        B2 K65 C8 F4 ;; transposed
    """,
    "cross_attn": """
        * B2 H2 K19 L21 d24 ; masked
        * B2 H1 K67 L70 d35 ; query per image
        * B2 H1 K19 L21 d72 ; masked
        * B2 H1 K19 L21 d136 ; masked
        B1 H1 K1 L1 d1
        B3 H1 K65 L16 d64 ; masked
        B2 H3 K16 L129 d32 ; query per image, masked
        B1 H2 K130 L65 d128 ; lse unused
        B2 H1 K33 L63 d256 ; masked
        B9 H1 K5 L3 d8
        B2 H1 K67 L70 d64 ; masked ; misaligned
        B2 H1 K19 L70 d128 ; masked ; gaps
        B2 H2 K19 L21 d64 ;; heads-inner
        B2 H1 K67 L130 d200 ; query per image ; transposed
        B2 H1 K9 L9 d64 ; masked ; expanded
    """,
    "cross_attn_weights": """
        * B2 H2 K19 L21 d24 ; masked
        * B2 H1 K67 L70 d35 ; query per image
        * B2 H1 K19 L21 d72 ; masked
        * B2 H1 K19 L21 d136 ; masked
        B1 H1 K1 L1 d1
        B3 H1 K65 L16 d64 ; masked
        B2 H3 K16 L129 d32 ; query per image, masked
        B1 H2 K130 L65 d128
        B2 H1 K33 L63 d256 ; masked
        B9 H1 K5 L3 d8
        B2 H1 K67 L70 d64 ; masked ; misaligned
        B2 H1 K19 L72 d128 ; masked ; gaps
    """,
    "rational_attn": """
        * B2 H2 K7 d24
        * B2 H1 K70 d40
        * B2 H1 K19 d104 ; text query per image
        * B2 H1 K35 d64 ; inference
        * B2 H1 K70 d200 ; no image query
        B1 H1 K1 d1
        B3 H1 K64 d64
        B2 H2 K65 d16 ; no image query
        B2 H1 K129 d65 ; text query per image
        B1 H3 K33 d128 ; text query alone
        B2 H1 K16 d129
        B2 H1 K10 d256 ; text query alone
        B2 H1 K70 d64 ;; misaligned
        B2 H1 K19 d128 ;; gaps
        B2 H2 K19 d64 ;; heads-inner
        B40 H1 K130 d64
    """,
    "rational_head": """
        * B3 K5 D37 ; none
        * B2 K35 D70 ; l1, features frozen
        * B3 K5 D37 ; mse
        * B3 K5 D40 ; linf
        B1 K300 D24 ; l1
        B1 K1 D1 ; none
        B2 K9 D64 ; none ; gaps
        B4 K8 D129 ; linf
        B2 K65 D8 ; mse ; misaligned
        B33 K40 D200 ; linf
        B5 K7 D300 ; none ; transposed
        B5 K7 D300 ; linf ; gaps
    """,
    "column_sums": """
        * R37 N40
        R1 N1
        R200 N100 ;; gaps
    """,
}


def _parsed(op: str, line: str) -> Case:
    text = line.removeprefix("*")
    sizes, variant, layout = ([part.strip() for part in text.split(";")] + ["", ""])[:3]
    return Case(op, sizes, variant, layout, text != line)


# of an operator without sizes of its own
USUAL = """
    * B3 H2 K19 L21 d24 D37 C37 F11
    * B2 H1 K70 L67 d136 D136 C136 F40
"""
CASES = tuple(
    _parsed(op, line.strip())
    for op in (*OPS, "column_sums")
    for line in TABLE.get(op, USUAL).strip().splitlines()
)


def chosen(set_name: str, everything: bool, op: str = "") -> list[Case]:
    """The cases of a set ("cuda", "triton"), of one operator if it is named."""
    here = [case for case in CASES if case.op != "column_sums" or set_name == "triton"]
    return [case for case in here if (everything or case.short) and op in ("", case.op)]


def _floor(op: str, dtype: torch.dtype) -> Any:
    """The operator's own error budget, as its tests in tests/ops have it."""
    names = {
        "cross_attn": "cancelling",
        "rational_attn": "cancelling",
        "unit_products": "cancelling",
        "ffn_cosine_logits": "cancelling_everywhere",
        "rational_head": "edges",
    }
    if op not in names or (op == "unit_products" and dtype.itemsize < 4):
        return None
    floor = getattr(importlib.import_module(f"test_{op}"), names[op])
    return functools.partial(floor, exact=False) if op == "rational_attn" else floor


def _column_sums(backend: Any) -> Callable[..., Tensor]:
    def column_sums(*tensors: Tensor, impl: str) -> Tensor:
        if impl == "reference":
            return torch.cat([x.sum(0) for x in tensors])
        return backend.function("column_sums")(*tensors)

    return column_sums


class Call(NamedTuple):
    """Arguments of `out_of_budget`."""

    function: Callable[..., Any]
    inputs: dict[str, Tensor]
    frozen: tuple[str, ...]
    fixed: dict[str, object]


def prepared(case: Case, dtype: torch.dtype, backend: Any) -> Call:
    """A call of the public function, on tensors laid out as the case says."""
    sizes = {letter: int(n) for letter, n in re.findall(r"([A-Za-z])(\d+)", case.sizes)}
    lay_out = {**LAYOUTS, **ATTENTION_LAYOUTS}.get(case.layout, lambda tensor: tensor)
    if case.op == "column_sums":
        R, N = sizes["R"], sizes["N"]
        shapes = {"x0": (R, N), "x1": (2 * R + 1, N + 3), "x2": (R + 5, 3 * N)}
        inputs = {name: lay_out(torch.randn(shape).to(dtype)) for name, shape in shapes.items()}
        return Call(_column_sums(backend), inputs, tuple(inputs), {})
    op = OPS[case.op]
    variant = "" if case.variant == EVERYTHING else case.variant
    numbers: dict[str, Any] = {"scale": 0.3 if "H" in op.sizes else 10.0}
    drawn = op.draw(sizes, variant=variant, dtype=dtype, **numbers)
    tensors = {n: lay_out(drawn[n]) for n in op.differentiable if drawn[n] is not None}
    fixed = {n: drawn[n] for n in ("scale", "residual", "eps", "key_mask") if n in drawn}
    if fixed.get("key_mask") is not None and len(fixed["key_mask"]) > 1:
        fixed["key_mask"][1] = False  # an image with nothing to see
    if "penalty" in drawn:
        fixed["penalty"] = PENALTIES[drawn["penalty"]]
    frozen: tuple[str, ...] = tuple(tensors) if case.variant == EVERYTHING else ()
    if drawn.get("feature_grads") is False:
        frozen = ("text", "image")
    function: Callable[..., Any] = getattr(ops, case.op)
    if case.op == "cross_attn" and case.variant != "lse unused":
        function = ops.cross_attn_lse
    if case.op == "rational_attn":
        tensors = {name.removesuffix("_query"): tensor for name, tensor in tensors.items()}
        asked = importlib.import_module("test_rational_attn").asked
        function = functools.partial(asked, list(tensors)[:-2])
    return Call(function, tensors, frozen, fixed)


def wrong(case: Case, dtype_name: str, backend: Any) -> list[str]:
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
        frozen=call.frozen,
        tf32=tf32,
        **call.fixed,
    )


def dtypes(set_name: str, kernels: list[str]) -> Iterator[str]:
    """What a set's kernels are compiled for."""
    yield from ("float32", "float16", "bfloat16")
    if set_name == "triton":
        yield "tf32"
    elif any("Id" in kernel for kernel in kernels):
        yield "float64"
