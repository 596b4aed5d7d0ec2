# SPDX-License-Identifier: Apache-2.0
"""The rows of an epoch: each once where classes have as many, each class as often elsewhere."""

from __future__ import annotations

import pytest
import torch

from vtclip.train.rows import epoch_rows, epoch_size, shuffled


def test_equal_classes_have_the_order_they_always_had():
    index = torch.arange(100, 124)
    label = torch.arange(4).repeat(6)
    for epoch in range(3):
        wanted = shuffled(index, 5, epoch)
        assert torch.equal(epoch_rows(index, label, 5, epoch), wanted)
        assert torch.equal(epoch_rows(index, None, 5, epoch), wanted)
    assert epoch_size(index, label) == epoch_size(index, None) == 24


@pytest.mark.parametrize("sizes", [(16, 3, 16), (1, 40), (5, 0, 7, 9), (2, 3)])
def test_every_class_is_shown_as_often_as_the_others(sizes):
    label = torch.cat([torch.full((n,), k) for k, n in enumerate(sizes)])
    index = torch.randperm(len(label))
    label, present = label[index], [n for n in sizes if n]
    each = max(1, round(sum(present) / len(present)))
    shown = torch.zeros(len(index), dtype=torch.long)
    for epoch in range(40):
        rows = epoch_rows(index, label, 1, epoch)
        assert len(rows) == epoch_size(index, label) == each * len(present)
        of_row = torch.zeros(len(index), dtype=torch.long)
        of_row[index] = label
        assert sorted(torch.bincount(of_row[rows]).tolist()) == [
            *[0] * sizes[: int(label.max()) + 1].count(0), *[each] * len(present)
        ]  # fmt: skip
        shown += torch.bincount(rows, minlength=len(index))
        assert torch.equal(rows, epoch_rows(index, label, 1, epoch))  # of seed and epoch alone
    assert bool((shown > 0).all())  # a large class leaves out other rows in each epoch
