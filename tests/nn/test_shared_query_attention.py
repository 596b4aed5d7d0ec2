# SPDX-License-Identifier: Apache-2.0
"""SharedQueryAttention: nn.MultiheadAttention of expanded queries, wherever a module is used."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from two_ranks import gradients_of_rank

from vtclip.backends import native
from vtclip.nn import SharedQueryAttention
from vtclip.ops import _any_order

B, K, L, DIM, HEADS, C = 3, 5, 7, 12, 4, 10
SAYS = "ignore:.*(runs|recompute) through:UserWarning"


def module(**options: Any) -> SharedQueryAttention:
    """Of float64, with biases that are not 0."""
    made = SharedQueryAttention(K, DIM, HEADS, **{"dtype": torch.float64, **options})
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made


def tokens(width: int = DIM, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(B, L, width, dtype=dtype, requires_grad=True)


def peer(token_dim: int = DIM, bias: bool = True) -> tuple[nn.MultiheadAttention, nn.Parameter]:
    """torch's module with biases that are not 0, and queries."""
    widths = {"kdim": token_dim, "vdim": token_dim}
    made = nn.MultiheadAttention(
        DIM, HEADS, bias=bias, batch_first=True, dtype=torch.float64, **widths
    )
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_()
    return made, nn.Parameter(torch.randn(K, DIM, dtype=torch.float64))


def padding() -> Tensor:
    hidden = torch.rand(B, L) > 0.6
    hidden[:, 0] = False
    return hidden


def gradients_of_peer(theirs: nn.MultiheadAttention, query: Tensor) -> dict[str, Tensor]:
    """By the names of ours."""
    packed = theirs.in_proj_weight is not None
    weights = theirs.in_proj_weight.grad.chunk(3) if packed else None
    found = {"query": query.grad, "out_proj.weight": theirs.out_proj.weight.grad}
    for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
        apart = None if packed else getattr(theirs, f"{name}_weight").grad
        found[f"{name}.weight"] = weights[i] if packed else apart
        if theirs.in_proj_bias is not None:
            found[f"{name}.bias"] = theirs.in_proj_bias.grad.chunk(3)[i]
            found["out_proj.bias"] = theirs.out_proj.bias.grad
    return found


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("width", [DIM, C], ids="C{}".format)
@pytest.mark.parametrize("masked", [False, True])
def test_outputs_maps_and_gradients_are_those_of_multihead_attention(masked, width, bias):
    theirs, query = peer(width, bias)
    ours = module(token_dim=width, bias=bias)
    ours.load_multihead_attention(theirs, query)
    inputs, hidden = tokens(width), padding() if masked else None
    expanded = query.expand(B, -1, -1)
    wanted, maps = theirs(
        expanded, inputs, inputs, key_padding_mask=hidden, average_attn_weights=False
    )
    found = ours(inputs, key_padding_mask=hidden)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(ours.weights(inputs, key_padding_mask=hidden), maps)
    seed = torch.randn_like(wanted)
    (to_tokens,) = torch.autograd.grad(wanted, [inputs], seed, retain_graph=True)
    wanted.backward(seed)
    inputs.grad = None
    found.backward(seed)
    torch.testing.assert_close(inputs.grad, to_tokens, rtol=1e-10, atol=1e-10)
    expected = gradients_of_peer(theirs, query)
    assert set(expected) == set(ours.state_dict())
    for name, parameter in ours.named_parameters():
        # a bias of the keys shifts whole rows of scores: its gradient is a rounded 0
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.filterwarnings(SAYS)
def test_masks_of_queries_are_those_of_multihead_attention():
    theirs, query = peer()
    ours = module()
    ours.load_multihead_attention(theirs, query)
    inputs, added = tokens(), torch.randn(K, L, dtype=torch.float64)
    visible = torch.rand(K, L) > 0.4
    visible[:, 0] = True
    expanded = query.expand(B, -1, -1)
    for mine, of_torch in ((added, added), (visible, ~visible)):
        wanted, maps = theirs(
            expanded, inputs, inputs, attn_mask=of_torch, average_attn_weights=False
        )
        torch.testing.assert_close(ours(inputs, attn_mask=mine), wanted)
        torch.testing.assert_close(ours.weights(inputs, attn_mask=mine), maps)


