# SPDX-License-Identifier: Apache-2.0
"""Nearest neighbours: exact in chunks and with ties, and those that voyager finds."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vtclip.train import neighbours
from vtclip.train.neighbours import approximate, nearest, neighbours_of


def classes(N: int, C: int, K: int = 20, within: int = 12) -> Tensor:
    """Images of K classes that differ within a class in `within` directions of its own."""
    generator = torch.Generator().manual_seed(3)
    label = torch.arange(N) % K
    means = F.normalize(torch.randn(K, C, generator=generator), dim=1)
    ways = torch.randn(K, within, C, generator=generator) / C**0.5
    image = 0.5 + means[label] * C**0.5
    for k in range(K):
        drawn = torch.randn(int((label == k).sum()), within, generator=generator)
        image[label == k] += drawn @ ways[k] * C**0.5 * 0.2
    return F.normalize(image.double(), dim=1)


def test_chunks_are_all_neighbours(monkeypatch):
    image = classes(50, 6)
    whole = nearest(image)
    table = image @ image.T
    table.fill_diagonal_(-2)
    assert torch.equal(whole.index, table.sort(dim=1, descending=True, stable=True).indices[:, :3])
    for name, value in ("ROWS", 7), ("CELLS", 150):
        monkeypatch.setattr(neighbours, name, value)
        parts = nearest(image)
        assert torch.equal(whole.index, parts.index)
        torch.testing.assert_close(whole.weight, parts.weight)


def test_of_equal_cosines_the_first_counts():
    image = torch.eye(3, 4, dtype=torch.float64)[[0, 0, 0, 0, 0, 0, 1, 2]]
    found = nearest(image, 2)
    assert found.index.tolist() == [[1, 2], [0, 2], [0, 1], [0, 1], [0, 1], [0, 1], [0, 1], [0, 1]]
    assert found.weight[6:].tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("N", [0, 1, 2, 3])
def test_few_images(N):
    found = nearest(classes(N, 5))
    assert found.index.shape == found.weight.shape == (N, min(3, max(0, N - 1)))
    assert found.both_ways(torch.ones(N, 2, dtype=torch.float64)).shape == (N, 2)


def test_voyager_finds_nearly_all_of_them_and_always_the_same():
    voyager = pytest.importorskip("voyager", reason="the extra `together` is not installed")
    image = classes(3000, 64)
    exact, found = nearest(image), approximate(voyager, image)
    hits = (found.index[:, :, None] == exact.index[:, None, :]).any(dim=2).double().mean()
    assert float(hits) > 0.97
    assert not bool((found.index == torch.arange(3000)[:, None]).any())
    cosines = (image[:, None] * image[found.index]).sum(dim=2)
    torch.testing.assert_close(found.weight, cosines.clamp(min=0))
    again = approximate(voyager, image)
    assert torch.equal(found.index, again.index)
    assert torch.equal(found.weight, again.weight)


class Absent:
    """Stands in for voyager, and says what it was asked for."""

    class Space:
        InnerProduct = "ip"

    def __init__(self) -> None:
        self.asked: dict[str, object] = {}

    def Index(self, space: str, **settings: object) -> Absent:
        self.asked |= settings
        return self

    def add_items(self, rows: object, num_threads: int) -> None:
        self.rows = torch.as_tensor(rows)
        self.asked["threads"] = num_threads

    def query(self, rows: object, k: int, **settings: object) -> tuple[object, None]:
        table = torch.as_tensor(rows) @ self.rows.T
        table[0, 0] = -2.0  # an image that its own search does not find
        return table.topk(k, dim=1).indices.numpy(), None


def test_above_a_number_of_images_the_library_is_asked(monkeypatch, caplog):
    image = classes(60, 8)
    exact, standin = nearest(image), Absent()
    monkeypatch.setattr(neighbours, "EXACT_UP_TO", 59)
    monkeypatch.setattr(neighbours, "library", lambda: standin)
    found = neighbours_of(image)
    assert [set(row) for row in found.index.tolist()] == [set(r) for r in exact.index.tolist()]
    assert standin.asked["threads"] == 1
    assert standin.asked["random_seed"] == 1
    assert neighbours.search_of(60) == "approximate"
    assert neighbours.search_of(59) == "exact"
    monkeypatch.setattr(neighbours, "library", lambda: None)
    with caplog.at_level(logging.WARNING, logger="vtclip"):
        assert torch.equal(neighbours_of(image).index, exact.index)
    assert "60 images: their neighbours are searched among all pairs, which takes about" in (
        caplog.text
    )
    assert "pip install 'vtclip[together]'" in caplog.text
    assert neighbours.search_of(60) == "exact"
