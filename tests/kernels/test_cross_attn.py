# SPDX-License-Identifier: Apache-2.0
"""cross_attn_fwd and cross_attn_bwd against the formula in float64, differentiated by autograd."""

import math

import pytest
import torch
from kernel_checks import assert_close, assert_same, drawing, strided

NAMES = ("out", "lse", "d_query", "d_key", "d_value")


def oracle(query, key, value, key_mask, scale):
    """S = scale q k^T over visible columns, out = softmax(S) v, lse = logsumexp(S)."""
    B, L = key.shape[0], key.shape[2]
    if key_mask is None:
        key_mask = torch.ones(1, L, dtype=torch.bool)
    rows = []
    for b in range(B):
        cols = key_mask[b % key_mask.shape[0]].nonzero().flatten()
        q, k, v = query[b % query.shape[0]], key[b][:, cols], value[b][:, cols]
        if len(cols) == 0:
            out = q.new_zeros(q.shape)
            lse = q.new_full(q.shape[:2], -math.inf)
        else:
            scores = scale * q @ k.transpose(-1, -2)
            out, lse = scores.softmax(-1) @ v, scores.logsumexp(-1)
        rows.append((out, lse))
    if not rows:
        return query.new_zeros((0, *query.shape[1:])), query.new_zeros((0, *query.shape[1:3]))
    out, lse = zip(*rows, strict=True)
    return torch.stack(out), torch.stack(lse)


def expected(inputs, key_mask, scale, grad_out, grad_lse):
    query, key, value = (t.detach().cpu().double().requires_grad_() for t in inputs)
    key_mask = None if key_mask is None else key_mask.cpu()
    out, lse = oracle(query, key, value, key_mask, scale)
    loss = (out * grad_out.cpu().double()).sum()
    if grad_lse is not None:
        seen = lse.isfinite()
        loss = loss + (lse[seen] * grad_lse.cpu().double()[seen]).sum()
    leaves = (query, key, value)
    grads = (None, None, None)
    if loss.requires_grad:
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    grads = (torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True))
    return dict(zip(NAMES, (out.detach(), lse.detach(), *grads), strict=True))


def run(inputs, key_mask, scale, grad_out, grad_lse):
    from vtclip.kernels import cross_attn

    out, lse = cross_attn.cross_attn_fwd(*inputs, key_mask, scale)
    grads = cross_attn.cross_attn_bwd(grad_out, grad_lse, *inputs, key_mask, out, lse, scale)
    return dict(zip(NAMES, (out, lse, *grads), strict=True))


def check(*arguments, steps=32):
    assert_close(run(*arguments), expected(*arguments), steps=steps)


def problem(B, H, K, L, d, *, shared=True, dtype=torch.float32, device="cpu", seed=0):
    draw = drawing(device, dtype, seed)
    inputs = (draw(1 if shared else B, H, K, d), draw(B, H, L, d), draw(B, H, L, d))
    return inputs, draw(B, H, K, d), draw(B, H, K)


# Sums have up to max(d, L, K * B) float32 terms; errors of random sign grow like the square root of
# that, so 32 roundings leave an ample factor at these sizes. Of the 16-bit types only the roundings
# of P, dS and the result count.
STEPS = {torch.float32: 32, torch.float16: 4, torch.bfloat16: 4}


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per_image"])
@pytest.mark.parametrize(
    ("B", "H", "K", "L", "d"),
    [
        (2, 2, 4, 8, 16),
        (3, 2, 17, 49, 20),
        (2, 1, 33, 65, 24),
        (5, 1, 40, 130, 8),
        (1, 1, 1, 1, 1),
        (4, 3, 1, 5, 1),
        (1, 1, 3, 7, 200),
    ],
    ids=lambda n: str(n),
)
def test_shapes(B, H, K, L, d, shared, device):
    inputs, grad_out, grad_lse = problem(B, H, K, L, d, shared=shared, device=device)
    scale = 1 / math.sqrt(d)
    check(inputs, None, scale, grad_out, grad_lse)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("L", [49, 70])
def test_half_precision(dtype, L, device):
    inputs, grad_out, grad_lse = problem(3, 2, 17, L, 20, dtype=dtype, device=device)
    actual = run(inputs, None, 0.3, grad_out, grad_lse)
    assert actual["lse"].dtype == torch.float32
    wanted = expected(inputs, None, 0.3, grad_out, grad_lse)
    assert_close(actual, wanted, steps=STEPS[dtype])


