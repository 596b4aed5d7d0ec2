# SPDX-License-Identifier: Apache-2.0
"""Linear layers side by side: torch's own results and gradients, by either way of summing."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
import torch.nn.functional as F

from vtclip.backends.triton import TRITON
from vtclip.ops import _projections
from vtclip.ops._projections import Layer, projections
from vtclip.testing import assert_within_budget

SHAPES = {"image": (4, 1), "text": (7, 1), "pairs": (4, 7, 3)}  # rows of x, times the width out
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton")


def drawn(dtype: torch.dtype = torch.float32, D: int = 20, names=tuple(SHAPES)) -> list[Layer]:
    layers = []
    for *rows, out in (SHAPES[name] for name in names):
        shapes = (*rows, D), (out * D, D), (out * D,)
        layers.append(Layer(*(torch.randn(s).to(dtype).requires_grad_() for s in shapes)))
    return layers


def gradients(outputs, layers, seeds):
    tensors = [tensor for layer in layers for tensor in layer]
    return torch.autograd.grad(outputs, tensors, seeds)


@pytest.fixture(params=["torch", "triton"])
def sums(request, monkeypatch):
    """Bias gradients as torch's sums, and as the Triton kernel, interpreted."""
    if request.param == "torch":
        yield request.param
        return
    if not INTERPRETED:
        pytest.skip("Triton's interpreter is not there")
    launched = []
    kernel = torch.ops.vtclip.column_sums_triton

    def noted(*matrices):
        launched.append(len(matrices))
        return kernel(*matrices)

    monkeypatch.setattr(_projections, "select", lambda problem, impl: TRITON)
    monkeypatch.setattr(torch.ops.vtclip, "column_sums_triton", noted)
    yield request.param
    assert launched == [3]


@pytest.mark.parametrize("names", [("pairs",), ("text", "pairs"), tuple(SHAPES)], ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_results_and_gradients_are_those_of_linear(dtype, names, sums):
    layers = drawn(dtype, names=names)
    outputs = projections(layers)
    expected = [F.linear(*layer) for layer in layers]
    for one, other in zip(outputs, expected, strict=True):
        assert torch.equal(one, other)
    seeds = [torch.randn(out.shape).to(out) for out in outputs]
    grads = gradients(outputs, layers, seeds)
    peers = gradients(expected, layers, seeds)
    wide = [Layer(*(t.detach().double().requires_grad_() for t in layer)) for layer in layers]
    oracles = gradients([F.linear(*layer) for layer in wide], wide, [s.double() for s in seeds])
    for grad, oracle, peer in zip(grads, oracles, peers, strict=True):
        assert grad.shape == oracle.shape
        assert_within_budget(grad, oracle, peer)


def test_matrices_of_many_rows_are_summed_by_torch(monkeypatch):
    layers = drawn()
    seeds = list_of(layers)
    expected = gradients([F.linear(*layer) for layer in layers], layers, seeds)
    counted = []

    def sums(*matrices):
        counted.append([tuple(matrix.shape) for matrix in matrices])
        return torch.cat([matrix.sum(0) for matrix in matrices])

    monkeypatch.setattr(_projections, "select", lambda problem, impl: TRITON)
    monkeypatch.setattr(torch.ops.vtclip, "column_sums_triton", sums)
    monkeypatch.setattr(_projections, "MANY_ROWS", 20)
    grads = gradients(projections(layers), layers, seeds)
    assert counted == [[(4, 20), (7, 20), (4, 0)]]
    for one, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(one, other)


def list_of(layers: list[Layer]) -> list[torch.Tensor]:
    """Gradients of the layers' outputs, none like another."""
    return [torch.randn(*x.shape[:-1], len(bias)) for x, _, bias in layers]


def test_only_what_is_asked_for_is_made():
    (layer,) = drawn(names=("pairs",))
    fixed = Layer(layer.x.detach(), layer.weight, layer.bias.detach())
    (out,) = projections([fixed])
    (grad,) = torch.autograd.grad(out.sum(), [layer.weight])
    (full,) = torch.autograd.grad(F.linear(*layer).sum(), [layer.weight])
    torch.testing.assert_close(grad, full)
    with torch.no_grad():
        (plain,) = projections([layer])
    assert plain.grad_fn is None
    assert torch.equal(plain, out)


def test_gradcheck():
    layers = drawn(torch.float64, D=3)
    flat = [tensor for layer in layers for tensor in layer]

    def outputs(*tensors):
        return tuple(projections([Layer(*tensors[i : i + 3]) for i in range(0, 9, 3)]))

    assert torch.autograd.gradcheck(outputs, flat)


def test_autocast_and_mixed_dtypes():
    layers = drawn()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = projections(layers)
        expected = [F.linear(*layer) for layer in layers]
    for one, other in zip(outputs, expected, strict=True):
        assert one.dtype == torch.bfloat16
        assert torch.equal(one, other)
    grads = gradients([out.float() for out in outputs], layers, list_of(layers))
    assert all(grad.dtype == torch.float32 for grad in grads)


@pytest.mark.skipif(not INTERPRETED, reason="Triton's interpreter is not there")
@pytest.mark.parametrize("rows", [(0, 1, 3), (64, 65, 200), (1, 0, 0)])
def test_column_sums_in_triton_of_any_rows_and_strides(rows):
    sums = importlib.import_module("vtclip.kernels.column_sums").column_sums
    plain = [torch.randn(R, N) for R, N in zip(rows, (5, 33, 96), strict=True)]
    for matrices in (plain, [m.t().contiguous().t() for m in plain], [m[::2] for m in plain]):
        wanted = torch.cat([matrix.double().sum(0) for matrix in matrices])
        torch.testing.assert_close(sums(*matrices).double(), wanted, rtol=1e-5, atol=1e-5)
    expanded = torch.ones(1, 1).expand(50, 40)
    assert (sums(expanded, plain[1], plain[2])[:40] == 50).all()
