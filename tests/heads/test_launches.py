# SPDX-License-Identifier: Apache-2.0
"""GPU kernels per step of the heads, counted on the launchers' sm_90 path; no value is computed."""

from __future__ import annotations

import importlib.util
import os
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from vtclip import heads
from vtclip.heads import _feed_forward
from vtclip.testing.problems import FUNCTIONS

if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
    pytest.skip("launches are noted in Triton's interpreter", allow_module_level=True)

import launch_counting as launches


def kernels(call, parameters) -> tuple[list[str], list[str]]:
    """Names of the kernels of a call, and of the backward of what it returns."""
    with launches.counting() as forward:
        outputs = call()
    outputs = [out for out in outputs if out.requires_grad]
    grads = [torch.ones_like(out) for out in outputs]
    with launches.counting() as backward:
        torch.autograd.grad(outputs, parameters, grads, allow_unused=True)
    return forward, backward


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(shape), dim=-1).bfloat16()


@pytest.mark.parametrize("penalty", ["none", "mse"])
def test_rada_of_fifty_classes(penalty):
    """Products, 3 projections, attention, 2 of the head; backward 4 of it, 2 of the attention, 4.

    The head's columns are split over four times the programs, whose sums a second kernel adds up.
    """
    head = heads.RAda(unit(50, 512), penalty=penalty)
    image = unit(32, 512)
    forward, backward = kernels(lambda: head.forward_with_penalty(image), list(head.parameters()))
    assert len(forward) == 7, forward
    assert len(backward) == 10, backward
    assert forward[-3] == "rational_attn_fwd_kernel"
    assert forward[-2:] == ["rational_head_fwd_kernel", "rational_head_finish_kernel"]


def test_an_unused_penalty_costs_nothing():
    head = heads.RAda(unit(50, 512), penalty="linf")
    image = unit(32, 512)
    call = lambda: head.forward_with_penalty(image)[:1]  # noqa: E731
    _, backward = kernels(call, list(head.parameters()))
    assert len(backward) == 10, backward


def test_vtclip_of_a_hundred_classes(monkeypatch):
    monkeypatch.setattr(_feed_forward, "on_gpu", lambda *_: True)
    head = heads.VTCLIP(unit(100, 1024), num_heads=8, init="torch")
    inputs = unit(32, 1024), unit(32, 49, 1024)
    forward, backward = kernels(lambda: (head(*inputs),), list(head.parameters()))
    assert len(forward) == 15, forward
    assert len(backward) <= 45, backward
    copies = [name for name in backward if name in ("clone", "copy_", "new_zeros", "zeros")]
    assert len(copies) <= 6, backward


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: float(x[0]),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: torch.equal(x, x),
        lambda x: torch.cuda.synchronize(),
    ],
)
def test_waiting_for_the_device_is_seen(wait):
    x = torch.ones(3)
    with pytest.raises(launches.Synchronises), launches.counting():
        wait(x)


def test_every_op_without_a_fill_or_a_copy():
    """Each op launches Triton's kernels and torch's matrix products, and never waits."""
    sizes = {"B": 4, "K": 50, "H": 2, "L": 49, "d": 64, "D": 128, "C": 128, "F": 128}
    leaves = {name: op.draw(sizes, dtype=torch.bfloat16) for name, op in FUNCTIONS.items()}
    calls = {name: partial(op.outputs, *leaves[name]) for name, op in FUNCTIONS.items()}
    visible = torch.rand(4, 49) > 0.5
    calls["cross_attn, masked"] = partial(calls["cross_attn"], key_mask=visible)
    for name, call in calls.items():
        forward, backward = kernels(call, leaves[name.partition(",")[0]])
        assert forward, name
        products = [kernel for kernel in forward if not kernel.endswith("_kernel")]
        assert products == ["mm"] * (name == "ffn_cosine_logits"), (name, forward)
        own = [kernel for kernel in backward if kernel.endswith("_kernel")]
        rest = [kernel for kernel in backward if not kernel.endswith("_kernel")]
        assert own, name
        assert set(rest) <= {"mm"}, (name, rest)
        most = 7 if name == "ffn_cosine_logits" else 5  # it has most parameters to sum
        assert len(own) <= most, (name, own)
