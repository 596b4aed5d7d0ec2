# SPDX-License-Identifier: Apache-2.0
"""rational_attn: the reference against the released equations, every kernel against it."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from vtclip import ops

# name -> (batch of the text query, B, H, K, d)
CASES = {
    "ordinary": (1, 3, 2, 20, 32),
    "own-texts": (3, 3, 2, 20, 32),
    "odd": (1, 2, 3, 17, 20),
    "two-tiles": (1, 2, 1, 67, 16),
    "three-tiles": (1, 1, 1, 131, 8),
    "one-of-each": (1, 1, 1, 1, 1),
    "one-class": (1, 3, 2, 1, 8),
    "two-classes": (1, 3, 2, 2, 8),
    "wide": (1, 1, 1, 5, 256),
    "width-64": (1, 2, 1, 50, 64),
    "width-128": (2, 2, 1, 19, 128),
    "width-59": (1, 2, 1, 9, 59),
    "no-images": (1, 0, 2, 3, 8),
    "no-heads": (1, 2, 0, 3, 8),
    "no-classes": (1, 2, 2, 0, 8),
    "no-width": (1, 2, 2, 3, 0),
}
KINDS = ("image", "text", "pair")
SUBSETS = (("image",), ("text",), ("pair",), ("image", "text"), ("image", "pair"), ("text", "pair"))


def draw(case: str, dtype: torch.dtype = torch.float32, kinds=KINDS) -> dict[str, Tensor]:
    text, B, H, K, d = CASES[case]
    shapes = {"image": (B, H, 1, d), "text": (text, H, K, d), "pair": (B, H, K, d)}
    shapes = {name: shapes[name] for name in kinds} | dict.fromkeys(("key", "value"), (B, H, K, d))
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


def asked(kinds, *tensors: Tensor, **options) -> Tensor:
    """The operator, called with some of its queries."""
    *queries, key, value = tensors
    given = dict(zip(kinds, queries, strict=True))
    return ops.rational_attn(*(given.get(name) for name in KINDS), key, value, **options)


def released(image, text, pair, key, value, scale: float) -> Tensor:
    """The released layer's equations with every K x K map: scores, joint softmax, times K, mean."""
    B, H, K, _ = key.shape
    queries = [image.expand(B, H, K, -1), text.expand(B, H, K, -1), pair]
    maps = []
    for query in queries:
        scores = torch.einsum("bhid,bhjd->bhij", query, key) * scale
        flat = scores.reshape(B, H, K * K)
        flat = (flat - flat.amax(-1, keepdim=True)).exp()
        maps.append((K * flat / flat.sum(-1, keepdim=True)).view(B, H, K, K))
    return torch.einsum("bhij,bhjd->bhid", sum(maps) / 3, value)


def cancelling(
    inputs: dict[str, Tensor], seeds: list[Tensor], fixed: dict[str, object], exact: bool = True
) -> dict[str, float]:
    """The largest sum of |terms| in the output and each gradient, with dS = A * (dA - c).

    Where a map saturates dA and c cancel. Not `exact`: where A = exp2(S log2(e) - max) is rounded
    before the exponential, its relative error is a rounding step of the largest score.
    """
    key, value = inputs["key"], inputs["value"]
    K, d = key.shape[2:]
    scale = (fixed.get("scale") or d**-0.5) / fixed.get("temperature", 1.0)
    seed = seeds[0].double().abs() / (len(inputs) - 2)
    sizes = dict.fromkeys(inputs, 0.0)
    terms_of = seed @ value.abs().transpose(-1, -2)
    d_key, weight = torch.zeros_like(key), torch.zeros_like(seed @ value.transpose(-1, -2))
    for name in KINDS:
        if name not in inputs:
            continue
        query = inputs[name].expand(value.shape) if name != "image" else inputs[name]
        scores = (query @ key.transpose(-1, -2)) * scale
        A = torch.softmax(scores.flatten(2), -1).view(scores.shape)
        A = A.expand(weight.shape) if name == "image" else K * A
        step = 1.0 if exact else 1.0 + float(scores.abs().amax())
        c = (A * terms_of).sum((-1, -2), keepdim=True) / (1 if name == "image" else K)
        terms = A * (terms_of + c) * abs(scale) * step
        d_query = terms @ key.abs()
        if name == "image":
            d_query = d_query.sum(2)
        elif inputs[name].shape[0] == 1:
            d_query = d_query.sum(0)
        sizes[name] = float(d_query.amax())
        d_key = d_key + terms.transpose(-1, -2) @ query.abs().expand(value.shape)
        weight = weight + A * step
    sizes["key"] = float(d_key.amax())
    sizes["output 0"] = float((weight @ value.abs()).amax()) / (len(inputs) - 2)
    sizes["value"] = float((weight.transpose(-1, -2) @ seed).amax())
    return sizes


