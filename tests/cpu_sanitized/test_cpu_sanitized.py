# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels under AddressSanitizer, UBSan and ThreadSanitizer, and faults each must see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from sanitized import Builder, Failed, Kernels
from torch import Tensor
from wire import raw

from vtclip import testing
from vtclip.testing.problems import OPS, Make, Op, tensors_of

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
# ragged; more than one block of queries, key tile, weight panel and chunk; less than a vector
SHORT = {
    "odd": {"B": 3, "H": 2, "K": 17, "L": 9, "d": 5, "D": 5, "C": 5, "F": 11},
    "blocks": {"B": 2, "H": 1, "K": 131, "L": 261, "d": 3, "D": 19, "C": 19, "F": 7},
    "wide": {"B": 2, "H": 2, "K": 4, "L": 3, "d": 33, "D": 131, "C": 131, "F": 67},
    "one": dict.fromkeys("BHKLdDCF", 1),
    "no images": {"B": 0, "H": 2, "K": 3, "L": 4, "d": 5, "D": 5, "C": 5, "F": 6},
    "no classes": {"B": 2, "H": 2, "K": 0, "L": 4, "d": 5, "D": 5, "C": 5, "F": 6},
    "nothing within": {"B": 2, "H": 2, "K": 3, "L": 0, "d": 0, "D": 0, "C": 0, "F": 0},
}
LONG = {
    **SHORT,
    "images": {"B": 70, "H": 1, "K": 90, "L": 5, "d": 7, "D": 40, "C": 40, "F": 9},
    "classes": {"B": 2, "H": 1, "K": 1100, "L": 5, "d": 4, "D": 9, "C": 9, "F": 5},
    "whole vectors": {"B": 5, "H": 2, "K": 64, "L": 64, "d": 64, "D": 64, "C": 64, "F": 64},
    "no heads": {"B": 2, "H": 0, "K": 3, "L": 4, "d": 5, "D": 5, "C": 5, "F": 6},
}
THREADS = (5, 2)  # after 1
STEPS = {"float32": 256, "float64": 256, "float16": 8, "bfloat16": 8}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "dense": lambda t: t,
    "misaligned": testing.misaligned,
    "gaps": testing.spread,
    "turned": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 1 else t,
}


def maker(layout: str) -> Make:
    """Draws as the table does, but for a first row of a mask that hides all, in another layout."""
    generator = torch.Generator().manual_seed(0)

    def make(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        numbers = torch.randn(shape, generator=generator)
        if dtype == torch.bool:
            numbers[:1] = -1.0
        return LAYOUTS[layout](numbers > 0 if dtype == torch.bool else numbers.to(dtype))

    return make


def numbers_for(op: Op) -> dict[str, float]:
    return {"scale": 0.5 if "H" in op.sizes else 3.0, "residual": 0.7}


def run(kernels: Kernels, op: Op, threads: int, layout: str, **drawn: Any) -> list[Tensor]:
    """Outputs, and gradients, of all that is written."""
    make = maker(layout)
    inputs = op.draw(make=make, **numbers_for(op), **drawn)
    outputs, grads = op.run(lambda name: kernels(name, threads), inputs, make)
    return [*outputs, *grads]


def assert_is_the_operator(op: Op, found: list[Tensor], layout: str, dtype: str, **drawn: Any):
    """Within a few rounding steps of the reference: the program calls what it should."""
    inputs = op.draw(make=maker(layout), dtype=DTYPES[dtype], **numbers_for(op), **drawn)
    wide = {k: v.double() if isinstance(v, Tensor) and v.dtype != torch.bool else v
            for k, v in inputs.items()}  # fmt: skip
    for one, other in zip(found, tensors_of(op.reference(wide)), strict=False):
        if one.numel() == 0 or not one.is_floating_point():
            assert one.shape == other.shape or not one.is_floating_point()
            continue
        finite = other.isfinite()
        assert torch.equal(one.isfinite(), finite)
        size = float(other[finite].abs().amax()) if finite.any() else 0.0
        step = STEPS[dtype] * torch.finfo(DTYPES[dtype]).eps * max(1.0, size)
        assert float((one.double() - other)[finite].abs().sum()) <= step * max(1, finite.sum())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPS)
