# SPDX-License-Identifier: Apache-2.0
"""ffn_cosine_logits_fwd and ffn_cosine_logits_bwd: what the operators' tests do not see.

Those compare logits and every gradient with the reference, in every dtype, over sizes and strides.
Here: what is kept for the backward, launches, memory, repeatability.
"""

import pytest
import torch
import torch.nn.functional as F
from kernel_checks import drawing

from vtclip.testing.problems import OPS

NAMES = tuple(f"d_{name}" for name in OPS["ffn_cosine_logits"].differentiable)
STATS = ("mean", "shift", "rstd", "rnorm", "cosine", "mean_g", "mean_gz")


def problem(B, K, C, width, *, dtype=torch.float32, device="cpu"):
    draw = drawing(device, dtype)
    layer = (
        draw(B, K, width).relu(), draw(C, width) * max(width, 1) ** -0.5, draw(C),
        draw(B, K, C), 1 + 0.3 * draw(C), draw(C), draw(K, C), draw(B, C),
    )  # fmt: skip
    return layer, draw(B, K)


def oracle(layer, grad, residual, scale):
    """Logits, statistics (of z as it is) and gradients in float64."""
    leaves = [tensor.detach().cpu().double().requires_grad_() for tensor in layer]
    hidden, weight, bias, state, norm_weight, norm_bias, text, image = leaves
    z = state + hidden @ weight.T + bias
    mean, var = z.mean(-1), z.var(-1, correction=0)
    rstd = (var + 1e-5).rsqrt()
    zh = (z - mean[..., None]) * rstd[..., None]
    y = text + residual * (norm_weight * zh + norm_bias)
    u, v = F.normalize(y, dim=-1), F.normalize(image, dim=-1)[:, None]
    cosine = (u * v).sum(-1)
    grads = torch.autograd.grad(scale * cosine, leaves, grad.cpu().double())
    g = residual * norm_weight * (v - cosine[..., None] * u)
    stats = (mean, rstd, 1 / y.norm(dim=-1), cosine, g.mean(-1), (g * zh).mean(-1))
    return scale * cosine.detach(), [stat.detach() for stat in stats], grads


def run(layer, grad, residual=0.7, scale=3.0, features=True):
    from vtclip.kernels import ffn_cosine_logits as op

    logits, *kept = op.ffn_cosine_logits_fwd(*layer, residual, scale, 1e-5)
    grads = op.ffn_cosine_logits_bwd(grad, *layer, *kept, residual, scale, features)
    return logits, kept, grads


def relative(actual, wanted):
    return ((actual.cpu().double() - wanted).abs().max() / wanted.abs().max()).item()


# one column tile and several, one class tile and several
SHAPES = [(2, 3, 8, 16), (1, 17, 100, 20), (2, 40, 70, 150), (3, 5, 130, 33), (1, 1, 96, 300)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, device):
    layer, grad = problem(*shape, device=device)
    logits, (stats, image_rnorm), grads = run(layer, grad)
    wanted, wanted_stats, wanted_grads = oracle(layer, grad, 0.7, 3.0)
    # sums of up to 300 float32 terms and some 20 roundings per term; of the largest entry
    assert (logits.cpu().double() - wanted).abs().max() <= 3.0 * 64 * 2**-24
    assert relative(image_rnorm, 1 / layer[7].cpu().double().norm(dim=-1)) < 8 * 2**-24
    for name, actual, want in zip(STATS[2:], stats[2:], wanted_stats[1:], strict=True):
        size = max(want.abs().max().item(), 0.1)
        assert (actual.cpu().double() - want).abs().max() <= 64 * 2**-24 * size, name
    for name, actual, want in zip(NAMES, grads, wanted_grads, strict=True):
        assert actual.shape == want.shape, name
        assert relative(actual, want) < 128 * 2**-24, name


