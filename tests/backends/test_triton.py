# SPDX-License-Identifier: Apache-2.0
"""When the Triton backend steps back for the CUDA library."""

import pytest
import torch

from vtclip.backends import native, triton
from vtclip.backends.problem import Problem

PROBLEM = Problem("cross_attn", "cuda", torch.float16, 64)


def reasons(monkeypatch, capability, *, missing="", hip=None):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(triton, "gpu_identity", lambda: ("GPU", capability))
    monkeypatch.setattr(triton, "load", lambda: "")
    monkeypatch.setattr(native, "load_cuda", lambda: missing)
    return triton.TRITON.why_not(PROBLEM)


@pytest.mark.parametrize("capability", [70, 75])
def test_an_older_gpu_takes_the_cuda_library_where_it_loads(capability, monkeypatch):
    (reason,) = reasons(monkeypatch, capability)
    assert reason == (
        f"needs compute capability 8.0 where the CUDA library loads, got 7.{capability - 70}"
    )
    assert not reasons(monkeypatch, capability, missing="the CUDA library is not built")


@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_newer_gpus_keep_triton(capability, monkeypatch):
    assert not reasons(monkeypatch, capability)


def test_amd_has_no_capability_to_ask_for(monkeypatch):
    assert not reasons(monkeypatch, 0, hip="6.4")
