# SPDX-License-Identifier: Apache-2.0
"""The nearest others of each of many images: exactly, or in linear time by the library voyager.

Exactly means N^2 C products. Above EXACT_UP_TO images voyager (the extra `together`) searches its
graph of neighbours (hierarchical navigable small worlds, Malkov and Yashunin, arXiv 1603.09320),
built by one thread from one seed in the order of the images, so that the same images give the same
neighbours. Where voyager is absent all pairs are compared, and what that takes is said.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from torch import Tensor

from vtclip.files import several

logger = logging.getLogger(__name__)
NEIGHBOURS = 3
EXACT_UP_TO = 10_000  # images; up to there comparing all pairs takes no longer
ROWS, CELLS = 2048, 2**24  # of the table of cosines that is held at once, at most
TIMED_ROWS = 128  # by which the time of all pairs is estimated
LINKS, BUILT_FROM, SEARCHED = 12, 60, 40  # per image in voyager's graph, M, ef_construction, ef
EXTRA = "pip install 'vtclip[together]'"


class Neighbours:
    """The m nearest others of each of N images: `index` [N, m], `weight` [N, m] of at least 0."""

    def __init__(self, index: Tensor, weight: Tensor) -> None:
        self.index, self.weight = index, weight

    def both_ways(self, z: Tensor) -> Tensor:
        """sum_j (w_ij + w_ji) z_j for z [N, K], [N, K]."""
        out = torch.zeros_like(z)
        for column in range(self.index.shape[1]):
            index, weight = self.index[:, column], self.weight[:, column, None]
            out += weight * z[index]
            out.index_add_(0, index, weight * z)
        return out


def neighbours_of(image: Tensor, count: int = NEIGHBOURS) -> Neighbours:
    """The nearest neighbours of image [N, C] of length 1, by cosine; how, see the module."""
    if len(image) <= EXACT_UP_TO:
        return nearest(image, count)
    voyager = library()
    if voyager is not None:
        return approximate(voyager, image, count)
    logger.warning(
        "%s: their neighbours are searched among all pairs, which takes about %.0f s and grows "
        "with the square of their number; %s has a search in linear time",
        several(len(image), "image"), seconds_of_all_pairs(image), EXTRA,
    )  # fmt: skip
    return nearest(image, count)


def nearest(image: Tensor, count: int = NEIGHBOURS) -> Neighbours:
    """The exact nearest neighbours of image [N, C] of length 1, by cosine, fewer where N <= count.

    Time N^2 C, memory at most CELLS cosines. Of equal cosines the first in order counts.
    """
    count = min(count, len(image) - 1)
    index = torch.zeros(len(image), max(count, 0), dtype=torch.long)
    weight = image.new_zeros(index.shape)
    step = max(1, min(ROWS, CELLS // max(1, len(image))))
    for start in range(0, len(image) if count > 0 else 0, step):
        cosines = image[start : start + step] @ image.mT
        rows = torch.arange(len(cosines))
        cosines[rows, start + rows] = -torch.inf  # none is its own neighbour
        values, places = best(cosines, count)
        index[start : start + step], weight[start : start + step] = places, values.clamp(min=0)
    return Neighbours(index, weight)


def best(cosines: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest `count` of each row, best first, and their columns; of equal ones the first."""
    more = cosines.topk(min(count + 1, cosines.shape[1]), dim=1)
    values, places = more.values[:, :count], more.indices[:, :count]
    tied = (more.values[:, 1:] == more.values[:, :-1]).any(dim=1).nonzero().flatten()
    if len(tied):  # topk orders these as it likes
        ranked = cosines[tied].sort(dim=1, descending=True, stable=True)
        values, places = values.clone(), places.clone()
        values[tied], places[tied] = ranked.values[:, :count], ranked.indices[:, :count]
    return values, places


def seconds_of_all_pairs(image: Tensor) -> float:
    """About how long `nearest` takes, by its first rows."""
    started = time.perf_counter()
    best(image[:TIMED_ROWS] @ image.mT, NEIGHBOURS)
    return (time.perf_counter() - started) * len(image) / TIMED_ROWS


def library() -> Any:
    """The module voyager, or None where it is not installed."""
    try:
        import voyager
    except ImportError:
        return None
    return voyager


def search_of(count: int) -> str:
    """How the neighbours of so many images are searched: "exact" or "approximate"."""
    return "exact" if count <= EXACT_UP_TO or library() is None else "approximate"


def approximate(voyager: Any, image: Tensor, count: int = NEIGHBOURS) -> Neighbours:
    """Nearly the nearest neighbours of image [N, C] of length 1, with their exact cosines.

    tests/train/test_neighbours.py holds the share of true neighbours that is found above 97 %.
    """
    rows = image.detach().float().cpu().numpy()
    graph = voyager.Index(
        voyager.Space.InnerProduct,
        num_dimensions=rows.shape[1],
        M=LINKS,
        ef_construction=BUILT_FROM,
        random_seed=1,
        max_elements=len(rows),
    )
    graph.add_items(rows, num_threads=1)
    found, _ = graph.query(rows, k=count + 1, num_threads=1, query_ef=SEARCHED)
    places = torch.from_numpy(found.astype("int64"))  # [N, count + 1], the image itself among them
    own = places == torch.arange(len(rows))[:, None]
    order = own.long().argsort(dim=1, stable=True)[:, :count]  # itself last, else the farthest
    index = places.gather(1, order)
    weight = image.new_zeros(index.shape)
    for column in range(count):
        weight[:, column] = (image * image[index[:, column]]).sum(dim=1).clamp(min=0)
    return Neighbours(index, weight)
