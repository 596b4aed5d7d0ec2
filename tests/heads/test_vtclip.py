# SPDX-License-Identifier: Apache-2.0
"""VTCLIP against torch's own decoder layer, its symmetries, its edges and its errors."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtclip import ops
from vtclip.heads import VTCLIP, ZeroShot, _cost, _decoder, vtclip
from vtclip.testing import GRADIENT_FACTOR, assert_within_budget

# float64 with sums of at most a few hundred terms and logits up to 100: 1e-13 is seen
EXACT = 1e-10


def decoder_layers(
    count: int, C: int, heads: int, hidden: int, dtype: torch.dtype
) -> list[nn.TransformerDecoderLayer]:
    """Layers whose every parameter, biases and norms included, differs from its neutral value."""
    layers = []
    for _ in range(count):
        layer = nn.TransformerDecoderLayer(C, heads, hidden, dropout=0.0, batch_first=True)
        for name, parameter in layer.named_parameters():
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            nn.init.normal_(parameter, mean=centre, std=0.3)
        layers.append(layer.to(dtype))
    return layers


def plain_logits(
    layers: list[nn.TransformerDecoderLayer],
    text: Tensor,
    image: Tensor,
    spatial: Tensor,
    spatial_mask: Tensor | None = None,
    *,
    residual: float = 1.0,
    scale: float = 100.0,
) -> Tensor:
    """scale * cos(image, text + residual * layers(text repeated for each image, spatial))."""
    hidden = text.expand(image.shape[0], *text.shape)
    ignore = None if spatial_mask is None else ~spatial_mask
    for layer in layers:
        hidden = layer(hidden, spatial, memory_key_padding_mask=ignore)
    return scale * F.cosine_similarity(image[:, None], text + residual * hidden, dim=-1)


def head_and_layers(text, count=1, hidden=48, **options):
    layers = decoder_layers(count, text.shape[1], 4, hidden, text.dtype)
    head = VTCLIP(text, num_heads=4, num_layers=count, ffn_dim=hidden, init="torch", **options)
    head.load_decoder_layers(layers)
    return head, layers


def gradients(logits, grad, *tensors):
    return torch.autograd.grad(logits, tensors, grad)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("residual", [1.0, 0.3, -0.5])
@pytest.mark.parametrize("count", [1, 2])
def test_equals_torch_decoder_layer(record, count, residual, masked):
    text, image, spatial = record()
    mask = None
    if masked:
        mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    head, layers = head_and_layers(text, count, residual=residual, logit_scale=30.0)
    inputs = image.requires_grad_(), spatial.requires_grad_()
    want = plain_logits(layers, text, image, spatial, mask, residual=residual, scale=30.0)
    got = head(image, spatial, mask)
    torch.testing.assert_close(got, want, rtol=0, atol=EXACT)

    grad = torch.randn_like(want)
    names = [name for name, _ in head.layers.named_parameters()]
    wanted = gradients(want, grad, *inputs, *nn.ModuleList(layers).parameters())
    found = gradients(got, grad, *inputs, *head.layers.parameters())
    for name, ours, theirs in zip(["image", "spatial", *names], found, wanted, strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=0, atol=EXACT, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_float32_within_budget(record):
    text, image, spatial = record(B=4, K=20, C=64, L=49, dtype=torch.float32)
    head, layers = head_and_layers(text)
    modules = nn.ModuleList(layers)
    oracle_modules = copy.deepcopy(modules).double()
    oracle = plain_logits(list(oracle_modules), text.double(), image.double(), spatial.double())
    peer, got = plain_logits(layers, text, image, spatial), head(image, spatial)
    assert_within_budget(got.detach(), oracle.detach(), peer.detach(), name="logits")
    grad = torch.randn_like(peer)
    oracle_grads = gradients(oracle, grad.double(), *oracle_modules.parameters())
    peer_grads = gradients(peer, grad, *modules.parameters())
    grads = gradients(got, grad, *head.layers.parameters())
    names = [name for name, _ in modules.named_parameters()]
    for name, ours, true, theirs in zip(names, grads, oracle_grads, peer_grads, strict=True):
        if name.endswith("in_proj_bias"):
            # torch computes the key bias's zero gradient with rounding noise; ours is exact
            width = text.shape[1]
            parts = (slice(0, width), slice(2 * width, None))
        else:
            parts = (slice(None),)
        for part in parts:
            assert_within_budget(
                ours[part], true[part], theirs[part], factor=GRADIENT_FACTOR, name=name
            )


def test_key_bias_has_exactly_no_effect(record):
    text, image, spatial = record()
    head, _ = head_and_layers(text)
    C = text.shape[1]
    bias = head.layers[0].multihead_attn.in_proj_bias
    before = head(image, spatial)
    before.sum().backward()
    assert torch.equal(bias.grad[C : 2 * C], torch.zeros(C, dtype=text.dtype))
    with torch.no_grad():
        bias[C : 2 * C] += 5.0
    assert torch.equal(head(image, spatial), before)


def test_spatial_projection(record):
    text, image, spatial = record(spatial_dim=11)
    layers = decoder_layers(1, text.shape[1], 4, 48, text.dtype)
    head = VTCLIP(text, spatial_dim=11, num_heads=4, ffn_dim=48, init="torch")
    head.load_decoder_layer(layers[0])
    projected = spatial @ head.spatial_proj.weight.T
    want = plain_logits(layers, text, image, projected)
    torch.testing.assert_close(head(image, spatial), want, rtol=0, atol=EXACT)


@pytest.mark.parametrize("init", ["zero", "aligned"])
@pytest.mark.parametrize("count", [1, 2])
def test_starts_at_zero_shot_and_learns(record, count, init):
    text, image, spatial = record(B=6)
    head = VTCLIP(text, num_heads=4, num_layers=count, init=init)
    want = ZeroShot(text)(image)
    torch.testing.assert_close(head(image, spatial), want, rtol=0, atol=EXACT)
    F.cross_entropy(head(image, spatial), torch.arange(6)).backward()
    last = head.layers[-1].norm3
    assert last.weight.grad.abs().max() > 0
    assert last.bias.grad.abs().max() > 0
    torch_init = VTCLIP(text, num_heads=4, num_layers=count, init="torch")
    assert (torch_init(image, spatial) - want).abs().max() > 1.0


@pytest.mark.parametrize(("K", "heads"), [(7, 4), (1, 4), (40, 1), (8, 32)])
def test_aligned_attention_is_token_text_similarity(record, K, heads):
    text, _, spatial = record(K=K)
    head = VTCLIP(text, num_heads=heads, init="aligned")
    x1 = F.layer_norm(text, (32,))
    directions = torch.linalg.svd(x1, full_matrices=False).Vh[: 32 // heads]
    seen = spatial @ directions.T @ directions
    want = torch.softmax(4.0 / 32 * torch.einsum("kc,blc->bkl", x1, seen), -1)
    torch.testing.assert_close(head.attention(spatial), want, rtol=0, atol=EXACT)


@pytest.mark.parametrize("count", [1, 2])
def test_symmetries(record, count):
    text, image, spatial = record()
    head, _ = head_and_layers(text, count)
    logits = head(image, spatial)
    images, classes, tokens = torch.randperm(3), torch.randperm(7), torch.randperm(5)
    torch.testing.assert_close(
        head(image[images], spatial[images]), logits[images], rtol=0, atol=EXACT
    )
    torch.testing.assert_close(head(image, spatial[:, tokens]), logits, rtol=0, atol=EXACT)
    reordered = copy.deepcopy(head)
    reordered.text = text[classes]
    torch.testing.assert_close(reordered(image, spatial), logits[:, classes], rtol=0, atol=EXACT)
    torch.testing.assert_close(head(7.0 * image, spatial), logits, rtol=0, atol=EXACT)


@pytest.mark.parametrize("garbage", [0.0, 1e4, float("nan")])
@pytest.mark.parametrize("count", [1, 2])
def test_padding_has_no_effect(record, count, garbage):
    text, image, spatial = record()
    head, _ = head_and_layers(text, count)
    padded = torch.cat([spatial, torch.full_like(spatial[:, :3], garbage)], 1)
    mask = torch.arange(8).expand(3, 8) < 5
    want, got = head(image, spatial), head(image, padded, mask)
    torch.testing.assert_close(got, want, rtol=0, atol=EXACT)
    wanted = gradients(want.sum(), None, *head.layers.parameters())
    found = gradients(got.sum(), None, *head.layers.parameters())
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=EXACT)
    weights = head.attention(padded, mask)
    assert torch.equal(weights[..., 5:], torch.zeros_like(weights[..., 5:]))
    torch.testing.assert_close(weights[..., :5], head.attention(spatial), rtol=0, atol=EXACT)


@pytest.mark.parametrize("no_tokens", ["masked", "absent"])
def test_image_without_tokens_gets_the_biases(record, no_tokens):
    text, image, spatial = record()
    head, (layer,) = head_and_layers(text)
    mask = torch.ones(3, 5, dtype=torch.bool)
    if no_tokens == "masked":
        mask[1] = False
        got = head(image, spatial, mask)
        torch.testing.assert_close(got[[0, 2]], head(image, spatial)[[0, 2]], rtol=0, atol=EXACT)
    else:
        got = head(image, spatial[:, :0])
    # one token of zeros has the value bias as its value, so the attention gives just the biases
    want = plain_logits([layer], text, image, torch.zeros_like(spatial[:, :1]))
    torch.testing.assert_close(got[1], want[1], rtol=0, atol=EXACT)
    got.sum().backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_non_finite_features_stay_with_their_image(record):
    text, image, spatial = record()
    head, _ = head_and_layers(text)
    clean = head(image, spatial)
    image[0, 0], spatial[1, 2, 3] = float("inf"), float("nan")
    logits = head(image, spatial)
    assert not logits[:2].isfinite().any()
    assert torch.equal(logits[2], clean[2])


@pytest.mark.parametrize(("B", "K", "L"), [(1, 1, 1), (0, 7, 5), (1, 7, 5), (3, 1, 5), (3, 7, 1)])
def test_smallest_sizes(record, B, K, L):
    text, image, spatial = record(B=B, K=K, L=L)
    head, layers = head_and_layers(text)
    logits = head(image, spatial)
    assert logits.shape == (B, K)
    assert head.attention(spatial).shape == (B, K, L)
    logits.sum().backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())
    if B:
        want = plain_logits(layers, text, image, spatial)
        torch.testing.assert_close(logits, want, rtol=0, atol=EXACT)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("absorb", [1, 2])
@pytest.mark.parametrize("shared", [False, True])
def test_absorbed_equals_direct(record, masked, absorb, shared):
    """Every gradient too, with every bias and every norm's affine drawn at random."""
    text, _, spatial = record()
    _, (layer,) = head_and_layers(text)
    mask = torch.rand(3, 5) < 0.6 if masked else None
    target = text[None] if shared else text[None] + torch.randn(3, *text.shape, dtype=text.dtype)
    used = [p for n, p in layer.named_parameters() if not n.startswith("norm3")]
    spatial.requires_grad_()
    results, grads = [], []
    for form in (0, absorb):
        cross = _decoder.CrossWeights.of(layer)
        x1, query = _decoder.queries(layer, target, cross)
        attention = query, *_decoder.keys_values(layer, spatial, cross), mask
        terms = _decoder.terms(layer, x1, form, cross, fold=False)
        state = _decoder.hidden_units(layer, terms, attention)
        out = _decoder.before_last_norm(layer, *state)
        results.append((out.detach(), *(part.detach() for part in state)))
        grads.append(torch.autograd.grad(out.square().sum(), [*used, spatial]))
    for absorbed, direct in zip(*reversed(results), strict=True):
        torch.testing.assert_close(absorbed, direct, rtol=0, atol=EXACT)
    for absorbed, direct in zip(*reversed(grads), strict=True):
        size = max(float(direct.abs().max()), 1.0)
        torch.testing.assert_close(absorbed, direct, rtol=1e-12, atol=EXACT * size)