def test_key_masks_are_the_opposite_of_padding():
    ours, inputs, hidden = module(), tokens(), padding()
    by_padding = ours(inputs, key_padding_mask=hidden)
    assert torch.equal(by_padding, ours(inputs, key_mask=~hidden))
    assert not torch.equal(by_padding, ours(inputs))


def test_one_image_is_that_row_of_many():
    ours, inputs = module(), tokens()
    torch.testing.assert_close(ours(inputs[1:2]), ours(inputs)[1:2])


@pytest.mark.parametrize("project", [True, False])
@pytest.mark.parametrize("how", ["no tokens", "all masked"])
def test_an_image_without_tokens_reads_zeros(how, project):
    ours, inputs = module(out_proj=project), tokens()
    mask = None
    if how == "no tokens":
        inputs = inputs.detach()[:, :0].requires_grad_()
    else:
        mask = torch.zeros(B, L, dtype=torch.bool)
    out = ours(inputs, key_mask=mask)
    wanted = ours.out_proj.bias if project else torch.zeros(DIM, dtype=torch.float64)
    assert torch.equal(out, wanted.expand(B, K, DIM))
    if project:
        out.sum().backward()
        assert (inputs.grad == 0).all()
        assert (ours.query.grad == 0).all()
    assert (ours.weights(inputs, key_mask=mask) == 0).all()


def test_no_images():
    out = module()(tokens()[:0])
    assert out.shape == (0, K, DIM)


def test_gradcheck():
    ours, inputs = module(token_dim=C), tokens(C)
    names, leaves = zip(*ours.named_parameters(), strict=True)

    def call(inputs: Tensor, *parameters: Tensor) -> Tensor:
        state = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(ours, state, (inputs,), {"key_padding_mask": hidden})

    hidden = padding()
    assert torch.autograd.gradcheck(call, (inputs, *leaves))


