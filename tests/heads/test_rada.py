# SPDX-License-Identifier: Apache-2.0
"""RAda against the released layer's equations, its symmetries, its edges and its errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vtclip.heads import RAda, ZeroShot, rada

EXACT = 1e-10  # float64, sums of at most a few hundred terms, logits up to 100
NAMES = ("q_proj1", "q_proj2", "q_proj3", "k_proj", "v_proj", "out_proj")


class Released(nn.Module):
    """The released layer from its equations: everything repeated to [B, K, D], three K x K maps."""

    def __init__(self, D: int, heads: int, temperature: float = 1.0) -> None:
        super().__init__()
        self.mha = nn.ModuleDict({name: nn.Linear(D, D) for name in NAMES})
        self.heads, self.temperature = heads, temperature
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)

    def mask(self, f: Tensor, h: Tensor, s: float, kinds: tuple[int, ...] = (0, 1, 2)) -> Tensor:
        (B, D), K = f.shape, h.shape[0]
        R = torch.einsum("bd,kd->bkd", f, h)
        inputs = (
            math.sqrt(s) * f[:, None].repeat(1, K, 1),
            math.sqrt(s) * h[None].repeat(B, 1, 1),
            s * R,
        )

        def split(x: Tensor) -> Tensor:
            return x.reshape(B, K, self.heads, D // self.heads).permute(0, 2, 1, 3)

        key, value = split(self.mha["k_proj"](s * R)), split(self.mha["v_proj"](s * R))
        maps = []
        for kind in kinds:
            query = split(self.mha[f"q_proj{kind + 1}"](inputs[kind]))
            scores = torch.einsum("bhid,bhjd->bhij", query, key) / math.sqrt(D // self.heads)
            joint = torch.softmax((scores / self.temperature).reshape(B, self.heads, K * K), -1)
            maps.append(K * joint.view(B, self.heads, K, K))
        mean = torch.stack(maps).mean(0)
        out = torch.einsum("bhij,bhjd->bhid", mean, value).permute(0, 2, 1, 3).reshape(B, K, D)
        return torch.relu(1 + self.mha["out_proj"](out))

    def forward(self, image: Tensor, text: Tensor, s: float, **options) -> tuple[Tensor, Tensor]:
        f = image / image.norm(dim=-1, keepdim=True)
        h = text / text.norm(dim=-1, keepdim=True)
        mask = self.mask(f, h, s, **options)
        return s * (mask * torch.einsum("bd,kd->bkd", f, h)).sum(-1), mask


def size_of(mask: Tensor, penalty: str) -> Tensor:
    off = (mask - 1).abs().flatten(1)
    return {
        "none": torch.zeros(len(off), dtype=off.dtype),
        "l1": off.mean(1),
        "mse": (off * off).mean(1),
        "linf": torch.max(off, 1)[0],
    }[penalty]


def layer_and_head(K=7, D=24, heads=4, temperature=1.0, **options):
    text = torch.randn(K, D, dtype=torch.float64)
    layer = Released(D, heads, temperature).double()
    head = RAda(text, num_heads=heads, temperature=temperature, **options)
    head.load_released_state_dict(layer.state_dict())
    return layer, head


@pytest.mark.parametrize("penalty", rada.PENALTIES)
@pytest.mark.parametrize("K", [1, 2, 7, 33])
def test_equals_the_released_layer(K, penalty):
    layer, head = layer_and_head(K, penalty=penalty, logit_scale=30.0)
    image = torch.randn(5, 24, dtype=torch.float64)
    wanted, mask = layer(image, head.text, 30.0)
    found = head.forward_with_penalty(image)
    torch.testing.assert_close(found.logits, wanted, rtol=0, atol=EXACT)
    torch.testing.assert_close(found.penalty, size_of(mask, penalty), rtol=0, atol=EXACT)
    assert torch.equal(head(image), found.logits)

    seed = torch.randn_like(wanted)
    names, parameters = zip(*head.named_parameters(), strict=True)
    total = (found.logits * seed).sum() + found.penalty.sum()
    packed = zip(names, torch.autograd.grad(total, parameters), strict=True)
    grads = head.apart(dict(packed))
    loss = (wanted * seed).sum() + size_of(mask, penalty).sum()
    for old, new in rada.RELEASED.items():
        for kind in ("weight", "bias"):
            parameter = getattr(layer.mha[old], kind)
            (expected,) = torch.autograd.grad(loss, parameter, retain_graph=True)
            largest = float(expected.abs().amax())
            torch.testing.assert_close(
                grads[f"{new}.{kind}"], expected, rtol=0, atol=1e-9 * max(1.0, largest)
            )


@pytest.mark.parametrize("scale", [1.0, 100.0])
@pytest.mark.parametrize("temperature", [0.01, 0.1, 1.0, 100.0])
def test_no_temperature_or_scale_overflows(temperature, scale):
    layer, head = layer_and_head(6, temperature=temperature, logit_scale=scale)
    image = torch.randn(5, 24, dtype=torch.float64)
    wanted = layer(image, head.text, scale)[0]
    torch.testing.assert_close(head(image), wanted, rtol=1e-8, atol=1e-8)
    single = head.float()
    logits = single(image.float())
    assert logits.isfinite().all()
    logits.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in single.parameters())


@pytest.mark.parametrize(
    "kinds", [("image",), ("text",), ("pair",), ("text", "image"), ("image", "pair")]
)
def test_some_of_the_queries(kinds):
    layer, head = layer_and_head(queries=kinds)
    image = torch.randn(3, 24, dtype=torch.float64)
    numbers = tuple(rada.QUERIES.index(kind) for kind in kinds)
    wanted = layer(image, head.text, 100.0, kinds=numbers)[0]
    torch.testing.assert_close(head(image), wanted, rtol=0, atol=1e-9)
    asked = {name for name in head.apart(head.state_dict()) if name.endswith("_query.weight")}
    assert asked == {f"{kind}_query.weight" for kind in kinds}


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("bias", [0.0, -10.0])
def test_starts_at_zero_shot_without_penalty(adapters, bias):
    text, image = torch.randn(9, 16), torch.randn(4, 16)
    head = RAda(text, logit_scale=50.0, logit_bias=bias, adapters=adapters)
    found = head.forward_with_penalty(image)
    torch.testing.assert_close(found.logits, ZeroShot(text, logit_scale=50.0)(image) + bias)
    assert (found.penalty == 0).all()


def test_first_step_moves_the_output_projection_only():
    head = RAda(torch.randn(9, 16))
    logits, penalty = head.forward_with_penalty(torch.randn(4, 16))
    (F.cross_entropy(logits, torch.arange(4)) + penalty.mean()).backward()
    moved = {name for name, p in head.named_parameters() if bool((p.grad != 0).any())}
    assert moved == {"out.weight", "out.bias"}


def test_adapters_train_from_zero_and_would_not_behind_a_second_relu():
    head = RAda(torch.randn(9, 16), adapters=True)
    F.cross_entropy(head(torch.randn(4, 16)), torch.arange(4)).backward()
    for adapter in (head.image_adapter, head.text_adapter):
        up = adapter[2].weight
        assert (up == 0).all()
        assert (up.grad != 0).any()
        x = torch.randn(4, 16)
        (dead,) = torch.autograd.grad(torch.relu(adapter(x)).square().sum(), up)
        (dead_too,) = torch.autograd.grad(torch.relu(adapter(x)).sum(), up)
        assert (dead == 0).all()
        assert (dead_too == 0).all()


def test_permuting_the_classes_permutes_the_logits():
    _, head = layer_and_head(11)
    image, order = torch.randn(3, 24, dtype=torch.float64), torch.randperm(11)
    moved = head.with_text(head.text[order])
    torch.testing.assert_close(moved(image), head(image)[:, order], rtol=0, atol=EXACT)


def test_text_and_scale_can_be_given_with_their_gradients():
    layer, head = layer_and_head(5)
    text = torch.randn(6, 24, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    image = torch.randn(3, 24, dtype=torch.float64, requires_grad=True)
    found = head.forward_with_penalty(image, text, scale)
    f, h = F.normalize(image, dim=-1), F.normalize(text, dim=-1)
    mask = layer.mask(f, h, 20.0)  # the scale inside the attention carries no gradient
    wanted = scale * (mask * f[:, None] * h).sum(-1)
    torch.testing.assert_close(found.logits, wanted, rtol=0, atol=EXACT)
    leaves = image, text, scale
    seed = torch.randn_like(wanted)
    actual = torch.autograd.grad((found.logits * seed).sum() + found.penalty.sum(), leaves)
    loss = (wanted * seed).sum() + size_of(mask, "mse").sum()
    for one, other in zip(actual, torch.autograd.grad(loss, leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("grad", [True, False])
def test_chunks_of_images_do_not_change_the_result(grad, monkeypatch):
    _, head = layer_and_head(7)
    image = torch.randn(5, 24, dtype=torch.float64)
    parameters = list(head.parameters())

    def run() -> list[Tensor]:
        with torch.set_grad_enabled(grad):
            logits, penalty = head.forward_with_penalty(image)
        if not grad:
            return [logits, penalty]
        loss = logits.square().sum() + penalty.sum()
        return [logits, penalty, *torch.autograd.grad(loss, parameters)]

    whole = run()
    calls = []
    inner = RAda._logits
    monkeypatch.setattr(
        RAda, "_logits", lambda self, v, *a: (calls.append(len(v)), inner(self, v, *a))[1]
    )
    monkeypatch.setattr(rada, "MASK_BYTES", 2 * rada.ROWS_KEPT * 7 * 24 * 8)
    chunked = run()
    assert sorted(calls) == sorted([2, 2, 1] * (1 + grad))  # the backward makes each again
    for one, other in zip(chunked, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_chunks_ask_for_no_random_state(monkeypatch):
    """While a CUDA graph is captured it cannot be read, neither in the forward nor when remade."""
    head = RAda(torch.randn(7, 24))
    monkeypatch.setattr(rada, "MASK_BYTES", 0)

    def refuse():
        raise RuntimeError("Cannot call get_state during capture")

    monkeypatch.setattr(torch, "get_rng_state", refuse)
    head(torch.randn(3, 24)).sum().backward()
    assert head.pairs.weight.grad is not None


@pytest.mark.parametrize("queries", [rada.QUERIES, ("text",), ("image", "pair")])
def test_a_state_of_separate_projections_loads(queries):
    """As written before pair query, key and value were one matrix; also inside another module."""
    head = RAda(torch.randn(5, 16), queries=queries)
    older = {name: value.clone() for name, value in head.apart(head.state_dict()).items()}
    wanted = {"text", *(f"{n}.{k}" for n in ("key", "value", "out") for k in ("weight", "bias"))}
    assert wanted < set(older)
    assert "pairs.weight" not in older
    other = RAda(head.text, queries=queries)
    other.load_state_dict(older)
    for name, value in head.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    holder = nn.ModuleDict({"head": RAda(head.text, queries=queries)})
    holder.load_state_dict({f"head.{name}": value for name, value in older.items()})
    assert torch.equal(holder["head"](head.text), head(head.text))
    assert "key.weight" in older  # the caller's mapping is not changed
    del older["key.bias"]
    with pytest.raises(RuntimeError, match=r"Missing key.*pairs\.bias"):
        other.load_state_dict(older)


def test_starts_from_the_numbers_of_six_linear_layers():
    torch.manual_seed(5)
    head = RAda(TEXT)
    torch.manual_seed(5)
    layers = [nn.Linear(16, 16) for _ in range(5)]
    state = head.apart(head.state_dict())
    for layer, name in zip(layers, list(rada.RELEASED.values())[:5], strict=True):
        assert torch.equal(state[f"{name}.weight"], layer.weight)
        assert torch.equal(state[f"{name}.bias"], layer.bias)


def test_state_dict_of_the_whole_released_model_loads():
    layer, head = layer_and_head()
    prefixed = {f"custom_clip.{key}": value for key, value in layer.state_dict().items()}
    other = RAda(head.text, num_heads=4)
    other.load_released_state_dict({**prefixed, "logit_scale": torch.tensor(4.6)})
    for name, value in head.state_dict().items():
        assert torch.equal(other.state_dict()[name], value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("mha.k_proj.bias"), "'k_proj.bias' is missing"),
        (lambda s: s.update({"mha.extra.weight": torch.zeros(1)}), "got 'extra.weight' as well"),
        (lambda s: s.update({"mha.v_proj.weight": torch.zeros(3, 3)}), "must be .24, 24., got .3"),
        (
            lambda s: s.update({"mha.K_proj.bias": s.pop("mha.k_proj.bias")}),
            "got 'K_proj.bias' as well",
        ),
    ],
    ids=["missing", "extra", "shape", "renamed"],
)
def test_a_wrong_state_dict_changes_nothing(change, message):
    layer, head = layer_and_head()
    before = {name: value.clone() for name, value in head.state_dict().items()}
    state = {key: torch.zeros_like(value) for key, value in layer.state_dict().items()}
    change(state)
    with pytest.raises(ValueError, match=message) as caught:
        head.load_released_state_dict(state)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(head.state_dict()[name], value) for name, value in before.items())


TEXT = torch.randn(4, 16)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.randn(3, 15),), ValueError, r"image must be \[B, 16\], got \[3, 15\]"),
        ((torch.randn(3, 16).double(),), TypeError, "image must be torch.float32 like the head"),
        ((torch.randn(3, 16), torch.randn(4, 15)), ValueError, r"text must be \[K, 16\]"),
    ],
)
def test_bad_features_are_refused_by_name(arguments, error, message):
    with pytest.raises(error, match=message):
        RAda(TEXT).forward_with_penalty(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_image_and_a_zero_image(dtype):
    head = RAda(TEXT.to(dtype), logit_bias=2.0)
    assert head(torch.randn(0, 16, dtype=dtype)).shape == (0, 4)
    logits = head(torch.stack([torch.zeros(16), torch.ones(16)]).to(dtype))
    assert (logits[0] == 2).all()
    assert logits.isfinite().all()


def test_nan_image_spoils_its_own_row():
    _, head = layer_and_head()
    image = torch.randn(4, 24, dtype=torch.float64)
    clean = head(image)
    image[1, 3] = math.nan
    logits = head(image)
    assert logits[1].isnan().all()
    assert torch.equal(logits[[0, 2, 3]], clean[[0, 2, 3]])


def test_compiles_whole():
    _, head = layer_and_head()
    image = torch.randn(4, 24, dtype=torch.float64)
    torch.compiler.reset()
    compiled = torch.compile(head, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image), head(image), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_autocast_and_half_parameters_run(dtype):
    _, head = layer_and_head()
    head = head.to(dtype)
    image = torch.randn(4, 24)
    with torch.autocast("cpu", torch.bfloat16):
        logits, penalty = head.forward_with_penalty(image)
    (F.cross_entropy(logits.float(), torch.arange(4)) + penalty.mean()).backward()
    assert penalty.dtype == torch.float32
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in head.parameters())
