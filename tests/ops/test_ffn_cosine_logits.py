# SPDX-License-Identifier: Apache-2.0
"""ffn_cosine_logits against its reference, the modules it replaces, and its row sums."""

from __future__ import annotations

from collections.abc import Callable

import ffn_tail
import pytest
import torch
import torch.nn.functional as F
from ffn_tail import NAMES
from torch import Tensor

from vtclip import ops, testing
from vtclip.backends import native
from vtclip.reference._dtypes import acc_dtype

# name -> (B, K, C, F)
CASES = {
    "ordinary": (4, 7, 64, 96),
    "odd": (3, 17, 59, 37),
    "wide": (2, 3, 261, 130),
    "many-rows": (3, 131, 24, 40),
    "one-class": (3, 1, 8, 16),
    "one-hidden-unit": (2, 3, 8, 1),
    "no-hidden-units": (2, 3, 8, 0),
    "no-images": (0, 3, 8, 16),
    "no-classes": (3, 0, 8, 16),
}
# for tests of their own
FURTHER_CASES = {
    "one-row": (1, 1, 5, 1),
    "one-column": (2, 3, 1, 4),
    "one-of-each": (1, 1, 1, 1),
    "many-columns": (2, 17, 512, 24),
}


def draw(case: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    B, K, C, width = {**CASES, **FURTHER_CASES}[case]
    tensors = ffn_tail.draw(B, K, C, width)
    return {name: tensor.to(dtype) for name, tensor in zip(NAMES, tensors, strict=True)}


def cancelling(inputs, seeds, fixed) -> dict[str, float]:
    numbers = fixed.get("residual", 1.0), fixed.get("scale", 1.0)
    return {"output 0": ffn_tail.largest_terms(inputs.values(), *numbers)}


def cancelling_everywhere(inputs, seeds, fixed) -> dict[str, float]:
    """The largest sum of |terms| in the logits and in each gradient.

    Of few columns little is left of d_y = step (v - cosine u), u = y / |y|, and of what d_z takes
    out of it, and of one column nothing; the reference is exact there by luck.
    """
    hidden, weight, bias, x, n, norm_bias, text, image = inputs.values()
    residual, scale = fixed.get("residual", 1.0), fixed.get("scale", 1.0)
    z = x + hidden @ weight.T + bias
    r = (z.var(-1, correction=0, keepdim=True) + fixed.get("eps", 1e-5)).rsqrt()
    zh = (z - z.mean(-1, keepdim=True)) * r
    y = text + residual * (n * zh + norm_bias)
    zh, n = zh.abs(), n.abs()
    u, v = F.normalize(y, dim=-1).abs(), F.normalize(image, dim=-1).abs()
    g = scale * seeds[0].double().abs()[..., None]
    d_y = g / y.norm(dim=-1, keepdim=True) * (v[:, None] + (u @ v[..., None]) * u)
    d_n = residual * n * d_y
    d_z = r * (d_n + d_n.mean(-1, keepdim=True) + zh * (d_n * zh).mean(-1, keepdim=True))
    d_v = (g * u).sum(1)
    terms = {
        "hidden": d_z @ weight.abs(),
        "weight": torch.einsum("bkc,bkf->cf", d_z, hidden.abs()),
        "bias": d_z.sum((0, 1)),
        "residual_input": d_z,
        "norm_weight": residual * (d_y * zh).sum((0, 1)),
        "norm_bias": residual * d_y.sum((0, 1)),
        "text": d_y.sum(0),
        "image": (d_v + (d_v * v).sum(-1, keepdim=True) * v) / image.norm(dim=-1, keepdim=True),
    }
    sizes = {name: float(tensor.amax()) for name, tensor in terms.items() if tensor.numel()}
    return {**cancelling(inputs, seeds, fixed), **sizes}


def on(device: str, case: str = "ordinary") -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in draw(case).items()}


@pytest.mark.parametrize("case", CASES)
def test_every_dtype(case, dtype, impl, runnable, compare):
    runnable("ffn_cosine_logits", dtype, CASES[case][2])
    compare(ops.ffn_cosine_logits, draw(case, dtype), cancelling, residual=0.5, scale=10.0)


