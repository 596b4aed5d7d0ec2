# SPDX-License-Identifier: Apache-2.0
"""The time of a step on a GPU: the model against traced steps, what it decides, what is fused."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vtclip import ops
from vtclip.heads import VTCLIP, _decoder, _feed_forward, vtclip
from vtclip.heads._cost import plan
from vtclip.heads._step_time import (
    FORMS,
    backward_steps,
    forward_steps,
    product_seconds,
    rates,
)

H200 = rates(90, torch.bfloat16)
CUT = "vtclip::relu_gradient_triton"
NORM = "vtclip::sum_norm_fwd_triton", "vtclip::sum_norm_bwd_triton"
MANY = (32, 1000, 1024, 49, 8, 4096)  # B, K, C, L, H, F
LONG = (128, 1000, 512, 196, 8, 2048)
FEW = (32, 100, 1024, 49, 8, 4096)


@pytest.fixture(scope="module")
def tracing():
    folder = str(Path(__file__).parents[2] / "benchmarks")
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("step_trace").tracing
    finally:
        sys.path.remove(folder)


def meta_head(sizes) -> VTCLIP:
    _, K, C, _, H, hidden = sizes
    text = torch.empty(K, C, dtype=torch.bfloat16, device="meta")
    with torch.device("meta"):
        return VTCLIP(text, num_heads=H, ffn_dim=hidden, init="torch").to(torch.bfloat16)


def head_steps(tracing, sizes, form, training, monkeypatch):
    """Every step of one call of the head, on a GPU that is only thought of."""
    B, _, C, L, _, _ = sizes
    monkeypatch.setattr(_decoder, "plan", lambda *_, **__: SimpleNamespace(absorb=form))
    head = meta_head(sizes)
    image, spatial = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((B, C), (B, L, C))
    )
    with tracing() as trace, torch.set_grad_enabled(training):
        logits = head(image, spatial)
        if training:
            torch.autograd.grad(logits, list(head.parameters()), torch.empty_like(logits))
    return trace.steps


def sums(steps):
    """Seconds of products and of passes."""
    products = sum(product_seconds(*step.product, H200) for step in steps if step.product)
    passes = sum(step.bytes for step in steps if not step.own or step.name in (CUT, *NORM))
    passes /= H200.bytes
    return products, passes


def layer_steps(tracing, sizes, form, training):
    """The steps from values to hidden units alone, and their backward."""
    B, K, C, L, H, _ = sizes
    layer = meta_head(sizes).layers[0]
    x1, query, key, value = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta", requires_grad=True)
        for shape in ((1, K, C), (1, H, K, C // H), (B, H, L, C // H), (B, H, L, C // H))
    )
    names = ("linear1", "norm2", "multihead_attn.out")
    weights = [p for name, p in layer.named_parameters() if name.startswith(names)]
    with tracing() as trace, torch.set_grad_enabled(training):
        cross = _decoder.CrossWeights.of(layer)
        terms = _decoder.terms(layer, x1, form, cross, fold=False)
        results = _decoder.hidden_units(layer, terms, (query, key, value, None))
        if training:
            leaves = [x1, query, key, value, *weights]
            torch.autograd.grad(results, leaves, [torch.empty_like(x) for x in results])
    return trace.steps


@pytest.mark.parametrize("sizes", [MANY, LONG, FEW])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_the_model_counts_what_is_launched(tracing, sizes, training, form):
    products, passes = sums(layer_steps(tracing, sizes, form, training))
    modelled = forward_steps(form, *sizes, 2)
    if training:
        modelled += backward_steps(form, *sizes, 2)
    counted = sum(product_seconds(*product, H200) for product in modelled.products)
    assert counted == pytest.approx(products, rel=0.12)  # without the smallest products
    assert sum(modelled.passes) / H200.bytes == pytest.approx(passes, rel=0.05, abs=5e-6)


@pytest.mark.parametrize(
    ("form", "training", "products", "passes"),
    [
        # ms, counted apart from this model before anything was fused
        (2, True, 2.50e-3, 1.88e-3),
        (1, True, 2.92e-3, 0.71e-3),
        (2, False, None, 0.47e-3),
        (1, False, None, 0.22e-3),
    ],
)
def test_figures_found_apart(tracing, monkeypatch, form, training, products, passes):
    monkeypatch.setattr(_feed_forward, "on_gpu", lambda *_: False)
    found = sums(head_steps(tracing, MANY, form, training, monkeypatch))
    assert found[1] == pytest.approx(passes, rel=0.12)
    if products is not None:
        assert found[0] == pytest.approx(products, rel=0.08)


@pytest.mark.parametrize(("sizes", "form"), [(MANY, 1), (LONG, 0), (FEW, 0)])
@pytest.mark.parametrize("training", [False, True])
def test_the_form_at_the_target_shapes(sizes, form, training):
    options = {"dtype": torch.bfloat16, "training": training}
    assert plan(*sizes, device="meta", **options).absorb == form


def test_fewest_operations_win_only_where_products_are_slow(monkeypatch):
    B, _, *rest = MANY
    for K in (10, 300, 3000, 21000):
        chosen = plan(B, K, *rest, device="meta", dtype=torch.bfloat16, training=True)
        assert chosen.absorb < 2, K
    assert plan(*MANY, device="meta", dtype=torch.float32).absorb == 2
    assert plan(*MANY, device="cpu", dtype=torch.float32).absorb == 1
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert plan(*MANY, device="meta", dtype=torch.float32).absorb == 1


@pytest.mark.parametrize(("sizes", "form"), [(MANY, 1), (LONG, 0)])
def test_a_sum_is_normalised_in_the_pass_that_forms_it(tracing, monkeypatch, sizes, form):
    """Of [B, K, C] only the cosine's operator and the keys' gradient are passed over again."""
    B, K, C, L, *_ = sizes
    rows = B * K * C * 2  # bytes
    for training, wanted in ((False, [NORM[0]]), (True, [*NORM])):
        steps = head_steps(tracing, sizes, form, training, monkeypatch)
        cosine = "vtclip::norm_cosine_logits"
        found = [
            step.name
            for step in steps
            if step.product is None and step.bytes >= 1.9 * rows and "cross_attn" not in step.name
        ]
        assert [name for name in found if not name.startswith((cosine, CUT))] == wanted


def test_hidden_units_are_not_passed_over_again(tracing, monkeypatch):
    """In evaluation they are written and read by products alone, in training cut once."""
    B, K, *_, hidden = MANY
    whole = B * K * hidden * 2  # bytes
    for training, names in ((False, []), (True, [CUT])):
        steps = head_steps(tracing, MANY, 1, training, monkeypatch)
        found = [step.name for step in steps if step.bytes >= whole]
        # with C = F / 4, the norm's backward passes over four [B, K, C], no hidden units
        assert [name for name in found if name not in NORM] == names
    passes = []
    for fused in (False, True):
        with monkeypatch.context() as patch:
            if not fused:
                patch.setattr(_feed_forward, "on_gpu", lambda *_: False)
            steps = head_steps(tracing, MANY, 1, False, monkeypatch)
        passes.append(sum(step.bytes for step in steps if not step.own))
    assert passes[1] < 0.5 * passes[0]


@pytest.fixture
def fusing(monkeypatch):
    """The GPU's operators on CPU tensors."""
    monkeypatch.setattr(_feed_forward, "on_gpu", lambda x, weight: x.dtype == weight.dtype)


