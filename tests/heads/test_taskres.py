# SPDX-License-Identifier: Apache-2.0
"""TaskRes is cosines to moved texts; it starts at zero-shot, and alpha scales its steps."""

from __future__ import annotations

import torch
from support_sets import table
from torch import Tensor
from torch.nn import functional as F

from vtclip.heads import TaskRes, ZeroShot

K = 4
LABEL = torch.tensor([0, 1, 2, 3, 1, 0])


def moved(text: Tensor, alpha: float) -> TaskRes:
    head = TaskRes(text, alpha=alpha, logit_scale=30.0)
    torch.nn.init.normal_(head.residual)
    return head


def test_is_the_cosine_to_the_moved_text():
    text, image, _ = table(K, LABEL)
    head = moved(text, 0.3)
    for b, v in enumerate(image):
        for k in range(K):
            w = text[k] / text[k].norm() + 0.3 * head.residual[k]
            wanted = 30.0 * (v @ w) / (v.norm() * w.norm())
            torch.testing.assert_close(head(image)[b, k], wanted, rtol=1e-10, atol=1e-10)


def test_starts_at_zero_shot():
    text, image, _ = table(K, LABEL)
    torch.testing.assert_close(TaskRes(text)(image), ZeroShot(text)(image), rtol=1e-12, atol=1e-12)


def test_lengths_of_texts_and_images_do_not_matter():
    text, image, _ = table(K, LABEL)
    head, other = moved(text, 0.3), TaskRes(7 * text, alpha=0.3, logit_scale=30.0)
    other.load_state_dict({**head.state_dict(), "text": 7 * text})
    torch.testing.assert_close(other(5 * image), head(image), rtol=1e-10, atol=1e-10)


def test_alpha_scales_residual_and_gradient():
    text, image, _ = table(K, LABEL)
    head = moved(text, 0.3)
    twice = TaskRes(text, alpha=0.6, logit_scale=30.0)
    twice.load_state_dict({**head.state_dict(), "residual": head.residual / 2})
    torch.testing.assert_close(twice(image), head(image), rtol=1e-12, atol=1e-12)
    for one in (head, twice):
        F.cross_entropy(one(image), LABEL).backward()
    torch.testing.assert_close(twice.residual.grad, 2 * head.residual.grad)


def test_a_residual_moves_no_other_class():
    text, image, _ = table(K, LABEL)
    head = moved(text, 0.3)
    before = head(image)
    with torch.no_grad():
        head.residual[2] += torch.randn_like(head.residual[2])
    others = torch.tensor([0, 1, 3])
    assert torch.equal(head(image)[:, others], before[:, others])
    assert not torch.allclose(head(image)[:, 2], before[:, 2])