def test_one_row_of_few_columns(dtype, impl, runnable, compare):
    """Each gradient is a number or five: that the reference rounds luckily is no bar to others."""
    runnable("ffn_cosine_logits", dtype, 5)
    for _ in range(20):
        inputs = draw("one-row", dtype)
        compare(ops.ffn_cosine_logits, inputs, cancelling_everywhere, residual=0.5, scale=10.0)


@pytest.mark.parametrize("case", ["one-column", "one-of-each"])
def test_one_column_leaves_signs_and_no_gradient(case, dtype, impl, device, runnable):
    """Nothing but float32 rounding may be left of a gradient, in a half type too."""
    runnable("ffn_cosine_logits", dtype, 1)
    inputs = {
        name: tensor.to(device).requires_grad_() for name, tensor in draw(case, dtype).items()
    }
    fixed = {"residual": 0.5, "scale": 10.0}
    logits = ops.ffn_cosine_logits(*inputs.values(), **fixed, impl=impl)
    wide = {name: tensor.detach().cpu().double() for name, tensor in inputs.items()}
    signs = (wide["image"] * (wide["text"] + 0.5 * wide["norm_bias"]).T).sign()
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(logits.cpu().double(), 10 * signs, rtol=step, atol=0.0)
    seed = torch.randn_like(logits)
    grads = torch.autograd.grad(logits, list(inputs.values()), seed)
    sizes = cancelling_everywhere(wide, [seed.cpu()], fixed)
    step = torch.finfo(acc_dtype(dtype)).eps
    for name, grad in zip(NAMES, grads, strict=True):
        assert grad.abs().max() <= step * sizes[name], name


def test_any_strides(layout, impl, runnable, compare):
    runnable("ffn_cosine_logits", torch.float32, 59)
    compare(ops.ffn_cosine_logits, {k: layout(v) for k, v in draw("odd").items()})


@pytest.mark.parametrize("where", ["residual_input", "bias", "weight"])
def test_mean_far_from_zero_keeps_its_variance(where, impl, runnable, compare):
    """mean / std = 1000: sums of squares around 0 would lose a quarter of the variance."""
    runnable("ffn_cosine_logits", torch.float32, 64)
    inputs = draw("ordinary")
    inputs[where] = inputs[where] + (1000.0 if where != "weight" else 30.0)
    z = inputs["residual_input"] + inputs["hidden"] @ inputs["weight"].T + inputs["bias"]
    assert (z.mean(-1) / z.std(-1)).min() > 400
    compare(ops.ffn_cosine_logits, inputs)


@pytest.mark.parametrize("dtype", ["float32", "float32-tf32", "float16", "bfloat16"], indirect=True)
def test_column_means_of_the_weight_do_not_reach_the_gradients(dtype, impl, runnable, compare):
    """A rounded d_z does not sum to 0 over C; column means of 30 would show that in d_hidden."""
    runnable("ffn_cosine_logits", dtype, 512)
    inputs = draw("many-columns", dtype)
    inputs["weight"] += 30.0
    compare(ops.ffn_cosine_logits, inputs, residual=0.5, scale=10.0)


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e6, 1e30])
@pytest.mark.parametrize("name", ["image", "text"])
def test_features_of_any_length(name, size, impl, device, runnable):
    runnable("ffn_cosine_logits", torch.float32, 64)
    inputs = draw("ordinary")
    inputs[name] = inputs[name] * size
    wide = {k: v.double().to(device) for k, v in inputs.items()}
    oracle = ops.ffn_cosine_logits(**wide, impl="reference")
    narrow = {k: v.to(device) for k, v in inputs.items()}
    peer = ops.ffn_cosine_logits(**narrow, impl="reference")
    testing.assert_within_budget(ops.ffn_cosine_logits(**narrow, impl=impl), oracle, peer)


def test_zero_image_and_zero_sum_give_zero_and_no_gradient(inputs, impl):
    inputs["image"][1] = 0
    inputs["text"][2] = 0
    inputs["norm_weight"].zero_()
    inputs["norm_bias"].zero_()
    leaves = {k: v.requires_grad_() for k, v in inputs.items()}
    logits = ops.ffn_cosine_logits(**leaves, impl=impl)
    assert (logits[1] == 0).all()
    assert (logits[:, 2] == 0).all()
    assert logits[0, 0] != 0
    grads = torch.autograd.grad(logits.sum() + logits.square().sum(), list(leaves.values()))
    by_name = dict(zip(NAMES, grads, strict=True))
    assert all(grad.isfinite().all() for grad in grads)
    assert (by_name["image"][1] == 0).all()
    assert (by_name["text"][2] == 0).all()