@pytest.mark.parametrize("absorb", [0, 1, 2])
@pytest.mark.parametrize("count", [1, 2])
def test_every_form_is_torch_s_layer(record, monkeypatch, absorb, count):
    text, image, spatial = record()
    head, layers = head_and_layers(text, count)
    monkeypatch.setattr(_decoder, "plan", lambda *_, **__: SimpleNamespace(absorb=absorb))
    wanted = plain_logits(layers, text, image, spatial)
    torch.testing.assert_close(head(image, spatial), wanted, rtol=1e-12, atol=EXACT)
    with torch.no_grad():
        torch.testing.assert_close(head(image, spatial), wanted, rtol=1e-12, atol=EXACT)


@pytest.mark.parametrize("count", [1, 2])
def test_evaluation_takes_the_fused_tail_and_training_does_not(record, monkeypatch, count):
    text, image, spatial = record()
    head, _ = head_and_layers(text, count)
    taken = []

    def noted(name):
        op = getattr(ops, name)
        return lambda *args, **kwargs: taken.append(name) or op(*args, **kwargs)

    for name in ("ffn_cosine_logits", "norm_cosine_logits"):
        monkeypatch.setattr(ops, name, noted(name))
    trained = head(image, spatial).detach()
    with torch.no_grad():
        few = head(image, spatial)
        monkeypatch.setattr(_cost, "FUSED_ROWS", text.shape[0] * image.shape[0])
        evaluated = head(image, spatial)
    assert taken == ["norm_cosine_logits", "norm_cosine_logits", "ffn_cosine_logits"]
    torch.testing.assert_close(few, trained, rtol=0, atol=EXACT)
    torch.testing.assert_close(evaluated, trained, rtol=0, atol=EXACT)


