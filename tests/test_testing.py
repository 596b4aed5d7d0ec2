# SPDX-License-Identifier: Apache-2.0
"""The error budget itself: it must fail a result that is wrong by 0.1 %, or late by one element."""

from __future__ import annotations

import pytest
import torch

from vtclip import ops, testing


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