def test_no_width_leaves_zero_vectors(impl, device, runnable):
    runnable("ffn_cosine_logits", torch.float32, 0)
    shapes = (2, 3, 5), (0, 5), (0,), (2, 3, 0), (0,), (0,), (3, 0), (2, 0)
    leaves = [torch.randn(shape, device=device).requires_grad_() for shape in shapes]
    logits = ops.ffn_cosine_logits(*leaves, impl=impl)
    assert logits.shape == (2, 3)
    assert (logits == 0).all()
    grads = torch.autograd.grad(logits.sum(), leaves)
    assert [grad.shape for grad in grads] == [leaf.shape for leaf in leaves]
    assert (grads[0] == 0).all()


def test_nan_stays_in_its_row(impl, device, runnable):
    runnable("ffn_cosine_logits", torch.float32, 64)
    for name in ("hidden", "residual_input"):
        inputs = on(device)
        inputs[name][1, 2, 3] = torch.nan
        logits = ops.ffn_cosine_logits(**inputs, impl=impl)
        assert logits.isnan().nonzero().tolist() == [[1, 2]], name


def test_is_norm_cosine_logits_of_z(impl, device, runnable):
    runnable("ffn_cosine_logits", torch.float32, 59)
    inputs = on(device, "odd")
    z = inputs["residual_input"] + F.linear(inputs["hidden"], inputs["weight"], inputs["bias"])
    rest = [inputs[name] for name in NAMES[4:]]
    expected = ops.norm_cosine_logits(z, *rest, residual=0.7, scale=3.0, impl=impl)
    actual = ops.ffn_cosine_logits(**inputs, residual=0.7, scale=3.0, impl=impl)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("features", [False, True])
def test_only_some_gradients_are_asked_for(features, impl, device, runnable):
    runnable("ffn_cosine_logits", torch.float32, 59)
    inputs = on(device, "odd")
    every = {k: v.clone().requires_grad_() for k, v in inputs.items()}
    full = torch.autograd.grad(
        ops.ffn_cosine_logits(**every, impl=impl).square().sum(), list(every.values())
    )
    wanted = NAMES if features else NAMES[:6]
    some = {k: v.clone().requires_grad_(k in wanted) for k, v in inputs.items()}
    loss = ops.ffn_cosine_logits(**some, impl=impl).square().sum()
    grads = torch.autograd.grad(loss, [some[name] for name in wanted])
    for grad, expected in zip(grads, full, strict=False):
        torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-6)


def test_reference_is_the_end_of_a_decoder_layer():
    inputs = draw("odd", torch.float64)
    z = inputs["residual_input"] + F.linear(inputs["hidden"], inputs["weight"], inputs["bias"])
    normed = F.layer_norm(z, (59,), inputs["norm_weight"], inputs["norm_bias"], 1e-5)
    summed = inputs["text"] + 0.5 * normed
    expected = 9 * F.cosine_similarity(inputs["image"][:, None], summed, dim=-1)
    actual = ops.ffn_cosine_logits(**inputs, residual=0.5, scale=9.0, impl="reference")
    torch.testing.assert_close(actual, expected, atol=1e-12, rtol=1e-12)


