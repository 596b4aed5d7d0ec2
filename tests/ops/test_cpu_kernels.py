# SPDX-License-Identifier: Apache-2.0
"""What is particular to the C++ kernels: instruction sets, memory, threads, extreme numbers.

That their results are right for ordinary inputs is the business of the other files here.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vtclip import ops, reference
from vtclip.backends import native
from vtclip.reference.cross_attn import cross_attn as cross_attn_reference
from vtclip.testing import assert_within_budget
from vtclip.testing.problems import OPS, tensors_of

CHILD = Path(__file__).with_name("_cpu_child.py")
_spec = importlib.util.spec_from_file_location("_cpu_child", CHILD)
_child = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_child)
KERNELS, call_all = _child.KERNELS, _child.call_all
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
CAPABILITIES = ("scalar", "avx2", "avx512", "avx512_bf16")  # each at most: the best of a processor
# steps of rounding that sums of up to 300 terms may differ by when their order differs
STEPS = {torch.float32: 64, torch.float64: 64, torch.float16: 4, torch.bfloat16: 4}

pytestmark = pytest.mark.skipif(bool(native.load_cpu()), reason=native.load_cpu() or "loaded")


def run_child(*args: str, capability: str | None = None) -> subprocess.CompletedProcess[str]:
    root = str(Path(reference.__file__).parents[2])
    env = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    if capability:
        env["VTCLIP_CPU_CAPABILITY"] = capability
    command = [sys.executable, str(CHILD), *args]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def scalar_results(tmp_path_factory) -> dict[str, list[Tensor]]:
    """What the portable build of the kernels returns."""
    path = tmp_path_factory.mktemp("scalar") / "results.pt"
    done = run_child("results", str(path), capability="scalar")
    assert done.returncode == 0, done.stderr
    return torch.load(path, weights_only=True)


def assert_close_sums(actual: list[Tensor], expected: list[Tensor], dtype: torch.dtype) -> None:
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        finite = e.isfinite()
        assert torch.equal(a.isfinite(), finite), i
        assert torch.equal(a[~finite], e[~finite]), i
        if finite.any():
            a, e = a[finite].double(), e[finite].double()
            allowed = STEPS[dtype] * torch.finfo(dtype).eps * max(1.0, float(e.abs().amax()))
            assert float((a - e).abs().amax()) <= allowed, i


def test_portable_and_native_builds_agree(dtype, scalar_results):
    assert_close_sums(call_all(dtype), scalar_results[str(dtype)], dtype)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86-64 has a second build")
def test_avx2_build_agrees_where_there_is_avx512(tmp_path, scalar_results):
    done = run_child("results", str(tmp_path / "avx2.pt"), capability="avx2")
    assert done.returncode == 0, done.stderr
    avx2 = torch.load(tmp_path / "avx2.pt", weights_only=True)
    for dtype in DTYPES:
        assert_close_sums(avx2[str(dtype)], scalar_results[str(dtype)], dtype)
    # sums are split over vectors of another length, so equal bits would mean an ignored variable
    pairs = zip(avx2["torch.float32"], scalar_results["torch.float32"], strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


def test_no_kernel_reads_outside_its_inputs():
    for capability in CAPABILITIES:
        done = run_child("guard", capability=capability)
        assert done.returncode == 0, f"{capability}: exit {done.returncode}\n{done.stderr}"


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_results_are_finite_where_the_reference_is(capability):
    done = run_child("extreme", capability=capability)
    assert done.returncode == 0, done.stderr


def test_a_read_behind_the_last_element_would_be_fatal():
    code = (
        "import sys, ctypes, torch; sys.path.insert(0, sys.argv[1]); import _cpu_child as c;"
        "t = c.guarded((5,), torch.float32, at_end=True); print('ready', flush=True);"
        "ctypes.string_at(t.data_ptr(), 21); print('survived')"
    )
    env = os.environ | {"PYTHONPATH": str(Path(reference.__file__).parents[2])}
    command = [sys.executable, "-c", code, str(CHILD.parent)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.stdout.split() == ["ready"], done.stderr


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_fifty_runs_give_the_same_bits(threads):
    torch.set_num_threads(4)
    first = call_all(torch.float32)
    assert all(same(call_all(torch.float32), first) for _ in range(49))


def test_the_number_of_threads_does_not_change_a_bit(threads):
    torch.set_num_threads(1)
    single = {dtype: call_all(dtype) for dtype in DTYPES}
    for count in (2, 3, 7):
        torch.set_num_threads(count)
        for dtype in DTYPES:
            assert same(call_all(dtype), single[dtype]), (count, dtype)


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
) -> list[Tensor]:
    """Outputs and gradients for a fixed output gradient."""
    out, lse = KERNELS.cross_attn_fwd(query, key, value, mask, 0.25)
    generator = torch.Generator().manual_seed(1)
    seed = torch.randn(out.shape, generator=generator).to(out.dtype)
    seed_lse = torch.randn(lse.shape, generator=generator).to(lse.dtype)
    grads = KERNELS.cross_attn_bwd(seed, seed_lse, query, key, value, mask, out, lse, 0.25)
    return [out, lse, *grads]


@pytest.mark.parametrize("expanded", ["heads", "rows", "width", "images"])
def test_stride_zero(expanded, dtype):
    axis = {"images": 0, "heads": 1, "rows": 2, "width": 3}[expanded]
    tensors = []
    for rows in (19, 23, 23):
        full = [3, 2, rows, 12]
        small = full.copy()
        small[axis] = 1
        tensors.append(torch.randn(small).to(dtype).expand(full))
    assert same(attention(*tensors), attention(*(t.contiguous() for t in tensors)))


def test_strides_far_beyond_32_bits_on_axes_of_one():
    # no storage can back a stride of 2^40 elements here, except on an axis of one
    query, key, value = torch.randn(1, 1, 5, 8), torch.randn(1, 1, 7, 8), torch.randn(1, 1, 7, 8)
    far = [t.as_strided(t.shape, (1 << 40, 1 << 40, 8, 1)) for t in (query, key, value)]
    assert same(attention(*far), attention(query, key, value))
    column = query[..., :1].contiguous(), key[..., :1].contiguous(), value[..., :1].contiguous()
    far = [t.as_strided(t.shape, (1 << 40, 1 << 40, 1, 1 << 40)) for t in column]
    assert same(attention(*far), attention(*column))


def test_storage_offset_and_misaligned_rows(dtype):
    tensors = [torch.randn(2, 2, rows, 13).to(dtype) for rows in (9, 11, 11)]
    shifted = [torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape) for t in tensors]
    assert same(attention(*shifted), attention(*tensors))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_every_half_precision_number_survives(half):
    # one key: the weight is 1 and out must be value, bit by bit
    numbers = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(half)
    value = numbers.view(1, 1024, 1, 64)
    zeros = torch.zeros(1, 1024, 1, 64, dtype=half)
    out, _ = KERNELS.cross_attn_fwd(zeros, zeros, value, None, 1.0)
    finite = value.isfinite() & (value != 0)  # the sum 0 + -0 is 0
    assert torch.equal(out[finite].view(torch.int16), value[finite].view(torch.int16))
    assert torch.equal(out.isnan(), value.isnan())
    assert torch.equal(out[value.isinf()], value[value.isinf()])


def against_reference(query: Tensor, key: Tensor, value: Tensor, scale: float, rel: float) -> None:
    out, lse = KERNELS.cross_attn_fwd(query, key, value, None, scale)
    wide = [t.double() for t in (query, key, value)]
    expected, expected_lse = cross_attn_reference(*wide, None, scale)
    for actual, oracle in ((out, expected), (lse, expected_lse)):
        torch.testing.assert_close(actual.double(), oracle, rtol=rel, atol=rel * 10, equal_nan=True)


@pytest.mark.skipif(
    native.build_info().get("instructions") != "avx512_bf16",
    reason="this processor or compiler has no products of bfloat16 pairs",
)
def test_pairs_of_bfloat16_have_a_kernel_of_their_own(tmp_path):
    """Other bits than without it; everything else is as before."""
    done = run_child("results", str(tmp_path / "wide.pt"), capability="avx512")
    assert done.returncode == 0, done.stderr
    wide = torch.load(tmp_path / "wide.pt", weights_only=True)
    for dtype in DTYPES:
        assert same(call_all(dtype), wide[str(dtype)]) is (dtype != torch.bfloat16), dtype


@pytest.mark.parametrize("images", [1, 3])  # of the query: shared, and not
@pytest.mark.parametrize("d", [1, 7, 64])
def test_odd_numbers_of_keys_in_tiles_of_bfloat16(images, d):
    # 385 keys are two tiles of 193; of 383 visible ones the last tile holds an odd number
    query, key, value = (
        torch.randn(n, 2, k, d).bfloat16() for n, k in ((images, 37), *[(3, 385)] * 2)
    )
    mask = torch.ones(3, 385, dtype=torch.bool)
    mask[1, 5] = mask[1, 380] = mask[2, 1:] = False
    for scale in (0.3, -0.7):
        out, lse = KERNELS.cross_attn_fwd(query, key, value, mask, scale)
        wide = [t.double() for t in (query, key, value)]
        oracle, oracle_lse = cross_attn_reference(*wide, mask, scale)
        peer, _ = cross_attn_reference(query, key, value, mask, scale)
        assert_within_budget(out, oracle, peer)
        torch.testing.assert_close(lse.double(), oracle_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("which", ["query", "key", "value"])
def test_subnormal_numbers_of_bfloat16_count(which):
    small, large = 2.0**-128, 2.0**126
    sizes = {"query": (1, 2, 9, 8), "key": (2, 2, 5, 8), "value": (2, 2, 5, 8)}
    scales = {"query": (small, large, 1.0), "key": (large, small, 1.0), "value": (1.0, 1.0, small)}
    tensors = [
        (torch.randn(size).clamp(-3, 3) * scale).bfloat16()
        for size, scale in zip(sizes.values(), scales[which], strict=True)
    ]
    out, _ = KERNELS.cross_attn_fwd(*tensors, None, 1.0)
    wide = [t.double() for t in tensors]
    oracle, _ = cross_attn_reference(*wide, None, 1.0)
    lost, _ = cross_attn_reference(*(t.where(t.abs() >= 2.0**-126, 0) for t in wide), None, 1.0)
    allowed = torch.finfo(torch.bfloat16).eps * float(wide[2].abs().amax()) + 2.0**-133
    assert float((out.double() - oracle).abs().amax()) <= allowed
    # numbers taken for zero would be seen
    assert float((lost - oracle).abs().amax()) > 10 * allowed


def test_the_scale_of_bfloat16_scores_keeps_their_sum_in_range():
    """Scores of about 1 whose terms, before the scale, are beyond float32."""
    tensors = [torch.randn(n, 2, k, 8) for n, k in ((1, 9), (2, 5), (2, 5))]
    wide = [t.bfloat16().double() for t in tensors]
    oracle, oracle_lse = cross_attn_reference(*wide, None, 0.25)
    large = [(t * factor).bfloat16() for t, factor in zip(wide, (2.0**70, 2.0**70, 1), strict=True)]
    out, lse = KERNELS.cross_attn_fwd(*large, None, 0.25 * 2.0**-140)
    torch.testing.assert_close(out.double(), oracle, rtol=2**-7, atol=2**-7)
    torch.testing.assert_close(lse.double(), oracle_lse, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_lse_survives_beside_large_values():
    query, key = torch.randn(1, 2, 9, 8) * 1e3, torch.randn(2, 2, 11, 8) * 1e3
    value = torch.randn(2, 2, 11, 8) * 1e10
    grads = []
    for dtype in (torch.float32, torch.float64):
        leaves = [x.to(dtype).requires_grad_() for x in (query, key, value)]
        out, lse = ops.cross_attn_lse(*leaves, scale=1.0)
        grads.append(torch.autograd.grad((out.sum() + lse.sum()), leaves[:2]))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1.0)


@pytest.mark.parametrize("scale", [7.0, 100.0])
def test_whole_numbers_have_exact_scores(scale):
    """log2(e) times a score of thousands would be off by a thousandth of a weight."""
    query, key = torch.randint(-9, 9, (1, 2, 60, 16)), torch.randint(-9, 9, (2, 2, 300, 16))
    query, key = query.float(), key.float()
    found, exact = (
        ops.cross_attn_weights(query.to(d), key.to(d), scale=scale / 64, impl="cpu")
        for d in (torch.float32, torch.float64)
    )
    assert float((found.double() - exact).abs().max()) < 1e-6  # sums of 300 terms


def test_logits_of_ten_thousand():
    # the scores are exact integers, so the softmax of float32 is that of float64
    query, key = torch.randint(-9, 9, (1, 2, 30, 16)), torch.randint(-9, 9, (2, 2, 49, 16))
    against_reference(query.float(), key.float(), torch.randn(2, 2, 49, 16), 16.0, 1e-5)


def test_denormal_inputs():
    query, key, value = (torch.randn(1, 2, 9, 8) * 1e-39 for _ in range(3))
    against_reference(query, key, value, 1.0, 1e-6)


def test_products_beyond_the_range_of_float16():
    query, key = (torch.full((1, 1, 4, 64), 300.0, dtype=torch.float16) for _ in range(2))
    key[:, :, 0] = 299.0
    value = torch.randn(1, 1, 4, 64).half()
    against_reference(query, key, value, 1e-4, 2e-3)


def test_infinite_scores_are_as_in_the_reference():
    query, key, value = (
        torch.rand(1, 1, 6, 4) + 1,
        torch.randn(1, 1, 600, 4),
        torch.randn(1, 1, 600, 4),
    )
    key[:, :, :300] = -torch.inf  # a whole first tile without weight
    against_reference(query, key, value, 0.5, 1e-5)
    key[:, :, 400] = torch.inf
    against_reference(query, key, value, 0.5, 1e-5)
    key[:] = -torch.inf
    against_reference(query, key, value, 0.5, 1e-5)


def test_nan_stays_where_it_belongs():
    query, key, value = (torch.randn(2, 2, 21, 8) for _ in range(3))
    query[0, 1, 5, 3] = torch.nan
    value[1, 0, 4, 2] = torch.nan
    against_reference(query, key, value, 0.5, 1e-5)
    # a NaN with any payload stays NaN through the exponential
    query.view(torch.int32)[0, 1, 5, 3] = 0x7F800001 + 0x1FF
    out, _ = KERNELS.cross_attn_fwd(query, key, value, None, 0.5)
    assert out[0, 1, 5].isnan().all()


def test_masked_tiles_hold_anything():
    query, key, value = (
        torch.randn(1, 2, 5, 8),
        torch.randn(2, 2, 600, 8),
        torch.randn(2, 2, 600, 8),
    )
    mask = torch.rand(2, 600) > 0.5
    clean = attention(query, key, value, mask)
    hidden = ~mask[:, None, :, None]
    poisoned = attention(
        query, key.masked_fill(hidden, torch.nan), value.masked_fill(hidden, torch.inf), mask
    )
    assert same(clean, poisoned)


def test_cosine_of_rows_at_the_ends_of_the_range():
    for size in (1e-42, 1e-30, 1.0, 1e30, 3e37):
        image, text = torch.randn(3, 40) * size, torch.randn(5, 40) * size
        logits, _, _ = KERNELS.cosine_logits_fwd(image, text, 1.0)
        unit = torch.nn.functional.normalize
        oracle = unit(image.double(), dim=1, eps=0.0) @ unit(text.double(), dim=1, eps=0.0).T
        assert float((logits.double() - oracle).abs().amax()) < 1e-6, size


SIZES = {"B": 2, "H": 3, "K": 5, "L": 7, "d": 8, "D": 8, "C": 8, "F": 6}


def arguments(kernel: str) -> dict[str, object]:
    """What a kernel takes, by name; of a backward with the outputs of its forward."""
    op = OPS[kernel[:-4]]
    inputs = op.draw(SIZES, **({"penalty": "linf"} if "penalty" in op.arguments else {}))
    values = op.forward_arguments(inputs)
    if kernel.endswith("_bwd"):
        outputs = tensors_of(getattr(KERNELS, f"{op.name}_fwd")(*values))
        values = op.backward_arguments(inputs, outputs)
    schema = getattr(KERNELS, kernel).default._schema
    return dict(zip((argument.name for argument in schema.arguments), values, strict=True))


# kernel -> (argument, a tensor of that shape or a value, what is said); the first names the kernel
REFUSED = {
    "cross_attn_fwd": [
        ("value", torch.zeros(2, 3, 7, 4), r"cross_attn_fwd: value must be \[2, 3, 7, 8\], got"),
        ("query", torch.zeros(3, 3, 5, 8), r"query must be \[2, 3, 5, 8\] \(first axis 1"),
        ("key", torch.zeros(2, 3, 7, 8).half(), "key must have dtype Float, got Half"),
        ("key_mask", torch.zeros(2, 6).bool(), r"key_mask must be \[2, 7\]"),
        ("query", torch.zeros(3, 5, 8), "query must have 4 dimensions"),
    ],
    "unit_products_bwd": [
        (
            "grad_products",
            torch.zeros(2, 4, 8),
            r"unit_products_bwd: grad_products must be \[2, 5, 8\], got \[2, 4, 8\]",
        ),
        ("grad_image", torch.zeros(5, 8), r"grad_image must be \[2, 8\], got"),
        ("grad_text", torch.zeros(5), r"grad_text must be \[5, 8\], got \[5\]"),
        ("image", torch.zeros(2), r"image must have 2 dimensions, got \[2\]"),
        ("text", torch.zeros(5, 7), r"text must be \[5, 8\], got \[5, 7\]"),
        ("text", torch.zeros(5, 8).double(), "text must have dtype Float, got Double"),
    ],
    "rational_head_bwd": [
        (
            "weight",
            torch.zeros(8, 7),
            r"rational_head_bwd: weight must be \[8, 8\], got \[8, 7\]",
        ),
        ("text", torch.zeros(4, 8), r"text must be \[5, 8\], got"),
        ("grad_logits", torch.zeros(5, 2), r"grad_logits must be \[2, 5\], got"),
        ("peak", torch.zeros(0, dtype=torch.int64), r"peak must be \[2\], got \[0\]"),
        ("peak", torch.zeros(2), "peak must have dtype Long, got Float"),
        ("penalty", 4, "penalty must be 0, 1, 2 or 3, got 4"),
    ],
    "ffn_cosine_logits_bwd": [
        (
            "weight",
            torch.zeros(8, 7),
            r"ffn_cosine_logits_bwd: weight must be \[8, 6\], got \[8, 7\]",
        ),
        ("hidden", torch.zeros(2, 6), "hidden must have 3 dimensions"),
        ("residual_input", torch.zeros(2, 5, 7), r"residual_input must be \[2, 5, 8\], got"),
        ("stats", torch.zeros(5, 2, 5), r"stats must be \[7, 2, 5\], got \[5, 2, 5\]"),
        ("stats", torch.zeros(7, 2, 5).double(), "stats must have dtype Float, got Double"),
        ("image", torch.zeros(2, 8).half(), "image must have dtype Float, got Half"),
    ],
}


@pytest.mark.parametrize(
    ("kernel", "name", "value", "message"),
    [(kernel, *case) for kernel, cases in REFUSED.items() for case in cases],
)
def test_memory_is_protected_below_the_public_checks(kernel, name, value, message):
    given = {**arguments(kernel), name: value}
    with pytest.raises(RuntimeError, match=message):
        getattr(KERNELS, kernel)(*given.values())


@pytest.mark.parametrize("kernel", REFUSED)
def test_a_tensor_of_another_rank_is_named_with_its_operator(kernel):
    given = arguments(kernel)
    for name, value in given.items():
        if isinstance(value, torch.Tensor):
            wrong = {**given, name: value[None, None]}
            with pytest.raises(RuntimeError, match=f"{kernel}: {name} must "):
                getattr(KERNELS, kernel)(*wrong.values())


def test_a_peak_outside_the_mask_touches_nothing():
    tensors = [torch.randn(shape) for shape in ((2, 5), (2,), (2, 5, 8), (8, 8), (8,), (2, 8))]
    text, far = torch.randn(5, 8), torch.tensor([1 << 40, -1])
    with_far = KERNELS.rational_head_bwd(*tensors, text, far, 1.0, 3, True)
    without = KERNELS.rational_head_bwd(*tensors, text, far[:0], 1.0, 0, True)
    assert same(with_far, without)