@pytest.fixture
def room(impl):
    """Scores of the CPU kernels are exact to the exponential, those of the GPU ones rounded."""
    return functools.partial(cancelling, exact=impl == "cpu")


@pytest.mark.parametrize("case", CASES)
def test_every_dtype(case, dtype, impl, runnable, compare, room):
    runnable("rational_attn", dtype, CASES[case][-1])
    inputs = draw(case, dtype)
    floor = room if all(tensor.numel() for tensor in inputs.values()) else None
    compare(functools.partial(asked, KINDS), inputs, floor, temperature=0.7)


@pytest.mark.parametrize("impl", ["cpu"])
def test_as_many_maps_as_tasks_each_of_several_blocks(impl, runnable, compare, room):
    """csrc/cpu: blocks from K = 148 on, of one task from 33 maps on."""
    runnable("rational_attn", torch.float32, 4)
    shapes = {"image": (17, 2, 1, 4), "text": (1, 2, 150, 4)}
    shapes |= dict.fromkeys(("pair", "key", "value"), (17, 2, 150, 4))
    inputs = {name: torch.randn(shape) for name, shape in shapes.items()}
    compare(functools.partial(asked, KINDS), inputs, room, temperature=0.7)


@pytest.mark.parametrize("kinds", SUBSETS, ids="-".join)
@pytest.mark.parametrize("case", ["odd", "two-tiles", "one-of-each"])
def test_some_of_the_queries(case, kinds, impl, runnable, compare, room):
    runnable("rational_attn", torch.float32, CASES[case][-1])
    compare(functools.partial(asked, kinds), draw(case, kinds=kinds), room, scale=0.3)


@pytest.mark.parametrize("temperature", [0.01, 0.1, 100.0])
@pytest.mark.parametrize("magnitude", [0.01, 1.0, 30.0])
def test_temperatures_and_magnitudes(magnitude, temperature, impl, runnable, compare):
    runnable("rational_attn", torch.float32, 32)
    inputs = draw("ordinary")
    inputs["key"] = inputs["key"] * magnitude
    floor = functools.partial(cancelling, exact=False)
    compare(functools.partial(asked, KINDS), inputs, floor, temperature=temperature)


def test_any_strides(attention_layout, impl, runnable, compare):
    runnable("rational_attn", torch.float32, 20)
    inputs = {name: attention_layout(tensor) for name, tensor in draw("odd").items()}
    compare(functools.partial(asked, KINDS), inputs)