def test_compiled_whole():
    ours, inputs = module(), tokens()
    torch.compiler.reset()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    wanted, found = ours(inputs), compiled(inputs)
    torch.testing.assert_close(found, wanted)
    for one, other in zip(
        torch.autograd.grad(found.sum(), [inputs, ours.query]),
        torch.autograd.grad(wanted.sum(), [inputs, ours.query]),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    torch.compiler.reset()


def test_autocast():
    ours, inputs = module(dtype=torch.float32), tokens(dtype=torch.float32)
    exact = ours(inputs).detach()
    with torch.autocast("cpu", torch.bfloat16):
        narrow, maps = ours(inputs), ours.weights(inputs)
    assert (narrow.dtype, maps.dtype) == (torch.bfloat16, torch.bfloat16)
    assert float((narrow.detach().float() - exact).abs().max()) < 0.1 * float(exact.abs().max())
    narrow.float().sum().backward()
    assert ours.query.grad.dtype == torch.float32


@pytest.mark.filterwarnings(SAYS)
def test_dropout_is_of_training_alone_and_repeats_by_its_seed():
    ours, inputs = module(dropout=0.5), tokens()

    def run() -> Tensor:
        torch.manual_seed(3)
        return ours(inputs)

    first = run()
    assert torch.equal(first, run())
    assert not torch.equal(first, ours(inputs))
    ours.eval()
    plain = module()
    plain.load_state_dict(ours.state_dict())
    assert torch.equal(run(), plain(inputs))


@pytest.mark.skipif(bool(native.load_cpu()), reason="vtclip._C is not built")
def test_the_cost_of_dropout_is_said_in_training_alone(monkeypatch):
    monkeypatch.setattr(_any_order, "_WARNED", set())
    ours, inputs = module(dropout=0.5), tokens()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.eval()(inputs)
    with pytest.warns(UserWarning, match="cross_attn: dropout_p runs through impl="):
        ours.train()(inputs)


def test_meta_device_then_real_memory():
    made = SharedQueryAttention(K, DIM, HEADS, device="meta", dtype=torch.float64)
    assert made(torch.empty(B, L, DIM, device="meta", dtype=torch.float64)).shape == (B, K, DIM)
    made.to_empty(device="cpu")
    torch.manual_seed(5)
    made.reset_parameters()
    usual = SharedQueryAttention(K, DIM, HEADS, dtype=torch.float64)
    torch.manual_seed(5)
    usual.reset_parameters()
    for name, parameter in usual.state_dict().items():
        assert torch.equal(made.state_dict()[name], parameter), name
    assert float(usual.query.detach().std()) == pytest.approx(0.02, rel=0.5)
    assert (usual.k_proj.bias == 0).all()


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(way):
    ours, inputs = module(token_dim=C), tokens(C)
    other = way(ours)
    assert torch.equal(other(inputs), ours(inputs))
    assert other.query.data_ptr() != ours.query.data_ptr()
    assert repr(other) == repr(ours)


def test_names_and_representation():
    ours = module(token_dim=C)
    parts = ["q_proj", "k_proj", "v_proj", "out_proj"]
    names = ["query", *(f"{part}.{kind}" for part in parts for kind in ("weight", "bias"))]
    assert list(ours.state_dict()) == names
    assert list(module(bias=False, out_proj=False).state_dict()) == [
        "query", *(f"{part}.weight" for part in parts[:3]),
    ]  # fmt: skip
    assert f"num_queries={K}, dim={DIM}, heads={HEADS}, token_dim={C}, dropout=0.0" in repr(ours)


def test_two_processes_have_the_gradients_of_one(tmp_path):
    ours, inputs = module(), torch.randn(4, L, DIM, dtype=torch.float64)
    ours(inputs).square().mean().backward()
    with torch.multiprocessing.Manager() as manager:
        result = manager.dict()
        arguments = (str(tmp_path / "store"), (K, DIM, HEADS), ours.state_dict(), inputs, result)
        torch.multiprocessing.spawn(gradients_of_rank, args=arguments, nprocs=2)
        found = dict(result)
    assert set(found) == {0, 1}
    for name, parameter in ours.named_parameters():
        for number in (0, 1):
            grad = torch.from_numpy(found[number][name])
            torch.testing.assert_close(grad, parameter.grad, rtol=1e-9, atol=1e-9, msg=name)


MADE = {
    "queries": ((0, 8, 2), {}, ValueError, "num_queries must be at least 1, got 0"),
    "kind": ((4, 8.0, 2), {}, TypeError, "dim must be an int, got float"),
    "heads": ((4, 8, 3), {}, ValueError, "dim must be a multiple of heads = 3, got 8"),
    "token width": ((4, 8, 2), {"token_dim": -1}, ValueError, "token_dim must be at least 1"),
    "dropout": ((4, 8, 2), {"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
}


@pytest.mark.parametrize("case", MADE)
def test_bad_options_are_named(case):
    arguments, options, kind, message = MADE[case]
    with pytest.raises(kind, match=f"^SharedQueryAttention: {message}"):
        SharedQueryAttention(*arguments, **options)


def test_bad_inputs_are_named():
    ours, mask = module(), torch.ones(B, L, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"tokens must be \[B, L, 12\], got \[7, 12\]"):
        ours(tokens()[0])
    with pytest.raises(ValueError, match="are opposites, give one of them"):
        ours(tokens(), key_mask=mask, key_padding_mask=mask)
    with pytest.raises(TypeError, match=r"must be bool \(True = padding\), got float32"):
        ours(tokens(), key_padding_mask=mask.float())
    with pytest.raises(ValueError, match=r"key_mask must be \[B\|1, L\] = \[3\|1, 7\]"):
        ours(tokens(), key_mask=mask[:, :4])


def test_what_does_not_fit_is_not_loaded():
    theirs, query = peer()
    with pytest.raises(ValueError, match="attention must have 4 heads, got 2"):
        module().load_multihead_attention(nn.MultiheadAttention(DIM, 2), query)
    with pytest.raises(ValueError, match="neither bias_k nor add_zero_attn"):
        module().load_multihead_attention(
            nn.MultiheadAttention(DIM, HEADS, add_bias_kv=True), query
        )
    with pytest.raises(ValueError, match=r"query must be \[5, 12\], got \[4, 12\]"):
        module().load_multihead_attention(theirs, query[:4])
    with pytest.raises(ValueError, match=r"k_proj.bias must be None, got \[12\]"):
        module(bias=False).load_multihead_attention(theirs, query)