@pytest.mark.parametrize("axis", ["B", "H", "K", "L", "d", "BK", "BHKLd"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "per_image"])
def test_empty(axis, shared, device):
    sizes = {"B": 2, "H": 2, "K": 3, "L": 4, "d": 5} | dict.fromkeys(axis, 0)
    inputs, grad_out, grad_lse = problem(**sizes, shared=shared, device=device)
    check(inputs, None, 0.5, grad_out, grad_lse)


@pytest.mark.parametrize("L", [12, 70])
@pytest.mark.parametrize("mask_batch", [1, 3])
def test_mask(L, mask_batch, device):
    inputs, grad_out, grad_lse = problem(3, 2, 5, L, 6, device=device)
    key_mask = torch.rand(mask_batch, L, generator=torch.Generator().manual_seed(1)) < 0.5
    key_mask[:, 0] = True
    if mask_batch > 1:
        key_mask[1] = False  # an image without a single column
    key_mask = key_mask.to(device)
    check(inputs, key_mask, 0.4, grad_out, grad_lse)


@pytest.mark.parametrize("L", [12, 70])
@pytest.mark.parametrize("poison", [math.nan, math.inf, 3e38])
def test_masked_columns_do_not_exist(L, poison, device):
    inputs, grad_out, grad_lse = problem(3, 2, 5, L, 6, device=device)
    key_mask = torch.rand(3, L, generator=torch.Generator().manual_seed(1)) < 0.5
    key_mask[1] = False
    key_mask = key_mask.to(device)
    clean = run(inputs, key_mask, 0.4, grad_out, grad_lse)
    query, key, value = inputs
    hidden = ~key_mask[:, None, :, None]
    dirty = (query, key.masked_fill(hidden, poison), value.masked_fill(hidden, -poison))
    grad_lse[1] = math.nan  # of rows whose lse is -inf
    actual = run(dirty, key_mask, 0.4, grad_out, grad_lse)
    assert_same(actual, clean)


def test_nan_stays_in_its_row(device):
    inputs, grad_out, grad_lse = problem(2, 2, 5, 9, 6, device=device)
    clean_out = run(inputs, None, 0.4, grad_out, grad_lse)["out"]
    inputs[0][0, 1, 3, 2] = math.nan
    out = run(inputs, None, 0.4, grad_out, grad_lse)["out"]
    bad = out.isnan().any(-1)
    assert bad[:, 1, 3].all()
    assert bad.sum() == 2
    assert torch.equal(out[~bad], clean_out[~bad])


def test_without_lse_gradient(device):
    inputs, grad_out, _ = problem(2, 2, 6, 9, 8, device=device)
    check(inputs, None, 0.4, grad_out, None)


@pytest.mark.parametrize("scale", [0.0, -1.5, 60.0])
def test_scales(scale, device):
    inputs, grad_out, grad_lse = problem(2, 1, 6, 9, 8, device=device)
    actual = run(inputs, None, scale, grad_out, grad_lse)
    # an error of eps |S| in the exponent is a factor of that size in P; |S| is up to 10 |scale|
    steps = 32 * max(1.0, 10 * abs(scale))
    assert_close(actual, expected(inputs, None, scale, grad_out, grad_lse), steps=steps)


def test_non_contiguous(device):
    inputs, grad_out, grad_lse = problem(2, 2, 5, 9, 6, device=device)
    key_mask = torch.tensor([[True, False] * 9] * 4, device=device)[::2, ::2].clone()
    key_mask[0, 3] = False
    wide_mask = torch.ones(4, 18, dtype=torch.bool, device=device)
    wide_mask[::2, ::2] = key_mask
    plain = run(inputs, key_mask, 0.4, grad_out, grad_lse)
    odd = run(
        tuple(strided(t) for t in inputs), wide_mask[::2, ::2], 0.4,
        strided(grad_out), strided(grad_lse),
    )  # fmt: skip
    assert_same(odd, plain)


def test_stride_zero(device):
    inputs, grad_out, grad_lse = problem(1, 1, 1, 9, 6, device=device)
    query, key, value = inputs
    wide = (query.expand(3, 2, 5, 6), key.expand(3, 2, 9, 6), value.expand(3, 2, 9, 6))
    grad_out, grad_lse = grad_out.expand(3, 2, 5, 6), grad_lse.expand(3, 2, 5)
    check(wide, None, 0.4, grad_out, grad_lse)


def test_memory_layout(device):
    inputs, grad_out, grad_lse = problem(2, 3, 5, 9, 8, device=device)
    actual = run(inputs, None, 0.4, grad_out, grad_lse)
    for name in ("out", "d_query", "d_key", "d_value"):
        assert actual[name].transpose(1, 2).is_contiguous(), name
    assert actual["lse"].is_contiguous()
    assert actual["d_query"].shape[0] == 1
