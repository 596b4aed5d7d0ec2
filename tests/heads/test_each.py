# SPDX-License-Identifier: Apache-2.0
"""RAda with parameters per image against the head itself, trained one image at a time."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vtclip.heads import VTCLIP, RAda
from vtclip.heads._each import StackedRAda, bytes_per_image, can_stack
from vtclip.testing import assert_within_budget
from vtclip.train import ttt

N, M, K, D = 5, 3, 7, 16
QUERIES = [("image", "text", "pair"), ("image",), ("text",), ("pair", "image")]


def rada(dtype: torch.dtype = torch.float64, *, zero: bool = False, **options: object) -> RAda:
    head = RAda(torch.randn(K, D, dtype=dtype), num_heads=4, logit_scale=30.0, **options)  # type: ignore[arg-type]
    if not zero:
        torch.nn.init.normal_(head.out.weight, std=0.3)  # type: ignore[arg-type]
        torch.nn.init.normal_(head.out.bias, std=0.1)  # type: ignore[arg-type]
    return head


def views(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(N, M, D, dtype=dtype), torch.randn(N, D, dtype=dtype)


def mean_entropy(logits: Tensor) -> Tensor:
    """H of the mean softmax over the views, [M, K] -> scalar, as the paper writes it."""
    p = F.softmax(logits, dim=-1).mean(dim=0)
    return -(p * p.log()).sum()


def one_at_a_time(
    head: RAda, kept: Tensor, first: Tensor, config: ttt.TTT
) -> tuple[Tensor, list[RAda]]:
    """A copy of the head, a fresh torch.optim.AdamW and plain calls, image by image."""
    heads, rows = [], []
    for image, plain in zip(kept, first, strict=True):
        own = deepcopy(head)
        optimizer = torch.optim.AdamW(own.parameters(), config.lr, weight_decay=config.weight_decay)
        for _ in range(config.steps):
            optimizer.zero_grad()
            mean_entropy(own(image)).backward()
            optimizer.step()
        heads.append(own)
        rows.append(own(plain[None])[0].detach())
    return torch.stack(rows), heads


@pytest.mark.parametrize("queries", QUERIES)
def test_equal_parameters_give_the_heads_logits(queries: tuple[str, ...]) -> None:
    head = rada(queries=queries, logit_bias=0.5, temperature=0.7)
    image, _ = views()
    wanted = head(image.flatten(0, 1)).view(N, M, K).detach()
    assert_within_budget(StackedRAda(head, N)(image).detach(), wanted, wanted)


@pytest.mark.parametrize("queries", QUERIES)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("zero", [False, True])
def test_a_stack_steps_as_each_image_by_itself(
    queries: tuple[str, ...], steps: int, zero: bool
) -> None:
    head = rada(zero=zero, queries=queries)
    kept, first = views()
    config = ttt.TTT(lr=3e-2, steps=steps, weight_decay=0.1)
    each = StackedRAda(head, N)
    logits = ttt.adapt_stack(each, kept, first, config)
    wanted, heads = one_at_a_time(head, kept, first, config)
    moved = float((wanted - head(first).detach()).abs().amax())
    assert moved > 0.1
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-9 * moved)
    for name, stack in each.stacks.items():
        alone = torch.stack([one.get_parameter(name).detach() for one in heads])
        torch.testing.assert_close(stack.detach(), alone, rtol=0, atol=1e-9)
    short = ttt.adapt_stack(StackedRAda(head, N, first_step_only=steps == 1), kept, first, config)
    torch.testing.assert_close(short, wanted, rtol=0, atol=1e-9 * moved)


def test_float32_is_as_near_to_float64_as_the_loop() -> None:
    head, (kept, first) = rada(torch.float32), views(torch.float32)
    config = ttt.TTT(lr=1e-2, steps=2)
    wide = one_at_a_time(deepcopy(head).double(), kept.double(), first.double(), config)[0]
    narrow = one_at_a_time(head, kept, first, config)[0]
    found = ttt.adapt_stack(StackedRAda(head, N), kept, first, config)
    # two roundings of the same sums: one more step of the largest logit
    floor = torch.finfo(torch.float32).eps * float(wide.abs().amax())
    assert_within_budget(found, wide, narrow, factor=3.0, floor=floor)


def test_the_first_step_from_zero_moves_out_alone() -> None:
    head, (kept, _) = rada(zero=True), views()
    each = StackedRAda(head, N)
    ttt.entropy(ttt.mean_log_prob(each(kept))).sum().backward()
    for name, stack in each.stacks.items():
        grad = stack.grad
        assert grad is not None
        # every other gradient passes out.weight, which is 0
        assert bool(grad.any()) == name.startswith("out."), name
    assert set(StackedRAda(head, N, first_step_only=True).stacks) == {"out.weight", "out.bias"}
    assert len(StackedRAda(rada(), N, first_step_only=True).stacks) == len(
        each.stacks
    )  # not from zero


def test_frozen_parameters_stay() -> None:
    head, (kept, first) = rada(), views()
    head.pairs.requires_grad_(False)
    each = StackedRAda(head, N)
    assert not any(name.startswith("pairs.") for name in each.stacks)
    config = ttt.TTT(lr=1e-2, steps=2)
    found = ttt.adapt_stack(each, kept, first, config)
    wanted = torch.stack([ttt.adapt_one(head, kept[i], first[i], config=config) for i in range(N)])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


def test_images_do_not_meet_and_the_head_is_not_touched() -> None:
    head, (kept, first) = rada(), views()
    before = {name: value.clone() for name, value in head.state_dict().items()}
    config = ttt.TTT(lr=1e-2, steps=2)
    together = ttt.adapt_stack(StackedRAda(head, N), kept, first, config)
    kept[1:], first[1:] = torch.nan, torch.nan
    alone = ttt.adapt_stack(StackedRAda(head, N), kept, first, config)
    torch.testing.assert_close(alone[0], together[0], rtol=0, atol=1e-9)
    for name, value in head.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in head.parameters())


def test_which_heads_have_it_and_what_an_image_needs() -> None:
    head = rada()
    assert can_stack(head)
    assert not can_stack(rada(adapters=True))
    assert not can_stack(VTCLIP(torch.randn(K, D)))
    parameters = sum(p.numel() for p in head.parameters())
    assert bytes_per_image(head, 2) - bytes_per_image(head, 1) == 8 * 14 * K * D
    assert bytes_per_image(head, 1) > 4 * 8 * parameters