@pytest.mark.parametrize("budget", [1, 60_000, 100_000])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_chunks_change_nothing(record, monkeypatch, budget, count, masked):
    text, image, spatial = record(B=5, K=70)
    head, _ = head_and_layers(text, count)
    mask = torch.rand(5, 5) < 0.6 if masked else None
    whole = head(image, spatial, mask).detach()
    monkeypatch.setattr(vtclip, "DECODER_BYTES", budget)
    with torch.no_grad():
        chunked = head(image, spatial, mask)
    torch.testing.assert_close(chunked, whole, rtol=0, atol=EXACT)
    assert head(image, spatial, mask).grad_fn is not None


@pytest.mark.parametrize("count", [1, 2])
def test_attention_is_torch_attention(record, count):
    text, _, spatial = record()
    head, layers = head_and_layers(text, count)
    hidden = text.expand(3, *text.shape)
    for layer in layers[:-1]:
        hidden = layer(hidden, spatial)
    last = layers[-1]
    x1 = last.norm1(hidden + last.self_attn(hidden, hidden, hidden)[0])
    _, want = last.multihead_attn(x1, spatial, spatial)
    got = head.attention(spatial)
    torch.testing.assert_close(got, want, rtol=0, atol=EXACT)
    assert not got.requires_grad


def test_state_dict_has_the_names_of_torch_layers(record):
    head, layers = head_and_layers(record()[0])
    names = {f"layers.0.{name}" for name in layers[0].state_dict()}
    assert set(head.state_dict()) == names | {"text"}


