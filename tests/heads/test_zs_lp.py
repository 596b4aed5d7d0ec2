# SPDX-License-Identifier: Apache-2.0
"""ZSLP and CLAP: cosines to free prototypes, and the pull of classes that zero-shot knows."""

from __future__ import annotations

import pytest
import torch
from support_sets import fitted, table, unit
from torch.nn import functional as F

from vtclip.heads import CLAP, ZSLP, Support, ZeroShot

K, C = 4, 8
LABEL = torch.tensor([0, 0, 0, 1, 1, 1, 3])  # class 2 has no support
SCALE = 10.0
both = pytest.mark.parametrize("kind", [ZSLP, CLAP])


@both
def test_is_the_cosine_to_the_prototype(kind):
    text, image, _ = table(K, LABEL)
    head = kind(text, logit_scale=SCALE)
    torch.nn.init.normal_(head.weight)
    wanted = SCALE * unit(image) @ unit(head.weight).T
    torch.testing.assert_close(head(image), wanted, rtol=1e-10, atol=1e-10)


@both
def test_starts_at_zero_shot_at_any_length(kind):
    text, image, _ = table(K, LABEL)
    for length in (1.0, 8.0):
        head = kind(text, text_length=length)
        torch.testing.assert_close(head.weight.norm(dim=1), torch.full((K,), length).double())
        wanted = ZeroShot(text)(image)
        torch.testing.assert_close(head(image), wanted, rtol=1e-10, atol=1e-10)


@both
def test_a_step_turns_long_prototypes_by_the_square_less(kind):
    text, image, _ = table(K, LABEL)
    label = torch.tensor([0, 1, 2, 3, 1, 0])
    turned = []
    for length in (1.0, 8.0):
        head = kind(text, text_length=length, logit_scale=SCALE)
        F.cross_entropy(head(image), label).backward()
        after = head.weight - 1e-6 * head.weight.grad
        turned.append(unit(after) - unit(head.weight))
    torch.testing.assert_close(turned[0], 64 * turned[1], rtol=1e-3, atol=1e-10)


def test_multipliers_are_the_mean_probability_of_the_class_of_its_images():
    text, _, support = table(K, LABEL)
    head = fitted(CLAP, text, support, logit_scale=SCALE)
    for k in range(K):
        rows = [row for row, y in zip(support.image, LABEL.tolist(), strict=True) if y == k]
        p = [torch.softmax(SCALE * unit(text) @ unit(row), dim=0)[k] for row in rows]
        wanted = sum(p) / len(p) if p else torch.tensor(1.0).double()
        torch.testing.assert_close(head.multiplier[k], wanted)


def test_penalty_is_the_weighted_square_of_the_distance():
    text, image, support = table(K, LABEL)
    head = fitted(CLAP, text, support, text_length=3.0)
    assert not bool(head.forward_with_penalty(image).penalty.any())
    with torch.no_grad():
        head.weight += torch.randn_like(head.weight)
    logits, penalty = head.forward_with_penalty(image)
    total = 0.0
    for k in range(K):
        away = head.weight[k] - 3.0 * text[k] / text[k].norm()
        total += float(head.multiplier[k] * (away.detach() ** 2).sum()) / K
    torch.testing.assert_close(penalty, torch.full((len(image),), total).double())
    assert torch.equal(logits, head(image))
    (slope,) = torch.autograd.grad(penalty.mean(), head.weight)
    wanted = 2 / K * head.multiplier[:, None] * (head.weight - head.start())
    torch.testing.assert_close(slope, wanted)


def test_the_order_and_the_lengths_of_the_images_do_not_matter():
    text, _, support = table(K, LABEL)
    order = torch.randperm(len(LABEL))
    mixed = Support(5 * support.image[order], LABEL[order])
    one, two = (fitted(CLAP, text, rows).multiplier for rows in (support, mixed))
    torch.testing.assert_close(one, two)


def test_a_larger_multiplier_keeps_prototypes_nearer_to_their_texts():
    text, image, support = table(K, LABEL)
    label = torch.tensor([2, 3, 0, 1, 0, 1])
    away = []
    for multiplier in (0.01, 1.0, 10.0):
        head = fitted(CLAP, text, support, text_length=1.0, logit_scale=SCALE)
        head.multiplier = torch.full((K,), multiplier).double()
        optimizer = torch.optim.SGD(head.parameters(), lr=0.01)
        for _ in range(50):
            optimizer.zero_grad()
            logits, penalty = head.forward_with_penalty(image)
            (F.cross_entropy(logits, label) + penalty.mean()).backward()
            optimizer.step()
        away.append(float((head.weight - head.start()).detach().norm()))
    assert away[0] > away[1] > away[2] > 0