def test_no_range_reads_outside_or_meets_another(name, dtype, kernels, everything):
    """With threads side by side every result has the bits of one thread alone."""
    op = OPS[name]
    for case, sizes in (LONG if everything else SHORT).items():
        for i, variant in enumerate(("", *op.variants)):
            layouts = list(LAYOUTS)
            for layout in layouts if everything else {layouts[0], layouts[1 + i % 3]}:
                drawn = {"sizes": sizes, "variant": variant}
                alone = run(kernels, op, 1, layout, dtype=DTYPES[dtype], **drawn)
                for threads in THREADS if everything else THREADS[:1]:
                    found = run(kernels, op, threads, layout, dtype=DTYPES[dtype], **drawn)
                    same = [raw(a) == raw(b) for a, b in zip(found, alone, strict=True)]
                    assert all(same), (case, variant, layout, threads, same)
                assert_is_the_operator(op, alone, layout, dtype, **drawn)


class Fault(NamedTuple):
    """A line of an operator's source, what takes its place, and what the sanitizer then says."""

    sanitizer: str
    op: str
    file: str
    old: str
    new: str
    said: str
    case: str = "odd"


LOGITS = "cpu/rational_logits_kernel.h"
FAULTS = {
    "a write behind the last element": Fault(
        *("address", "rational_logits", LOGITS),
        *("p.logits + row * item", "p.logits + (row + 1) * item"),
        "AddressSanitizer: heap-buffer-overflow.*\nWRITE of size",
    ),
    "a read behind the last element": Fault(
        *("address", "rational_logits", LOGITS),
        *("kNoPenalty>(m, v, t, s.D).dot", "kNoPenalty>(m, v, t, s.D + 1).dot"),
        "AddressSanitizer: heap-buffer-overflow.*\nREAD of size",
    ),
    "nothing at a null address": Fault(
        *("address", "cross_attn", "cpu/cross_attn_kernel.h"),
        "zero_bytes(out + q * p.out.row, s.d * item);",
        "__builtin_memset(out + q * p.out.row, 0, static_cast<size_t>(s.d * item));",
        "runtime error: null pointer passed as argument 1",
        "nothing within",
    ),
    "an address that overflows": Fault(
        *("address", "rational_logits", LOGITS),
        *("p.logits + row * item", "p.logits + (row + (int64_t{1} << 62)) * item"),
        "runtime error: signed integer overflow",
    ),
    "a sum that two ranges share": Fault(
        *("thread", "rational_logits", LOGITS),
        *(" + unit % c.text_chunks * s.B * width", ""),
        "ThreadSanitizer: data race",
    ),
    "a number that two ranges write": Fault(
        *("thread", "cosine_logits", "cpu/cosine_logits_kernel.h"),
        *("if (b0 == 0) static_cast<T*>", "if (k0 >= 0) static_cast<T*>"),
        "ThreadSanitizer: data race",
        "many images",
    ),
}
MANY = {"B": 300, "K": 40, "D": 3}  # more than one block of images and of texts


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_reported(name, builder: Builder, start):
    fault = FAULTS[name]
    if reason := builder.why_not(fault.sanitizer):
        pytest.skip(reason)
    kernels = start(builder.changed(*fault[:5]))
    with pytest.raises(Failed, match=fault.said):
        run(kernels, OPS[fault.op], 5, "dense", sizes={**SHORT, "many images": MANY}[fault.case])


def test_a_result_that_depends_on_the_ranges_is_noticed(builder: Builder, start):
    """No memory is wrong where a range goes on with the image that its first row had."""
    if reason := builder.why_not("thread"):
        pytest.skip(reason)
    line = "if (row == begin || k == 0) {", "if (row == begin) {"
    kernels = start(builder.changed("thread", "rational_logits", LOGITS, *line))
    op = OPS["rational_logits"]
    alone, found = (run(kernels, op, n, "dense", sizes=SHORT["odd"]) for n in (1, 5))
    assert not all(raw(a) == raw(b) for a, b in zip(alone, found, strict=True))