def test_loads_a_transformer_decoder(record):
    text, image, spatial = record()
    layers = decoder_layers(2, 32, 4, 48, text.dtype)
    decoder = nn.TransformerDecoder(layers[0], 2)
    decoder.layers = nn.ModuleList(layers)
    head = VTCLIP(text, num_heads=4, num_layers=2, ffn_dim=48)
    head.load_decoder_layers(decoder)
    want = plain_logits(layers, text, image, spatial)
    torch.testing.assert_close(head(image, spatial), want, rtol=0, atol=EXACT)
    decoder.norm = nn.LayerNorm(32)
    with pytest.raises(ValueError, match="layers must end without a norm"):
        head.load_decoder_layers(decoder)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"activation": "gelu"}, "activation relu = True, got False"),
        ({"norm_first": True}, "norm_first = False, got True"),
        ({"bias": False}, "bias = True, got False"),
        ({"d_model": 64}, "d_model = 32, got 64"),
        ({"dim_feedforward": 40}, "dim_feedforward = 48, got 40"),
        ({"nhead": 8}, "nhead = 4, got 8"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps = 1e-05, got 1e-06"),
    ],
)
def test_refuses_other_layers(record, changed, message):
    head = VTCLIP(record()[0], num_heads=4, ffn_dim=48)
    options = {"d_model": 32, "nhead": 4, "dim_feedforward": 48} | changed
    with pytest.raises(ValueError, match=f"^VTCLIP: layer must have {message}$"):
        head.load_decoder_layer(nn.TransformerDecoderLayer(**options))


def test_refuses_what_is_no_layer(record):
    head = VTCLIP(record()[0], num_heads=4)
    with pytest.raises(TypeError, match="must be a torch.nn.TransformerDecoderLayer, got Linear"):
        head.load_decoder_layer(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="layers must be 1, got 2"):
        head.load_decoder_layers(decoder_layers(2, 32, 4, 128, torch.float64))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda i, s: (i[:, :5], s), ValueError, r"image must be \[B, 32\], got \[3, 5\]"),
        (lambda i, s: (i[0], s), ValueError, r"image must be \[B, 32\], got \[32\]"),
        (
            lambda i, s: (i, s[..., :4]),
            ValueError,
            r"spatial must be \[B, L, 32\], got \[3, 5, 4\]",
        ),
        (lambda i, s: (i, s[:, 0]), ValueError, r"spatial must be \[B, L, 32\], got \[3, 32\]"),
        (
            lambda i, s: (i[:2], s),
            ValueError,
            "image and spatial must have the same B, got 2 and 3",
        ),
        (lambda i, s: (i.float(), s), TypeError, "image must be torch.float64 like the head"),
        (lambda i, s: (i, s.half()), TypeError, "spatial must be torch.float64 like the head"),
        (lambda i, s: (i, s, torch.ones(3, 5)), TypeError, "spatial_mask must be bool"),
        (
            lambda i, s: (i, s, torch.ones(5, 3, dtype=torch.bool)),
            ValueError,
            r"spatial_mask must be \[B, L\] = \[3, 5\], got \[5, 3\]",
        ),
    ],
)
def test_bad_features(record, change, error, message):
    text, image, spatial = record()
    head = VTCLIP(text, num_heads=4)
    with pytest.raises(error, match=message) as caught:
        head(*change(image, spatial))
    assert str(caught.value).startswith("VTCLIP: ")
    assert "\n" not in str(caught.value)
