# SPDX-License-Identifier: Apache-2.0
"""Every benchmark case: its shape, its inputs, its providers, its oracle.

A case gives named providers of the same function of the same leaves; `build` draws fresh inputs.
Inputs of operators come from `vtclip.testing.problems`. Add one here by a function that returns a
`Work` with its baselines, and by its rows in `CASES`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import baselines
import rada_baselines
import torch
from torch import Tensor, nn

from vtclip import heads, ops
from vtclip.nn import SharedQueryAttention
from vtclip.testing.problems import FUNCTIONS

Provider = Callable[..., Tensor]


@dataclass
class Work:
    """Providers of one result: each maps `leaves` to it; `leaves` marked need gradients."""

    leaves: list[Tensor]
    providers: dict[str, Provider]
    oracle: Callable[[], Tensor]
    parameters: dict[str, list[Tensor]] = field(default_factory=dict)
    forward_only: tuple[str, ...] = ()  # providers that torch cannot differentiate
    backward_memory: bool = False  # the peak of the backward alone is of interest

    def wanted(self, provider: str) -> list[Tensor]:
        """What forward+backward differentiates for this provider."""
        if provider in self.parameters:
            return self.parameters[provider]
        return [leaf for leaf in self.leaves if leaf.requires_grad]


@dataclass(frozen=True)
class Case:
    """One row group of the table."""

    op: str
    shape: dict[str, int]
    build: Callable[..., Work]
    dtype: torch.dtype = torch.float32
    compiled: tuple[str, ...] = ()  # providers shown through torch.compile as well
    graph: bool = False  # on CUDA, time the replay of a captured call

    @property
    def name(self) -> str:
        sizes = ",".join(f"{k}{v}" for k, v in self.shape.items())
        return f"{self.op}[{sizes},{str(self.dtype).removeprefix('torch.')}]"


def _work(
    name: str,
    device: str,
    dtype: torch.dtype,
    shape: dict[str, int],
    providers: dict[str, Provider],
    *,
    heads_inside: bool = False,
    wanted: slice = slice(None),
    ours: Provider | None = None,
) -> Work:
    """The public function `name` on inputs of the common table, next to `providers`.

    `wanted` are the leaves that need gradients where not all do; `ours` is called instead of the
    function where its result is not what is compared.
    """
    function = FUNCTIONS[name]
    leaves = function.draw(shape, device=device, dtype=dtype, heads_inside=heads_inside)
    call = ours or partial(getattr(ops, name), **function.keywords)
    work = Work(
        leaves,
        {"vtclip": call, **providers},
        lambda: call(*(leaf.double() for leaf in leaves), impl="reference"),
    )
    if wanted != slice(None):
        work.parameters = dict.fromkeys(work.providers, leaves[wanted])
    return work


def trained_parameters(module: nn.Module) -> list[Tensor]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def _module_work(
    leaves: list[Tensor], modules: dict[str, nn.Module], oracle: Callable[[], Tensor]
) -> Work:
    parameters = {name: trained_parameters(module) for name, module in modules.items()}
    return Work(leaves, dict(modules), oracle, parameters)


def cross_attn(device: str, dtype: torch.dtype, **shape: int) -> Work:
    providers: dict[str, Provider] = {
        "sdpa, query expanded": baselines.attention_sdpa,
        "naive": baselines.attention_naive,
        "folded in plain torch": baselines.attention_folded,
    }
    return _work("cross_attn", device, dtype, shape, providers)


def shared_query_attention(device: str, dtype: torch.dtype, **shape: int) -> Work:
    B, K, L, C, H = (shape[letter] for letter in "BKLCH")
    ours = SharedQueryAttention(K, C, H).to(device, dtype)
    multihead = baselines.ExpandedMultihead(K, C, H).to(device, dtype)
    ours.load_multihead_attention(multihead.attention, multihead.query)
    tokens = torch.randn(B, L, C, device=device, dtype=dtype)

    def oracle() -> Tensor:
        return copy.deepcopy(multihead).double()(tokens.double())

    modules = {"vtclip": ours, "nn.MultiheadAttention, query expanded": multihead}
    return _module_work([tokens], modules, oracle)


def cosine_logits(device: str, dtype: torch.dtype, **shape: int) -> Work:
    providers = {"normalize and matmul": lambda *t: baselines.cosine_normalized(*t, 100.0)}
    return _work("cosine_logits", device, dtype, shape, providers)


def norm_cosine_logits(device: str, dtype: torch.dtype, **shape: int) -> Work:
    providers = {"layer_norm, add, cosine": lambda *t: baselines.tail_plain(*t, 100.0)}
    return _work("norm_cosine_logits", device, dtype, shape, providers)


def ffn_cosine_logits(device: str, dtype: torch.dtype, **shape: int) -> Work:
    def linear_then_norm(h: Tensor, w: Tensor, b: Tensor, x: Tensor, *rest: Tensor) -> Tensor:
        z = torch.nn.functional.linear(h, w, b).add_(x)
        return ops.norm_cosine_logits(z, *rest, scale=100.0)

    def plain(h: Tensor, w: Tensor, b: Tensor, x: Tensor, *rest: Tensor) -> Tensor:
        return baselines.tail_plain(torch.nn.functional.linear(h, w, b).add_(x), *rest, 100.0)

    providers = {
        "linear, norm_cosine_logits": linear_then_norm,
        "linear, layer_norm, add, cosine": plain,
    }
    # the features are frozen: parameters and what lies before them need gradients
    wanted = slice(6)
    return _work("ffn_cosine_logits", device, dtype, shape, providers, wanted=wanted)


def vtclip_head(device: str, dtype: torch.dtype, B: int, K: int, C: int, L: int, F: int) -> Work:
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(C, 8, F, dropout=0.0, batch_first=True)
    layer = layer.to(device=device, dtype=dtype)
    text = torch.nn.functional.normalize(torch.randn(K, C, device=device), dim=-1).to(dtype)
    image, spatial = (torch.randn(shape, device=device).to(dtype) for shape in ((B, C), (B, L, C)))
    head = heads.VTCLIP(text, ffn_dim=F).to(device=device, dtype=dtype)
    head.load_decoder_layer(layer)
    naive = baselines.NaiveVTCLIP(layer, text, 100.0)
    shared = baselines.SharedVTCLIP(layer, text, 100.0)

    def oracle() -> Tensor:
        module = copy.deepcopy(naive).double()
        return module(image.double(), spatial.double())

    modules: dict[str, nn.Module] = {
        "vtclip": head,
        "nn.TransformerDecoderLayer": naive,
        "shared in plain torch": shared,
    }
    return _module_work([image, spatial], modules, oracle)


def rational_attn(device: str, dtype: torch.dtype, **shape: int) -> Work:
    providers: dict[str, Provider] = {
        "released: three repeated maps": rada_baselines.attention_released,
        "shared and reduced in plain torch": rada_baselines.attention_reduced,
    }
    forward_only: tuple[str, ...] = ()
    if device == "cpu":
        forward_only = ("sdpa re-weighted by its log-sum-exp",)
        providers[forward_only[0]] = rada_baselines.attention_sdpa_lse
    else:
        flex = torch.compile(rada_baselines.attention_flex_lse)
        providers["FlexAttention re-weighted by its log-sum-exp, compiled"] = flex
    work = _work("rational_attn", device, dtype, shape, providers, heads_inside=True)
    work.forward_only = forward_only
    return work


def unit_products(device: str, dtype: torch.dtype, **shape: int) -> Work:
    def products(*tensors: Tensor, impl: ops.Impl | None = None) -> Tensor:
        return ops.unit_products(*tensors, scale=100.0, impl=impl).products

    providers = {"normalize, multiply": lambda *t: rada_baselines.products(*t, 100.0)}
    return _work("unit_products", device, dtype, shape, providers, ours=products)


def rational_logits(device: str, dtype: torch.dtype, **shape: int) -> Work:
    providers = {"relu, multiply, sum": lambda *t: rada_baselines.masked_logits(*t, 100.0)}
    return _work("rational_logits", device, dtype, shape, providers)


def rational_head(device: str, dtype: torch.dtype, **shape: int) -> Work:
    def with_penalty(*tensors: Tensor, impl: ops.Impl | None = None) -> Tensor:
        logits, penalty = ops.rational_head(*tensors, scale=100.0, penalty="mse", impl=impl)
        return logits + penalty[:, None]

    providers = {"linear, relu, multiply, sum": lambda *t: rada_baselines.masked_head(*t, 100.0)}
    # the features are frozen: parameters and what lies before them need gradients
    wanted = slice(3)
    return _work("rational_head", device, dtype, shape, providers, wanted=wanted, ours=with_penalty)


def rada_head(device: str, dtype: torch.dtype, B: int, K: int, D: int, H: int) -> Work:
    torch.manual_seed(0)
    image, text = (
        torch.nn.functional.normalize(torch.randn(rows, D, device=device), dim=-1).to(dtype)
        for rows in (B, K)
    )
    released = rada_baselines.ReleasedRAda(text, H, 100.0).to(device=device, dtype=dtype)
    reduced = rada_baselines.ReducedRAda(text, H, 100.0).to(device=device, dtype=dtype)
    reduced.load_state_dict(released.state_dict())

    def oracle() -> Tensor:
        out: Tensor = copy.deepcopy(released).double()(image.double())
        return out

    modules: dict[str, nn.Module] = {
        "vtclip": rada_baselines.OurRAda(released),
        "released layer": released,
        "shared and reduced in plain torch": reduced,
    }
    return _module_work([image], modules, oracle)


RADA = {"B": 32, "K": 50}
MANY_CLASSES = {"B": 8, "K": 500}
ATTENTION = {"B": 32, "H": 8, "K": 100, "L": 49, "d": 128}
SHARED_QUERY = {"B": 32, "K": 64, "L": 196, "C": 512, "H": 8}
CASES = (
    Case("cross_attn", ATTENTION, cross_attn, compiled=("naive",)),
    Case("cross_attn", {**ATTENTION, "L": 196, "d": 64}, cross_attn),
    Case("cross_attn", {**ATTENTION, "L": 196}, cross_attn),
    Case("cross_attn", {**ATTENTION, "B": 8, "L": 576}, cross_attn),
    Case("cross_attn", {**ATTENTION, "B": 8}, cross_attn, torch.bfloat16),
    Case("SharedQueryAttention", SHARED_QUERY, shared_query_attention),
    Case("cosine_logits", {"B": 128, "K": 1000, "D": 512}, cosine_logits),
    Case("norm_cosine_logits", {"B": 32, "K": 100, "C": 1024}, norm_cosine_logits),
    Case("ffn_cosine_logits", {"B": 32, "K": 100, "C": 1024, "F": 2048}, ffn_cosine_logits),
    Case(
        "VTCLIP",
        {"B": 32, "K": 100, "C": 1024, "L": 49, "F": 2048},
        vtclip_head,
        compiled=("nn.TransformerDecoderLayer", "shared in plain torch"),
    ),
    *(
        case
        for sizes in (RADA, MANY_CLASSES)
        for case in (
            Case("rational_attn", {**sizes, "H": 8, "d": 64}, rational_attn),
            Case("unit_products", {**sizes, "D": 512}, unit_products),
            Case("rational_logits", {**sizes, "D": 512}, rational_logits),
            Case("rational_head", {**sizes, "D": 512}, rational_head),
            Case("RAda", {**sizes, "D": 512, "H": 8}, rada_head, compiled=("released layer",)),
        )
    ),
)