@pytest.mark.parametrize("kinds", [KINDS, *SUBSETS], ids="-".join)
@pytest.mark.parametrize("case", ["odd", "two-tiles", "one-of-each", "no-images", "no-classes"])
def test_packed_is_the_same_operator(case, kinds, impl, device, runnable):
    runnable("rational_attn", torch.float32, CASES[case][-1])
    inputs = {name: tensor.to(device) for name, tensor in draw(case, kinds=kinds).items()}
    queries = {name: inputs[name].requires_grad_() for name in ("image", "text") if name in inputs}
    apart = [inputs[name] for name in ("pair", "key", "value") if name in inputs]
    pairs = torch.stack([part.transpose(1, 2) for part in apart], 2).requires_grad_()
    leaves = [*queries.values(), pairs]
    packed = ops.rational_attn_packed(
        queries.get("image"), queries.get("text"), pairs, scale=0.4, temperature=0.8, impl=impl
    )
    views = pairs.permute(2, 0, 3, 1, 4).unbind()
    wanted = asked(kinds, *queries.values(), *views, scale=0.4, temperature=0.8, impl=impl)
    assert torch.equal(packed, wanted)
    seed = torch.randn(wanted.shape).to(wanted)
    grads = torch.autograd.grad(packed, leaves, seed)
    for one, other in zip(grads, torch.autograd.grad(wanted, leaves, seed), strict=True):
        assert torch.equal(one, other)
    if impl != "reference":
        assert grads[-1].is_contiguous()


def test_packed_with_one_image_query_for_all(impl, device, runnable):
    runnable("rational_attn", torch.float32, 20)
    image, text, *apart = (tensor.to(device) for tensor in draw("odd").values())
    pairs = torch.stack([part.transpose(1, 2) for part in apart], 2)
    one = image[:1].clone().requires_grad_()
    assert len(image) > 1
    shared = ops.rational_attn_packed(one, text, pairs, impl=impl)
    wanted = ops.rational_attn_packed(one.expand_as(image), text, pairs, impl=impl)
    assert torch.equal(shared, wanted)
    grads = [torch.autograd.grad(out.square().sum(), one)[0] for out in (shared, wanted)]
    assert grads[0].shape == one.shape
    assert torch.equal(*grads)


def test_packed_without_queries_that_need_gradients():
    image, text, *apart = draw("odd").values()
    pairs = torch.stack([part.transpose(1, 2) for part in apart], 2).requires_grad_()
    out = ops.rational_attn_packed(image, text.requires_grad_(), pairs.detach())
    (d_text,) = torch.autograd.grad(out.square().sum(), text)
    out = ops.rational_attn_packed(image, text, pairs)
    wanted, d_pairs = torch.autograd.grad(out.square().sum(), (text, pairs))
    assert torch.equal(d_text, wanted)
    assert d_pairs.shape == pairs.shape


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"pairs": torch.zeros(2, 17, 4, 3, 20)},
            ValueError,
            r"pairs must be \[B, K, 2\|3, H, d\]",
        ),
        ({"pairs": torch.zeros(2, 17, 3, 60)}, ValueError, r"H, d\], got \[2, 17, 3, 60\]"),
        ({"pairs": torch.zeros(2, 16, 3, 3, 20)}, ValueError, "text_query must be|pairs must be"),
        ({"image": torch.randn(2, 3, 2, 20)}, ValueError, "image_query must be"),
        ({"pairs": None}, TypeError, "pairs must be a Tensor, got NoneType"),
        (
            {"image": None, "text": None, "pairs": torch.zeros(2, 17, 2, 3, 20)},
            ValueError,
            "one of image_query, text_query must be a Tensor, got None for all",
        ),
    ],
)
def test_bad_packed_input_is_refused_by_name(change, error, message, refuses):
    image, text, *apart = draw("odd").values()
    pairs = torch.stack([part.transpose(1, 2) for part in apart], 2)
    given = {"image": image, "text": text, "pairs": pairs} | change
    refuses(error, message, ops.rational_attn_packed, *given.values())


@pytest.mark.parametrize("batches", [(1, 1, 1, 4, 4), (4, 4, 1, 1, 1), (1, 1, 4, 1, 1)])
def test_size_one_batches_broadcast(batches, impl, runnable, compare):
    runnable("rational_attn", torch.float32, 8)
    rows = (1, 5, 5, 5, 5)
    names = (*KINDS, "key", "value")
    inputs = {n: torch.randn(b, 2, r, 8) for n, b, r in zip(names, batches, rows, strict=True)}
    compare(functools.partial(asked, KINDS), inputs)


