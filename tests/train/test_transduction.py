# SPDX-License-Identifier: Apache-2.0
"""Classes decided together: against the equations written out, symmetries, limits, refusals."""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vtclip.train import transduction
from vtclip.train.transduction import blended, likeliest_share, transduce


def inputs(N: int, K: int, C: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = F.normalize(torch.randn(N, C, dtype=torch.float64, generator=generator), dim=1)
    log_p = (3 * torch.randn(N, K, dtype=torch.float64, generator=generator)).log_softmax(dim=1)
    return log_p, image


def written_out(log_p: Tensor, image: Tensor, m: int) -> list[list[float]]:
    """The module's equations in loops over plain numbers."""
    p, x = log_p.exp().tolist(), image.tolist()
    N, K, C = len(p), len(p[0]), len(x[0])
    cosine = [[sum(a * b for a, b in zip(x[i], x[j], strict=True)) for j in range(N)]
              for i in range(N)]  # fmt: skip
    w = [[0.0] * N for _ in range(N)]
    for i in range(N):
        others = sorted((j for j in range(N) if j != i), key=lambda j: (-cosine[i][j], j))
        for j in others[:m]:
            w[i][j] = max(0.0, cosine[i][j])
    z = [list(row) for row in p]
    mean = []
    for k in range(K):
        sure = sorted(range(N), key=lambda i: -p[i][k])[: transduction.SURE]
        mean.append([sum(x[i][c] for i in sure) / len(sure) for c in range(C)])
    variance = [1 / C] * C
    for _ in range(transduction.OUTER):
        far = [[sum((x[i][c] - mean[k][c]) ** 2 / variance[c] for c in range(C)) / 2
                for k in range(K)] for i in range(N)]  # fmt: skip
        for _ in range(transduction.INNER):
            new = []
            for i in range(N):
                row = []
                for k in range(K):
                    near = sum((w[i][j] + w[j][i]) * z[j][k] for j in range(N)) / (2 * m)
                    row.append(math.log(p[i][k]) - far[i][k] / transduction.SPREAD + near)
                least = max(row)
                row = [math.exp(value - least) for value in row]
                new.append([value / sum(row) for value in row])
            z = new
        mass = [sum(z[i][k] for i in range(N)) for k in range(K)]
        mean = [[sum(z[i][k] * x[i][c] for i in range(N)) / mass[k] for c in range(C)]
                for k in range(K)]  # fmt: skip
        variance = [sum(z[i][k] * (x[i][c] - mean[k][c]) ** 2 for i in range(N) for k in range(K))
                    / N for c in range(C)]  # fmt: skip
    return z


@pytest.mark.parametrize(("N", "K", "C"), [(13, 3, 5), (9, 2, 2), (20, 5, 7)])
def test_it_is_what_the_equations_say(N, K, C):
    log_p, image = inputs(N, K, C)
    wanted = torch.tensor(written_out(log_p, image, 3), dtype=torch.float64)
    torch.testing.assert_close(transduce(log_p, image).exp(), wanted, rtol=1e-8, atol=1e-10)


def test_the_order_of_images_and_classes_does_not_matter():
    log_p, image = inputs(30, 4, 6)
    rows = torch.randperm(30, generator=torch.Generator().manual_seed(2))
    classes = torch.tensor([2, 0, 3, 1])
    turned = transduce(log_p[rows][:, classes], image[rows])
    torch.testing.assert_close(turned, transduce(log_p, image)[rows][:, classes])


def test_neighbours_mend_what_a_head_is_unsure_of():
    """Two clouds; the head knows half of the images of each and a coin decides the others."""
    generator = torch.Generator().manual_seed(5)
    label = torch.arange(80) % 2
    centre = torch.eye(2, 16, dtype=torch.float64)
    noise = torch.randn(80, 16, dtype=torch.float64, generator=generator)
    image = F.normalize(centre[label] + 0.1 * noise, dim=1)
    logits = 0.2 * torch.randn(80, 2, dtype=torch.float64, generator=generator)
    logits[:40] += 3.0 * F.one_hot(label[:40], 2)
    before = float((logits.argmax(dim=1) == label).double().mean())
    after = float((transduce(logits, image).argmax(dim=1) == label).double().mean())
    assert before < 0.9
    assert after >= 0.97


def test_a_sure_head_is_not_overruled():
    log_p, image = inputs(40, 3, 8)
    sure = (100 * F.one_hot(log_p.argmax(dim=1), 3)).double()
    assert torch.equal(transduce(sure, image).argmax(dim=1), log_p.argmax(dim=1))


@pytest.mark.parametrize(("N", "K"), [(0, 3), (1, 3), (2, 3), (3, 1), (5, 9)])
def test_few_images_and_classes(N, K):
    log_p, image = inputs(N, K, 4)
    found = transduce(log_p, image)
    assert found.shape == (N, K)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found.exp().sum(dim=1), torch.ones(N, dtype=torch.float64))


