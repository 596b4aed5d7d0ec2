# SPDX-License-Identifier: Apache-2.0
"""The block code of the CUDA cosine_logits kernels on the host, against the reference."""

from __future__ import annotations

import pytest
import torch

from vtclip import ops, testing

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
CASES = {
    "odd": (3, 5, 17, 1.0),
    "one": (1, 1, 1, 1.0),
    "wider than a block": (2, 3, 301, 1.0),
    "no image": (0, 3, 4, 1.0),
    "no class": (2, 0, 4, 1.0),
    "no width": (2, 3, 0, 1.0),
    "huge": (2, 7, 33, 1e30),
}


@pytest.fixture(scope="module")
def program(build):
    return build("cosine_logits")


def check(program, image, text, d_logits):
    inputs = [image.requires_grad_(), text.requires_grad_()]
    wide = [t.detach().double().requires_grad_() for t in inputs]
    oracle = ops.cosine_logits(*wide, scale=3.0, impl="reference")
    peer = ops.cosine_logits(*inputs, scale=3.0, impl="reference")
    oracles = [oracle, *torch.autograd.grad(oracle, wide, d_logits.double())]
    peers = [peer, *torch.autograd.grad(peer, inputs, d_logits)]
    results = program((image, text, d_logits), numbers=(3.0,))
    for name, *three in zip(("logits", "d_image", "d_text"), results, oracles, peers, strict=True):
        actual, oracle64, peer = (t.detach() for t in three)
        factor = testing.FORWARD_FACTOR if name == "logits" else testing.GRADIENT_FACTOR
        testing.assert_within_budget(actual, oracle64, peer, factor=factor, name=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("per_image", [False, True], ids=["shared", "per-image"])
@pytest.mark.parametrize("case", CASES)
def test_block_code_matches_the_reference(program, case, per_image, dtype):
    B, K, D, size = CASES[case]
    size = min(size, 1e3 if dtype == torch.float16 else size)
    image = (size * torch.randn(B, D)).to(dtype)
    text = (size * torch.randn((B, K, D) if per_image else (K, D))).to(dtype)
    if B > 1:
        image[0] = 0
    check(program, image, text, torch.randn(B, K).to(dtype))


@pytest.mark.parametrize("per_image", [False, True], ids=["shared", "per-image"])
def test_any_strides(program, per_image):
    image = testing.spread(torch.randn(3, 9))
    text = testing.spread(torch.randn((3, 4, 9) if per_image else (4, 9)))
    check(program, image, text, torch.randn(4, 3).t())
    check(program, image[:1].expand(3, 9).detach(), text.detach(), torch.randn(1, 1).expand(3, 4))
