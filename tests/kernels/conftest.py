# SPDX-License-Identifier: Apache-2.0
"""Kernel tests run on a GPU where there is one, else in Triton's interpreter on CPU tensors."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

pytest.importorskip("triton", reason="triton is not installed")


@pytest.fixture
def device():
    if os.environ.get("TRITON_INTERPRET") == "1":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no GPU, and the interpreter is switched off by TRITON_INTERPRET")
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    """Fresh memory is NaN, so an element that a kernel forgets fails the comparison."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    assert torch.zeros(1).new_empty((3,)).isnan().all()
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)