def test_hidden_units_and_two_derivatives(fusing):
    x, weight, bias = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 4), (6, 4), 6)
    )
    wanted = F.relu(F.linear(x, weight, bias))
    found = _feed_forward.hidden(x, weight, bias)
    assert "Hidden" in type(found.grad_fn).__name__
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)
    assert torch.autograd.gradcheck(_feed_forward.hidden, (x, weight, bias))
    assert torch.autograd.gradgradcheck(_feed_forward.hidden, (x, weight, bias))
    with torch.no_grad():
        assert torch.equal(_feed_forward.hidden(x, weight, bias), found)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [1, 2])
def test_fused_steps_change_nothing(record, fusing, monkeypatch, form, count):
    text, image, spatial = record()
    head = VTCLIP(text, num_heads=4, num_layers=count, ffn_dim=48, init="torch")
    for parameter in head.parameters():  # biases too
        nn.init.normal_(parameter, std=0.3)
    monkeypatch.setattr(_decoder, "plan", lambda *_, **__: SimpleNamespace(absorb=form))
    logits = head(image, spatial)
    grads = torch.autograd.grad(logits.square().sum(), list(head.parameters()))
    asked = []
    op = ops.ffn_cosine_logits
    monkeypatch.setattr(ops, "ffn_cosine_logits", lambda *a, **k: asked.append(1) or op(*a, **k))
    monkeypatch.setattr(vtclip, "fuse_tail", lambda *_, **__: True)
    with torch.no_grad():
        evaluated = head(image, spatial)
    assert not asked  # the product joins x2 in place, no operator recomputes it
    monkeypatch.setattr(_feed_forward, "on_gpu", lambda *_: False)
    plain = head(image, spatial)
    wanted = torch.autograd.grad(plain.square().sum(), list(head.parameters()))
    torch.testing.assert_close(logits, plain, rtol=0, atol=1e-10)
    torch.testing.assert_close(evaluated, plain, rtol=0, atol=1e-10)
    for ours, theirs in zip(grads, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-8)


def test_where_the_usual_operators_stay(monkeypatch):
    x, weight = torch.empty(2, 3, device="meta"), torch.empty(4, 3, device="meta")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)  # it refuses "meta"
    assert _feed_forward.on_gpu(x, weight)
    assert not _feed_forward.on_gpu(torch.empty(2, 3), torch.empty(4, 3))
    assert not _feed_forward.on_gpu(x.half(), weight)
    seen = []
    torch.func.grad(lambda y: seen.append(_feed_forward.on_gpu(x, weight)) or y)(torch.ones(()))
    assert seen == [False]
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        assert not _feed_forward.on_gpu(x, weight)
    with monkeypatch.context() as patch:
        patch.delattr(torch, "_addmm_activation")
        assert not _feed_forward.on_gpu(x, weight)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: True)
    assert not _feed_forward.on_gpu(x, weight)


@pytest.mark.parametrize(("gib", "mib"), [(4, 256), (24, 768), (64, 2048), (141, 2048)])
def test_chunks_follow_the_memory_of_the_device(monkeypatch, gib, mib):
    found = SimpleNamespace(total_memory=gib * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    assert vtclip._decoder_bytes(torch.device("cuda", 0)) == mib * 2**20
    assert vtclip._decoder_bytes(torch.device("cpu")) == 256 * 2**20