def test_equal_images_and_float32():
    log_p, image = inputs(6, 3, 4)
    same = image[:1].expand(6, 4).float()
    found = transduce(log_p.float(), same)
    assert found.dtype == torch.float64
    assert bool(found.isfinite().all())


def test_it_is_the_same_every_time_to_the_last_bit():
    log_p, image = inputs(200, 5, 16)
    assert torch.equal(transduce(log_p, image), transduce(log_p, image))


def test_no_label_is_an_input():
    names = set(inspect.signature(transduce).parameters)
    assert names == {"log_p", "image", "neighbours"}


def test_refusals():
    log_p, image = inputs(4, 3, 5)
    with pytest.raises(ValueError, match=r"got \[4, 3\] and \[3, 5\]"):
        transduce(log_p, image[:3])
    image[2, 1] = math.nan
    with pytest.raises(ValueError, match="must be finite"):
        transduce(log_p, image)


def test_the_share_is_the_likeliest():
    generator = torch.Generator().manual_seed(1)
    true = torch.rand(2, 30, dtype=torch.float64, generator=generator)

    def objective(v: float) -> float:
        fit = ((1 - v) * true[0] + v * true[1]).log().sum()
        return float(fit) + transduction.STRENGTH * (math.log(1 - v) + math.log(v)) / 2

    found = likeliest_share(true)
    assert objective(found) >= max(objective(v / 1000) for v in range(1, 1000)) - 1e-4
    assert likeliest_share(true[:, :0]) == 0.5
    assert likeliest_share(torch.tensor([[1.0] * 500, [0.0] * 500])) < 0.02


def test_labels_choose_the_blend_and_nothing_else():
    log_p, image = inputs(40, 3, 6)
    val, label = torch.arange(0, 40, 4), torch.arange(10) % 3
    found, other = blended(log_p, image, val, label), blended(log_p, image, val, (label + 1) % 3)
    assert found.share != other.share
    g = transduction.reliance(40, 3)
    parts = [
        (blend.log_p.exp() - (1 - g * blend.share) * log_p.exp()) / (g * blend.share)
        for blend in (found, other)
    ]
    wanted = transduce(log_p, image)
    for part, blend in zip(parts, (found, other), strict=True):
        torch.testing.assert_close(part, (wanted / blend.temperature).softmax(dim=1))
    none = blended(log_p, image, val[:0], label[:0])
    assert none[1:] == (0.5, 1.0)
    torch.testing.assert_close(none.log_p.exp(), (1 - g / 2) * log_p.exp() + g / 2 * wanted.exp())


def test_few_images_per_class_count_little():
    shares = [transduction.reliance(images, 10) for images in (1, 20, 120, 1000)]
    assert shares == sorted(shares)
    assert shares[0] < 1e-4
    assert shares[2] == 0.5
    assert shares[3] > 0.98
    log_p, image = inputs(1, 3, 6)
    assert torch.equal(blended(log_p, image, image.new_zeros(0).long(), image.new_zeros(0)).log_p,
                       log_p.log_softmax(dim=1))  # fmt: skip
