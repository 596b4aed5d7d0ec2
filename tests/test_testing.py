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
