# SPDX-License-Identifier: Apache-2.0
"""cosine_logits_fwd and cosine_logits_bwd against the formula in float64."""

import math

import pytest
import torch
from kernel_checks import assert_same, drawing, rnorm, unit

NAMES = ("logits", "image_rnorm", "text_rnorm", "d_image", "d_text")


def expected(image, text, scale, grad_logits):
    image, text = (t.detach().cpu().double().requires_grad_() for t in (image, text))
    logits = scale * torch.einsum("bd,bkd->bk", unit(image), unit(text).expand(len(image), -1, -1))
    grads = torch.autograd.grad(logits, (image, text), grad_logits.cpu().double())
    rnorms = rnorm(image.detach()), rnorm(text.detach())
    return dict(zip(NAMES, (logits.detach(), *rnorms, *grads), strict=True))


def run(image, text, scale, grad_logits):
    from vtclip.kernels import cosine_logits

    logits, *rnorms = cosine_logits.cosine_logits_fwd(image, text, scale)
    grads = cosine_logits.cosine_logits_bwd(grad_logits, image, text, *rnorms, scale)
    return dict(zip(NAMES, (logits, *rnorms, *grads), strict=True))


def assert_close(actual, wanted, scale, *, steps=32):
    """By rows: an error may be `steps` roundings of the largest entry (of `scale` for logits)."""
    for name, want in wanted.items():
        got = actual[name].cpu()
        assert got.shape == want.shape, name
        assert got.isfinite().all(), name
        if want.numel() == 0:
            continue
        top = want.abs()
        if name == "logits":
            top = torch.full_like(want, abs(scale))
        elif name.startswith("d_"):
            top = top.amax(-1, keepdim=True)
            top = torch.maximum(top, 1e-2 * top.max())  # rows that all but cancel
        allowed = steps * torch.finfo(got.dtype).eps * top
        assert ((got.double() - want).abs() <= allowed).all(), name


def problem(B, K, D, *, paired, dtype=torch.float32, device="cpu"):
    draw = drawing(device, dtype)
    return draw(B, D), draw(*((B, K, D) if paired else (K, D))), draw(B, K)


paired = pytest.mark.parametrize("paired", [False, True], ids=["shared", "paired"])


@paired
@pytest.mark.parametrize(
    ("B", "K", "D"),
    [(2, 3, 8), (3, 17, 20), (35, 40, 130), (1, 1, 1), (2, 600, 24), (1, 5, 300)],
    ids=str,
)
def test_shapes(B, K, D, paired, device):
    image, text, grad = problem(B, K, D, paired=paired, device=device)
    assert_close(run(image, text, 10.0, grad), expected(image, text, 10.0, grad), 10.0)


@paired
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision(dtype, paired, device):
    image, text, grad = problem(5, 17, 70, paired=paired, dtype=dtype, device=device)
    actual = run(image, text, 3.0, grad)
    assert actual["image_rnorm"].dtype == actual["text_rnorm"].dtype == torch.float32
    wanted = expected(image, text, 3.0, grad)
    for name in ("image_rnorm", "text_rnorm"):
        wanted[name] = wanted[name].to(torch.float32).double()
    # the sums are float32, so only the result is rounded to 16 bits
    assert_close(actual, wanted, 3.0, steps=8)


@paired
@pytest.mark.parametrize("axis", ["B", "K", "D", "BKD"])
def test_empty(axis, paired, device):
    sizes = {"B": 2, "K": 3, "D": 4} | dict.fromkeys(axis, 0)
    image, text, grad = problem(**sizes, paired=paired, device=device)
    assert_close(run(image, text, 2.0, grad), expected(image, text, 2.0, grad), 2.0)


@paired
@pytest.mark.parametrize("factors", [(1e30, 1e-30), (1e-30, 1e-30), (1e30, 1e30), (1e37, 1e-37)])
def test_extreme_magnitudes(factors, paired, device):
    image, text, grad = problem(3, 5, 33, paired=paired, device=device)
    image, text = image * factors[0], text * factors[1]
    assert_close(run(image, text, 1.0, grad), expected(image, text, 1.0, grad), 1.0)


@pytest.mark.parametrize("tiny", [1e-40, 1.4e-45])
@paired
def test_subnormal_rows_stay_finite(tiny, paired, device):
    image, text, grad = problem(3, 5, 33, paired=paired, device=device)
    actual = run(image * tiny, text, 1.0, grad)
    assert actual["logits"].isfinite().all()
    assert actual["logits"].abs().max() <= 1.0001


@paired
def test_zero_rows(paired, device):
    image, text, grad = problem(3, 5, 33, paired=paired, device=device)
    image[1] = 0
    text[..., 2, :] = 0
    actual = run(image, text, 4.0, grad)
    assert_close(actual, expected(image, text, 4.0, grad), 4.0)
    assert (actual["logits"][1] == 0).all()
    assert (actual["logits"][:, 2] == 0).all()
    assert (actual["d_image"][1] == 0).all()
    assert (actual["d_text"][..., 2, :] == 0).all()


@paired
@pytest.mark.parametrize("whole_row", [False, True])
def test_nan_stays_in_its_row(whole_row, paired, device):
    image, text, grad = problem(3, 5, 33, paired=paired, device=device)
    image[1, slice(None) if whole_row else 4] = math.nan
    logits = run(image, text, 1.0, grad)["logits"]
    assert logits[1].isnan().all()
    assert logits[[0, 2]].isfinite().all()


@paired
def test_strides(paired, device):
    image, text, grad = problem(4, 5, 12, paired=paired, device=device)
    wide = torch.full((2 * 12, 9), math.nan, device=device)
    wide[::2, 1::2] = image.T
    odd_text = torch.full((*text.shape[:-1], 26), math.nan, device=device)[..., 1:25:2]
    odd_text.copy_(text)
    plain = run(image, text, 2.0, grad)
    odd = run(wide[::2, 1::2].T, odd_text, 2.0, grad.T.contiguous().T)
    assert_same(odd, plain)
    ones = torch.ones((), device=device).expand(4, 5)
    same = image[:1].expand(4, 12)
    actual = run(same, text[..., :1, :].expand(text.shape), 2.0, ones)
    assert_close(
        actual, expected(same, text[..., :1, :].expand(text.shape), 2.0, ones), 2.0, steps=64
    )
