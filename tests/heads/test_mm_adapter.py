# SPDX-License-Identifier: Apache-2.0
"""MMAdapter against the published layer, which attends among all K + 1 tokens under a mask."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from vtclip.heads import MMAdapter, ZeroShot

EXACT = 1e-10  # float64, sums of at most a few hundred terms, logits up to 100


class Published(nn.Module):
    """[t_1 .. t_K; v] through down, torch's attention with a mask, up; both sides blended."""

    def __init__(self, C: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.down = nn.Linear(C, hidden)
        self.attention = nn.MultiheadAttention(hidden, heads, batch_first=True)
        self.up = nn.Linear(hidden, C)

    def forward(self, image: Tensor, text: Tensor, s: float, ratio: float) -> Tensor:
        K = len(text)
        v = image / image.norm(dim=1, keepdim=True)
        t = (text / text.norm(dim=1, keepdim=True)).expand(len(image), -1, -1)
        tokens = torch.cat([t, v[:, None]], dim=1)  # [B, K + 1, C]
        hidden_from = torch.ones(K + 1, K + 1, dtype=torch.bool)
        hidden_from[:K, K] = False  # texts see the image
        hidden_from[K, :K] = False  # the image sees the texts
        x = self.down(tokens)
        x = self.up(self.attention(x, x, x, attn_mask=hidden_from)[0])
        mixed = ratio * x / x.norm(dim=2, keepdim=True) + (1 - ratio) * tokens
        mixed = mixed / mixed.norm(dim=2, keepdim=True)
        return s * torch.einsum("bc,bkc->bk", mixed[:, K], mixed[:, :K])


def both(C=32, K=7, hidden=16, heads=4, **options):
    layer = Published(C, hidden, heads).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    head = MMAdapter(
        torch.randn(K, C, dtype=torch.float64), hidden=hidden, num_heads=heads, **options
    )
    head.load_state_dict({**layer.state_dict(), "text": head.text})
    return layer, head


@pytest.mark.parametrize("K", [1, 2, 7, 40])
@pytest.mark.parametrize("ratio", [0.2, 0.6, 1.0])
def test_equals_the_published_layer(K, ratio):
    layer, head = both(K=K, ratio=ratio, logit_scale=30.0)
    image = 5 * torch.randn(6, 32, dtype=torch.float64)
    want = layer(image, head.text, 30.0, ratio)
    found = head(image)
    torch.testing.assert_close(found, want, rtol=0, atol=EXACT)
    if ratio == 1.0:
        return  # every text is the same vector there, and gradients of K equal logits cancel
    seed = torch.randn_like(want)
    mine = torch.autograd.grad((found * seed).sum(), list(head.parameters()))
    names = [name for name, _ in head.named_parameters()]
    wanted = torch.autograd.grad((want * seed).sum(), [layer.get_parameter(n) for n in names])
    for name, one, two in zip(names, mine, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_any_number_of_heads(heads):
    layer, head = both(heads=heads)
    image = torch.randn(3, 32, dtype=torch.float64)
    want = layer(image, head.text, 100.0, 0.2)
    torch.testing.assert_close(head(image), want, rtol=0, atol=EXACT)


def test_starts_as_torch_attention_starts():
    torch.manual_seed(3)
    head = MMAdapter(torch.randn(4, 24), hidden=12, num_heads=2)
    torch.manual_seed(3)
    torch.randn(4, 24)
    layer = Published(24, 12, 2)
    for name, value in layer.state_dict().items():
        assert torch.equal(head.state_dict()[name], value), name


def test_ratio_0_is_zero_shot(record):
    text, image, spatial = record()
    head = MMAdapter(text, ratio=0)
    want = ZeroShot(text)(image)
    torch.testing.assert_close(head(image), want, rtol=0, atol=EXACT)
    assert torch.equal(head(image, spatial), head(image))


def test_classes_may_come_in_any_order():
    _, head = both()
    image, order = torch.randn(3, 32, dtype=torch.float64), torch.tensor([3, 0, 6, 1, 5, 2, 4])
    other = head.with_text(head.text[order])
    torch.testing.assert_close(other(image), head(image)[:, order], rtol=0, atol=EXACT)


def test_parts_that_cancel_give_no_nan():
    """ratio 1/2 and an attention that returns -t for one class."""
    text = torch.eye(3, 8, dtype=torch.float64)
    head = MMAdapter(text, ratio=0.5, hidden=8, num_heads=1)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()
        head.up.bias.copy_(-text[0])
    logits = head(torch.randn(4, 8, dtype=torch.float64))
    assert bool(logits.isfinite().all())


def test_no_tensor_of_images_times_classes_times_width(record, monkeypatch):
    """The largest of a forward pass are [rows, C] and [B, K], of each head without kernels."""
    text, image, _ = record(B=20, K=30, C=16)
    head, largest = MMAdapter(text, hidden=8, num_heads=2), 0

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            found = function(*args, **(kwargs or {}))
            if isinstance(found, Tensor):
                largest = max(largest, found.numel())
            return found

    with Watch():
        head(image)
    assert 0 < largest <= 2 * 20 * 30
