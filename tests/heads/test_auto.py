# SPDX-License-Identifier: Apache-2.0
"""The average of several heads: its probabilities, its options, its refusals."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from vtclip.heads import VTCLIP, Auto, RAda, ZeroShot
from vtclip.heads.auto import POOLS

K, C, L = 5, 16, 7
torch.manual_seed(3)
TEXT = F.normalize(torch.randn(K, C, dtype=torch.float64), dim=-1)
IMAGE = torch.randn(6, C, dtype=torch.float64)
SPATIAL = torch.randn(6, L, C, dtype=torch.float64)


def shaken(head: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return head.eval()


def member(head: torch.nn.Module, temperature: float, weight: float) -> dict[str, object]:
    return {
        "method": head.method,
        "options": head.options(),
        "temperature": temperature,
        "weight": weight,
    }


def pair() -> tuple[Auto, list[torch.nn.Module]]:
    torch.manual_seed(4)
    heads = [shaken(RAda(TEXT, logit_scale=20.0)), shaken(VTCLIP(TEXT, spatial_dim=C, ffn_dim=8))]
    auto = Auto(TEXT, members=[member(heads[0], 0.5, 3.0), member(heads[1], 2.0, 1.0)])
    for own, head in zip(auto.heads, heads, strict=True):
        own.load_state_dict(head.state_dict())
    return auto.eval(), heads


def test_probabilities_are_the_weighted_mean_at_each_temperature():
    auto, (rada, vt) = pair()
    with torch.no_grad():
        found = auto(IMAGE, SPATIAL).double().exp()
        one = (rada(IMAGE) / 0.5).softmax(dim=1)
        two = (vt(IMAGE, SPATIAL) / 2.0).softmax(dim=1)
    torch.testing.assert_close(found, 0.75 * one + 0.25 * two, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.sum(dim=1), torch.ones(6, dtype=torch.float64))


def test_a_log_linear_pool_adds_weighted_log_probabilities():
    auto, (rada, vt) = pair()
    pool = Auto(TEXT, **auto.options() | {"pool": "log-linear", "sharpness": 1.5})
    pool.load_state_dict(auto.state_dict())
    with torch.no_grad():
        found = pool.eval()(IMAGE, SPATIAL).double()
        one = (rada(IMAGE) / 0.5).log_softmax(dim=1)
        two = (vt(IMAGE, SPATIAL) / 2.0).log_softmax(dim=1)
    torch.testing.assert_close(found, 1.5 * (0.75 * one + 0.25 * two), rtol=1e-5, atol=1e-5)
    assert Auto(TEXT, **pool.options()).options() == pool.options()


def test_a_pool_of_one_with_sharpness_one_is_that_one():
    for pool in POOLS:
        alone = Auto(TEXT, members=[member(ZeroShot(TEXT), 2.0, 7.0)], pool=pool)
        wanted = (ZeroShot(TEXT)(IMAGE) / 2.0).softmax(dim=1)
        torch.testing.assert_close(alone(IMAGE).double().softmax(1), wanted, rtol=1e-5, atol=1e-7)


def test_weights_that_sum_to_one_are_kept_to_the_last_bit():
    """Divided by their sum again, about a third of such rows would change in the last bit."""
    draws = torch.distributions.Dirichlet(torch.ones(4, dtype=torch.float64)).sample((100,))
    for row in draws.tolist():
        auto = Auto(TEXT, members=[member(ZeroShot(TEXT), 1.0, weight) for weight in row])
        again = Auto(TEXT, **auto.options())
        assert again.weights == auto.weights
        assert sum(auto.weights) == pytest.approx(1.0, abs=1e-15)


def test_without_members_it_is_zeroshot():
    auto = Auto(TEXT, logit_scale=30.0)
    wanted = ZeroShot(TEXT, logit_scale=30.0)(IMAGE).softmax(dim=1)
    torch.testing.assert_close(auto(IMAGE).double().exp(), wanted, rtol=1e-5, atol=1e-7)
    assert auto.members == ["zeroshot"]
    assert not auto.needs_spatial


def test_extreme_logits_stay_finite():
    auto = Auto(TEXT, members=[member(ZeroShot(TEXT, logit_scale=1e4), 0.01, 1.0)] * 2)
    logits = auto(IMAGE)
    assert bool(logits.isfinite().all())
    assert torch.equal(logits.argmax(dim=1), (F.normalize(IMAGE, dim=1) @ TEXT.T).argmax(dim=1))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "auto"}, "member 0 must be another method, got 'auto'"),
        ({"method": "nothing"}, "member 0 must be another method, got 'nothing'"),
        ({"temperature": 0.0}, "member 0 must be finite and above 0, got 0"),
        ({"weight": float("nan")}, "member 0 must be finite and above 0, got nan"),
    ],
)
def test_bad_members_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        Auto(TEXT, members=[member(ZeroShot(TEXT), 1.0, 1.0) | change])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pool": "product"}, "pool must be one of mixture, log-linear, got 'product'"),
        ({"pool": "log-linear", "sharpness": 0.0}, "sharpness must be finite and above 0, got 0"),
        ({"sharpness": 2.0}, "sharpness must be 1 of a mixture, got 2"),
    ],
)
def test_bad_pools_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        Auto(TEXT, **options)