def test_nan_spoils_its_image_and_head_only(impl, device, runnable):
    runnable("rational_attn", torch.float32, 20)
    tensors = {name: tensor.to(device) for name, tensor in draw("odd").items()}
    clean = ops.rational_attn(*tensors.values(), impl=impl)
    tensors["pair"][1, 2, 3, 4] = torch.nan
    out = ops.rational_attn(*tensors.values(), impl=impl)
    assert out[1, 2].isnan().all()
    assert torch.equal(out[0], clean[0])
    assert torch.equal(out[1, :2], clean[1, :2])


def test_permuting_the_classes_permutes_the_result(impl, device, runnable):
    runnable("rational_attn", torch.float32, 16)
    tensors = [tensor.to(device) for tensor in draw("two-tiles").values()]
    order = torch.randperm(67, device=device)
    moved = [tensors[0], *(tensor[:, :, order] for tensor in tensors[1:])]
    out = ops.rational_attn(*tensors, impl=impl)
    torch.testing.assert_close(
        ops.rational_attn(*moved, impl=impl), out[:, :, order], rtol=1e-5, atol=1e-5
    )


def test_image_rows_are_one_ordinary_attention_row(impl, device, runnable):
    runnable("rational_attn", torch.float32, 20)
    tensors = {name: tensor.to(device) for name, tensor in draw("odd", kinds=("image",)).items()}
    out = asked(("image",), *tensors.values(), impl=impl)
    row = ops.cross_attn(*tensors.values(), impl="reference")
    torch.testing.assert_close(out, row.expand_as(out), rtol=1e-5, atol=1e-5)


def test_map_weights_sum_to_the_number_of_classes(impl, device, runnable):
    runnable("rational_attn", torch.float32, 16)
    tensors = {n: t.to(device) for n, t in draw("two-tiles", kinds=("text", "pair")).items()}
    tensors["value"] = torch.ones_like(tensors["value"])
    out = asked(("text", "pair"), *tensors.values(), impl=impl)  # row sums of the mean map
    torch.testing.assert_close(out.sum(2), torch.full_like(out[:, :, 0], 67.0), rtol=1e-5, atol=0)
    assert (out.amax(2) > 1.5).all()  # rows differ: they do not sum to 1 each


def test_reference_is_the_released_layer():
    tensors = list(draw("odd", torch.float64).values())
    leaves = [tensor.requires_grad_() for tensor in tensors]
    expected = released(*leaves, 0.4)
    actual = ops.rational_attn(*leaves, scale=0.2, temperature=0.5, impl="reference")
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    seed = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad(actual, leaves, seed),
        torch.autograd.grad(expected, leaves, seed),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_scale_and_temperature_default_to_those_of_the_released_layer():
    tensors = draw("odd").values()
    expected = ops.rational_attn(*tensors, scale=1 / math.sqrt(20), temperature=1.0)
    assert torch.equal(ops.rational_attn(*tensors), expected)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"temperature": 0.0}, ValueError, "temperature must be above 0, got 0.0"),
        ({"temperature": -1.0}, ValueError, "temperature must be above 0, got -1.0"),
        ({"scale": math.inf}, ValueError, "scale must be finite, got inf"),
        ({"pair": torch.randn(2, 3, 16, 20)}, ValueError, "pair_query must be"),
        ({"image": torch.randn(2, 3, 2, 20)}, ValueError, "image_query must be"),
        ({"text": torch.randn(1, 3, 17, 21)}, ValueError, r"must be \[B\|1, H, K, d\]"),
        ({"key": torch.randint(9, (2, 3, 17, 20))}, TypeError, "key must be one of float16"),
        ({"value": None}, TypeError, "value must be a Tensor, got NoneType"),
        (dict.fromkeys(KINDS), ValueError, "one of image_query, text_query, pair_query must be"),
    ],
)
def test_bad_input_is_refused_by_name(change, error, message, refuses):
    options = {name: value for name, value in change.items() if name in ("temperature", "scale")}
    tensors = {**draw("odd"), **{k: v for k, v in change.items() if k not in options}}
    refuses(error, message, ops.rational_attn, *tensors.values(), **options)
