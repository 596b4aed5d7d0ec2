# SPDX-License-Identifier: Apache-2.0
"""The error budget must fail a result that is wrong by 0.1 %, or late by one element; inputs of the
operators are what their table says."""

from __future__ import annotations

import pytest
import torch

from vtclip import ops, testing
from vtclip.backends import native, schemas
from vtclip.testing.problems import FUNCTIONS, OPS, tensors_of

SIZES = {"B": 3, "K": 5, "L": 7, "H": 2, "d": 8, "D": 6, "C": 12, "F": 4}
SAMPLES = [(name, variant) for name, op in OPS.items() for variant in ("", *op.variants)]


def results(dtype: torch.dtype):
    image, text = torch.randn(8, 64).to(dtype), torch.randn(9, 64).to(dtype)
    oracle = ops.cosine_logits(image.double(), text.double(), impl="reference")
    return oracle, ops.cosine_logits(image, text, impl="reference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_reference_passes_and_a_tenth_of_a_percent_fails(dtype):
    oracle, peer = results(dtype)
    testing.assert_within_budget(peer, oracle, peer)
    with pytest.raises(AssertionError, match="error .*, allowed"):
        testing.assert_within_budget(peer * 1.001, oracle, peer)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_fail_at_three_rounding_steps(dtype):
    oracle, peer = results(dtype)
    step = torch.finfo(dtype).eps * oracle.abs().amax()
    with pytest.raises(AssertionError, match="error .*, allowed"):
        testing.assert_within_budget((oracle + 3 * step).to(dtype), oracle, peer)


def test_one_wrong_element_nan_shape_or_dtype_fails():
    oracle, peer = results(torch.float32)
    wrong = peer.clone()
    wrong[3, 4] += 1e-3
    with pytest.raises(AssertionError, match="allowed"):
        testing.assert_within_budget(wrong, oracle, peer)
    wrong[3, 4] = float("nan")
    with pytest.raises(AssertionError, match="non-finite"):
        testing.assert_within_budget(wrong, oracle, peer)
    with pytest.raises(AssertionError, match="wanted"):
        testing.assert_within_budget(peer[:1], oracle, peer)
    with pytest.raises(AssertionError, match="wanted"):
        testing.assert_within_budget(peer.double(), oracle, peer)


def test_layouts_keep_the_values_and_change_the_memory():
    plain = torch.randn(3, 5)
    gaps = testing.spread(plain)
    assert torch.equal(gaps, plain)
    assert not gaps.is_contiguous()
    assert gaps.as_strided((3, 10), (10, 1)).isnan().sum() == 15
    shifted = testing.misaligned(plain)
    assert torch.equal(shifted, plain)
    assert shifted.data_ptr() % 16 == 4


def test_poisoned_empty_poisons_and_restores():
    with testing.poisoned_empty():
        assert torch.empty(3).isnan().all()
        assert torch.ones(2).new_empty(4).isnan().all()
    assert torch.empty.__name__ == "empty"


def test_tf32_products_cut_the_operands_of_every_product_and_nothing_else():
    a, b = torch.randn(5, 40), torch.randn(40, 3)
    added = torch.full((5, 3), 1 + 2.0**-20)  # not to be cut
    cut = testing.as_tf32(a), testing.as_tf32(b)
    error = float(((cut[0] - a) / a).abs().max())
    assert 2.0**-11 < error < 2.0**-10
    assert (cut[0].abs() <= a.abs()).all()
    leaves = [t.clone().requires_grad_() for t in (a, b)]
    with testing.tf32_products():
        product = leaves[0] @ leaves[1]
        d_a, d_b = torch.autograd.grad(product.sum(), leaves)
        sums = torch.addmm(added, a, b)
        batched = torch.matmul(a.expand(2, 5, 40), b.expand(2, 40, 3))
    wanted = cut[0] @ cut[1]
    torch.testing.assert_close(product, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(batched[1], wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(sums - added, wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(d_a, cut[1].sum(1).expand(5, 40), rtol=0, atol=1e-5)
    torch.testing.assert_close(d_b, cut[0].sum(0)[:, None].expand(40, 3), rtol=0, atol=1e-5)
    assert float((product.detach() - a @ b).abs().max()) > 1e-4


def test_the_table_of_inputs_names_every_schema():
    assert {f"{name}_{way}" for name in OPS for way in ("fwd", "bwd")} == set(schemas.SCHEMAS)


@pytest.mark.parametrize(("name", "variant"), SAMPLES)
def test_an_entry_tells_how_to_call_forward_backward_and_reference(name, variant):
    """With fakes, and with the compiled kernels where they are built."""
    op = OPS[name]
    inputs, again = (op.draw(SIZES, variant=variant) for _ in range(2))
    for key, value in inputs.items():
        assert torch.equal(again[key], value) if isinstance(value, torch.Tensor) else True
    assert set(op.sizes) <= set(SIZES)
    expected = op.reference(inputs)
    outputs, _ = op.run(schemas.FAKES.__getitem__, inputs)
    assert [out.shape for out in outputs][: len(expected)] == [out.shape for out in expected]
    if native.load_cpu():
        pytest.skip("vtclip._C is not built")
    outputs, grads = op.run(lambda kernel: getattr(torch.ops.vtclip, kernel), inputs)
    for actual, wanted in zip(outputs, expected, strict=False):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_function_is_called_as_its_entry_says(name):
    function = FUNCTIONS[name]
    plain = function.draw(SIZES)
    strided = function.draw(SIZES, heads_inside=True)
    assert [leaf.shape for leaf in plain] == [leaf.shape for leaf in strided]
    for leaves in (plain, strided):
        assert all(leaf.is_leaf and leaf.requires_grad for leaf in leaves)
        grads = torch.autograd.grad(function(*leaves, impl="reference").sum(), leaves)
        assert all(grad.isfinite().all() for grad in grads)
    for _, variant in function.variants():
        assert tensors_of(variant.outputs(*variant.draw(SIZES)))[0].isfinite().all()
