# SPDX-License-Identifier: Apache-2.0
"""VTCLIP inside torch's machinery: autocast, compile, optimisation, real features."""

from __future__ import annotations

import functools
import hashlib
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from vtclip import ops
from vtclip.heads import VTCLIP, ZeroShot
from vtclip.ops._select import Problem, select

USED = ("cross_attn", "norm_cosine_logits")


def train(head, image, spatial, label, *, steps=32):
    optimizer = torch.optim.SGD(head.parameters(), lr=1e-2, momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(head(image, spatial), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses)


@pytest.mark.parametrize("init", ["zero", "torch"])
def test_training_matches_the_reference(record, monkeypatch, init):
    chosen = {select(Problem(op, "cpu", torch.float32, 8), None).name for op in USED}
    if chosen == {"reference"}:
        pytest.skip("cpu: only the reference can run here, nothing to compare it with")
    text, image, spatial = record(B=16, K=8, L=9, dtype=torch.float32)
    label = torch.arange(16) % 8
    torch.manual_seed(1)
    head = VTCLIP(text, num_heads=4, logit_scale=20.0, init=init)
    twin = VTCLIP(text, num_heads=4, logit_scale=20.0, init=init)
    twin.load_state_dict(head.state_dict())
    losses = train(head, image, spatial, label)
    for op in USED:
        monkeypatch.setattr(ops, op, functools.partial(getattr(ops, op), impl="reference"))
    wanted = train(twin, image, spatial, label)
    assert losses[-1] < 0.5 * losses[0]
    # float32 steps round to 1e-7 and 32 of them stay smooth: no amplification beyond a thousand
    torch.testing.assert_close(losses, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("count", [1, 2])
def test_gradients_reach_every_parameter(record, count):
    text, image, spatial = record(spatial_dim=11)
    head = VTCLIP(text, spatial_dim=11, num_heads=4, num_layers=count, init="torch")
    head(image, spatial).square().sum().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_gradcheck(record):
    text, image, spatial = record(B=2, K=3, C=8, L=2)
    head = VTCLIP(text, num_heads=2, ffn_dim=6, logit_scale=2.0, init="torch")
    inputs = image.requires_grad_(), spatial.requires_grad_()
    assert torch.autograd.gradcheck(lambda i, s: head(i, s), inputs, fast_mode=True)


@pytest.mark.parametrize("absorbed", [False, True])
def test_autocast(record, absorbed):
    # 40 classes on two tokens at C = 32 is where the cost model absorbs the output projection
    K, L = (40, 2) if absorbed else (7, 5)
    text, image, spatial = record(K=K, L=L, dtype=torch.float32)
    head = VTCLIP(text, num_heads=4, logit_scale=1.0, init="torch")
    want = head(image, spatial)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = head(image.half(), spatial)
    assert got.dtype == torch.bfloat16
    # cosines below 1 through a dozen bfloat16 roundings of 2^-8
    torch.testing.assert_close(got.float(), want, rtol=0, atol=12 * 2**-8)
    F.cross_entropy(got.float(), torch.arange(3)).backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == p.dtype for p in head.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_compiles_to_one_graph(record, masked):
    text, image, spatial = record(dtype=torch.float32)
    mask = torch.rand(3, 5) < 0.7 if masked else None
    head = VTCLIP(text, num_heads=4, init="torch", logit_scale=1.0)
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    want, got = head(image, spatial, mask), compiled(image, spatial, mask)
    # float32 cosines; the compiled form may sum in another order
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    wanted = torch.autograd.grad(want.sum(), head.parameters())
    found = torch.autograd.grad(got.sum(), head.parameters())
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled(image, spatial, mask), want, rtol=0, atol=1e-5)


def test_beats_zero_shot_on_real_features(shared_data):
    """Few steps on half of the fashion images, scored on the other half."""
    path = shared_data / "mira_tinyclip_fashion.npz"
    if not path.is_file():
        pytest.skip(f"{path.name} is not beside the checkout")
    with np.load(path) as file:
        rows = file["spatial_index"]
        labels, names = file["label"][rows].astype("int64"), file["fname"][rows]
        classes, label = np.unique(labels, return_inverse=True)
        text = torch.from_numpy(file["text"][classes])
        image = torch.from_numpy(file["image"][rows].astype("float32"))
        spatial = torch.from_numpy(file["spatial"].astype("float32") @ file["projection"])
        scale = float(np.exp(file["temperature"]))
    spatial = F.normalize(spatial[:, ::4], dim=-1)  # every fourth token: a quarter of the time
    label = torch.from_numpy(label)
    digest = [hashlib.sha256(name.encode()).digest()[0] % 2 for name in names]
    test = torch.tensor(digest, dtype=torch.bool)
    pool = (~test).nonzero()[:, 0]
    head = VTCLIP(text, logit_scale=scale)

    def accuracy(model):
        with torch.no_grad():
            return (model(image[test], spatial[test]).argmax(1) == label[test]).double().mean()

    zero_shot = accuracy(ZeroShot(text, logit_scale=scale))
    assert accuracy(head) == zero_shot
    steps = 120
    optimizer = torch.optim.AdamW(head.parameters(), lr=5e-4, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = itertools.chain.from_iterable(pool[torch.randperm(len(pool))] for _ in range(6))
    for _ in range(steps):
        rows = torch.stack(list(itertools.islice(order, 32)))
        loss = F.cross_entropy(head(image[rows], spatial[rows]), label[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    # one point is 7.5 of the 750 images; the head gains about two
    assert accuracy(head) >= zero_shot + 0.01