def test_products_of_some_images_at_a_time(device, monkeypatch):
    """A workspace of fewer rows than there are changes no logit, and gradients by the order."""
    from vtclip.kernels import _tiles

    B, K, C, width = 7, 5, 40, 24
    layer, grad = problem(B, K, C, width, device=device)
    logits, kept, grads = run(layer, grad)
    monkeypatch.setattr(_tiles, "WORKSPACE_ROWS", 10)
    again, kept_again, grads_again = run(layer, grad)
    torch.testing.assert_close(again, logits, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(kept_again[0], kept[0], rtol=1e-5, atol=1e-6)
    for name, one, other in zip(NAMES, grads_again, grads, strict=True):
        assert relative(one, other.cpu().double()) < 32 * 2**-24, name


def test_the_forward_stores_some_rows_of_the_product(device, monkeypatch):
    """Nothing of the size B K C is allocated: a workspace of the product is the largest."""
    from vtclip.kernels import _tiles, ffn_cosine_logits

    monkeypatch.setattr(_tiles, "WORKSPACE_ROWS", 100)
    B, K, C, width = 9, 50, 64, 24
    layer, _ = problem(B, K, C, width, device=device)
    sizes, plain = [], torch.Tensor.new_empty

    def noting(self, shape, **kwargs):
        out = plain(self, shape, **kwargs)
        sizes.append(out.numel())
        return out

    monkeypatch.setattr(torch.Tensor, "new_empty", noting)
    ffn_cosine_logits.ffn_cosine_logits_fwd(*layer, 1.0, 1.0, 1e-5)
    assert max(sizes) == 100 * C


@pytest.mark.parametrize("mean", [0, 30])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision(dtype, mean, device):
    layer, grad = problem(2, 20, 70, 40, dtype=dtype, device=device)
    layer[1].add_(mean)
    logits, (stats, image_rnorm), grads = run(layer, grad)
    wanted, _, wanted_grads = oracle(layer, grad, 0.7, 3.0)
    assert stats.dtype == image_rnorm.dtype == torch.float32
    step = torch.finfo(dtype).eps
    # the centred weight and the product are rounded once, and so is the result
    assert (logits.cpu().double() - wanted).abs().max() <= 3.0 * step
    for name, actual, want in zip(NAMES, grads, wanted_grads, strict=True):
        assert actual.dtype == dtype, name
        assert relative(actual, want) < 3 * step, name


def test_a_mean_that_rounding_left_is_taken_out(device):
    """In bfloat16 the centred weight does not sum to 0; the shift is what is left of the mean."""
    layer, grad = problem(1, 4, 64, 128, dtype=torch.bfloat16, device=device)
    layer[1].add_(2.0)
    _, (stats, _), _ = run(layer, grad)
    hidden, weight, bias, state, *_ = (tensor.cpu().double() for tensor in layer)
    z = state + hidden @ weight.T + bias
    rstd = (z.var(-1, correction=0) + 1e-5).rsqrt()
    assert relative(stats[2], rstd) < 2 * torch.finfo(torch.bfloat16).eps
    assert stats[1].abs().max() < 0.1
    assert z.mean(-1).abs().max() > 50


def test_features_are_left_out_if_not_asked_for(device):
    layer, grad = problem(2, 3, 8, 16, device=device)
    _, _, full = run(layer, grad)
    _, _, some = run(layer, grad, features=False)
    assert [tensor.shape for tensor in some[6:]] == [(0,), (0,)]
    assert all(torch.equal(one, other) for one, other in zip(some[:6], full, strict=False))


def test_launches(device, launches):
    layer, grad = problem(2, 3, 8, 16, device=device)
    with launches() as names:
        run(layer, grad)
    assert names[:4] == [
        "reciprocal_norm_kernel",
        "centred_kernel",
        "ffn_cosine_logits_fwd_kernel",
        "centred_kernel",
    ]
    assert names[4] == "ffn_cosine_logits_bwd_kernel"
    assert names[5:] == ["sum_partials_kernel"] * 4 + ["project_kernel"]