def test_row_sums_of_the_docstring_give_logits_and_gradients():
    """The pre-centred form the GPU kernels compute, in float64, against autograd."""
    inputs = draw("odd", torch.float64)
    leaves = {k: v.requires_grad_() for k, v in inputs.items()}
    residual, scale, eps, C = 0.5, 9.0, 1e-5, 59
    logits = ops.ffn_cosine_logits(
        **leaves, residual=residual, scale=scale, eps=eps, impl="reference"
    )
    seed = torch.randn_like(logits)
    wanted = dict(zip(NAMES, torch.autograd.grad(logits, list(leaves.values()), seed), strict=True))
    with torch.no_grad():
        hidden, weight, bias, x, n, norm_bias, text, image = inputs.values()
        start = x + bias
        z = start - start.mean(-1, keepdim=True) + hidden @ (weight - weight.mean(0)).T
        v = F.normalize(image, dim=-1)[:, None]
        d = text + residual * norm_bias
        R0, R1 = z.square().sum(-1), (n * z).square().sum(-1)
        R2, R3, R4 = (n * v * z).sum(-1), (n * d * z).sum(-1), (n * n * z).sum(-1)
        r = (R0 / C + eps).rsqrt()
        dot = residual * r * R2 + (v * d).sum(-1)
        square = (residual * r).square() * R1 + 2 * residual * r * R3 + d.square().sum(-1)
        cosine = dot / square.sqrt()
        torch.testing.assert_close(scale * cosine, logits.detach(), rtol=1e-12, atol=1e-12)
        kappa = dot / square
        mean_g = residual / C * ((v * n).sum(-1) - kappa * (residual * r * R4 + (n * d).sum(-1)))
        mean_gz = residual / C * (r * R2 - kappa * (residual * r.square() * R1 + r * R3))
        zh = r[..., None] * z
        u = (d + residual * n * zh) / square.sqrt()[..., None]
        step = (scale * seed / square.sqrt())[..., None]
        dy = step * (v - cosine[..., None] * u)
        dz = r[..., None] * (
            residual * n * dy - step * mean_g[..., None] - step * mean_gz[..., None] * zh
        )
        d_v = (scale * seed[..., None] * u).sum(1)
        along = (d_v * v[:, 0]).sum(-1, keepdim=True)
        grads = {
            "hidden": dz @ weight,
            "weight": torch.einsum("bkc,bkf->cf", dz, hidden),
            "bias": dz.sum((0, 1)),
            "residual_input": dz,
            "norm_weight": residual * (dy * zh).sum((0, 1)),
            "norm_bias": residual * dy.sum((0, 1)),
            "text": dy.sum(0),
            "image": (d_v - along * v[:, 0]) / image.norm(dim=-1, keepdim=True),
        }
    for name, grad in grads.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-10, atol=1e-11, msg=name)


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that `call` holds at a time of what it takes from torch's allocator."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        kept = call()  # noqa: F841  (what it returns counts)
    held = most = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.skipif(bool(native.load_cpu()), reason=native.load_cpu() or "loaded")
def test_forward_stores_no_z():
    """Beyond hidden itself: a packed weight and some numbers per row, nothing of size B K C."""
    B, K, C, width = 8, 200, 64, 96
    shapes = (B, K, width), (C, width), (C,), (B, K, C), (C,), (C,), (K, C), (B, C)
    inputs = [torch.randn(shape) for shape in shapes]
    z_bytes, weight_bytes = 4 * B * K * C, 4 * C * width

    def tail(impl: str) -> Callable[[], object]:
        return lambda: ops.ffn_cosine_logits(*inputs, impl=impl)

    tail("cpu")()
    assert peak_bytes(tail("reference")) > z_bytes  # the measure sees a z that is there
    assert peak_bytes(tail("cpu")) < weight_bytes + 0.15 * z_bytes


@pytest.mark.skipif(bool(native.load_cpu()), reason=native.load_cpu() or "loaded")
def test_backward_needs_a_bounded_workspace():
    """Beyond the gradients, what the backward holds does not grow with the number of rows."""
    C, width = 64, 96
    extra = []
    for B in (16, 64):
        shapes = (B, 200, width), (C, width), (C,), (B, 200, C), (C,), (C,), (200, C), (B, C)
        inputs = [torch.randn(shape).requires_grad_(i < 6) for i, shape in enumerate(shapes)]
        logits = ops.ffn_cosine_logits(*inputs, impl="cpu")
        seed = torch.ones_like(logits)
        gradients = 4 * sum(tensor.numel() for tensor in inputs[:6])
        peak = peak_bytes(lambda: torch.autograd.grad(logits, inputs[:6], seed))  # noqa: B023
        extra.append(peak - gradients)
    assert extra[1] < 1.3 * extra[0]  # blocks are evened out, so they differ a little
