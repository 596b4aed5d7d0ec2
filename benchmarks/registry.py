# SPDX-License-Identifier: Apache-2.0
"""Every benchmark case: its shape, its inputs, its providers, its oracle.

A case gives named providers of the same function of the same leaves; `build` draws fresh inputs.
Add an operator by adding a function that returns a `Work` and its rows to `CASES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import baselines
import rada_baselines
import torch
from torch import Tensor, nn

from vtclip import heads, ops

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
        own = self.parameters.get(provider)
        return own if own is not None else [leaf for leaf in self.leaves if leaf.requires_grad]


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


def cross_attn(device: str, dtype: torch.dtype, B: int, H: int, K: int, L: int, d: int) -> Work:
    query, key, value = (
        torch.randn(shape, device=device).to(dtype).requires_grad_()
        for shape in ((1, H, K, d), (B, H, L, d), (B, H, L, d))
    )
    providers: dict[str, Provider] = {
        "vtclip": ops.cross_attn,
        "sdpa, query expanded": baselines.attention_sdpa,
        "naive": baselines.attention_naive,
        "folded in plain torch": baselines.attention_folded,
    }
    return Work(
        [query, key, value],
        providers,
        lambda: ops.cross_attn(query.double(), key.double(), value.double(), impl="reference"),
    )


def cosine_logits(device: str, dtype: torch.dtype, B: int, K: int, D: int) -> Work:
    image, text = (
        torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in ((B, D), (K, D))
    )
    return Work(
        [image, text],
        {
            "vtclip": lambda x, t: ops.cosine_logits(x, t, scale=100.0),
            "normalize and matmul": lambda x, t: baselines.cosine_normalized(x, t, 100.0),
        },
        lambda: ops.cosine_logits(image.double(), text.double(), scale=100.0, impl="reference"),
    )


def norm_cosine_logits(device: str, dtype: torch.dtype, B: int, K: int, C: int) -> Work:
    shapes = ((B, K, C), (C,), (C,), (K, C), (B, C))
    leaves = [torch.randn(shape, device=device).to(dtype).requires_grad_() for shape in shapes]
    return Work(
        leaves,
        {
            "vtclip": lambda *t: ops.norm_cosine_logits(*t, scale=100.0),
            "layer_norm, add, cosine": lambda *t: baselines.tail_plain(*t, 100.0),
        },
        lambda: ops.norm_cosine_logits(
            *(leaf.double() for leaf in leaves), scale=100.0, impl="reference"
        ),
    )


def ffn_cosine_logits(device: str, dtype: torch.dtype, B: int, K: int, C: int, F: int) -> Work:
    shapes = ((B, K, F), (C, F), (C,), (B, K, C), (C,), (C,), (K, C), (B, C))
    sizes = (1.0, F**-0.5, 0.1, 1.0, 1.0, 1.0, 1.0, 1.0)
    leaves = [
        (size * torch.randn(shape, device=device)).to(dtype).requires_grad_()
        for shape, size in zip(shapes, sizes, strict=True)
    ]

    def linear_then_norm(h: Tensor, w: Tensor, b: Tensor, x: Tensor, *rest: Tensor) -> Tensor:
        z = torch.nn.functional.linear(h, w, b).add_(x)
        return ops.norm_cosine_logits(z, *rest, scale=100.0)

    def plain(h: Tensor, w: Tensor, b: Tensor, x: Tensor, *rest: Tensor) -> Tensor:
        return baselines.tail_plain(torch.nn.functional.linear(h, w, b).add_(x), *rest, 100.0)

    providers: dict[str, Provider] = {
        "vtclip": lambda *t: ops.ffn_cosine_logits(*t, scale=100.0),
        "linear, norm_cosine_logits": linear_then_norm,
        "linear, layer_norm, add, cosine": plain,
    }
    work = Work(
        leaves,
        providers,
        lambda: ops.ffn_cosine_logits(
            *(leaf.double() for leaf in leaves), scale=100.0, impl="reference"
        ),
    )
    # the features are frozen: parameters and what lies before them need gradients
    work.parameters = dict.fromkeys(work.providers, leaves[:6])
    return work


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
        wide = nn.TransformerDecoderLayer(
            C, 8, F, dropout=0.0, batch_first=True, dtype=torch.float64
        )
        wide.load_state_dict(layer.state_dict())
        module = baselines.NaiveVTCLIP(wide.to(device), text.double(), 100.0)
        return module(image.double(), spatial.double())

    modules: dict[str, nn.Module] = {
        "vtclip": head,
        "nn.TransformerDecoderLayer": naive,
        "shared in plain torch": shared,
    }
    parameters = {
        name: [p for p in module.parameters() if p.requires_grad]
        for name, module in modules.items()
    }
    return Work([image, spatial], dict(modules), oracle, parameters)


def rational_attn(device: str, dtype: torch.dtype, B: int, K: int, H: int, d: int) -> Work:
    # memory [B, K, H, d], as a projection leaves it
    leaves = [
        torch.randn(shape, device=device).to(dtype).transpose(1, 2).requires_grad_()
        for shape in ((B, 1, H, d), (1, K, H, d), (B, K, H, d), (B, K, H, d), (B, K, H, d))
    ]
    providers: dict[str, Provider] = {
        "vtclip": ops.rational_attn,
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
    return Work(
        leaves,
        providers,
        lambda: ops.rational_attn(*(leaf.double() for leaf in leaves), impl="reference"),
        forward_only=forward_only,
    )


def unit_products(device: str, dtype: torch.dtype, B: int, K: int, D: int) -> Work:
    leaves = [torch.randn(rows, D, device=device).to(dtype).requires_grad_() for rows in (B, K)]
    return Work(
        leaves,
        {
            "vtclip": lambda *t: ops.unit_products(*t, scale=100.0).products,
            "normalize, multiply": lambda *t: rada_baselines.products(*t, 100.0),
        },
        lambda: (
            ops.unit_products(
                *(leaf.double() for leaf in leaves), scale=100.0, impl="reference"
            ).products
        ),
    )


def rational_logits(device: str, dtype: torch.dtype, B: int, K: int, D: int) -> Work:
    leaves = [
        torch.randn(shape, device=device).to(dtype).requires_grad_()
        for shape in ((B, D), (K, D), (B, K, D))
    ]
    return Work(
        leaves,
        {
            "vtclip": lambda *t: ops.rational_logits(*t, scale=100.0),
            "relu, multiply, sum": lambda *t: rada_baselines.masked_logits(*t, 100.0),
        },
        lambda: ops.rational_logits(
            *(leaf.double() for leaf in leaves), scale=100.0, impl="reference"
        ),
    )


def rational_head(device: str, dtype: torch.dtype, B: int, K: int, D: int) -> Work:
    unit = D**-0.5
    shapes = (((B, K, D), 1.0), ((D, D), unit), ((D,), 0.1), ((B, D), unit), ((K, D), unit))
    leaves = [
        (size * torch.randn(shape, device=device)).to(dtype).requires_grad_()
        for shape, size in shapes
    ]

    def with_penalty(*tensors: Tensor, impl: ops.Impl | None = None) -> Tensor:
        logits, penalty = ops.rational_head(*tensors, scale=100.0, penalty="mse", impl=impl)
        return logits + penalty[:, None]

    work = Work(
        leaves,
        {
            "vtclip": with_penalty,
            "linear, relu, multiply, sum": lambda *t: rada_baselines.masked_head(*t, 100.0),
        },
        lambda: with_penalty(*(leaf.double() for leaf in leaves), impl="reference"),
    )
    # the features are frozen: parameters and what lies before them need gradients
    work.parameters = dict.fromkeys(work.providers, leaves[:3])
    return work


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
        wide = rada_baselines.ReleasedRAda(text.double(), H, 100.0).to(device).double()
        wide.load_state_dict(released.state_dict())
        out: Tensor = wide(image.double())
        return out

    modules: dict[str, nn.Module] = {
        "vtclip": rada_baselines.OurRAda(released),
        "released layer": released,
        "shared and reduced in plain torch": reduced,
    }
    parameters = {
        name: [p for p in module.parameters() if p.requires_grad]
        for name, module in modules.items()
    }
    return Work([image], dict(modules), oracle, parameters)


RADA = {"B": 32, "K": 50}
MANY_CLASSES = {"B": 8, "K": 500}
ATTENTION = {"B": 32, "H": 8, "K": 100, "L": 49, "d": 128}
CASES = (
    Case("cross_attn", ATTENTION, cross_attn, compiled=("naive",)),
    Case("cross_attn", {**ATTENTION, "L": 196, "d": 64}, cross_attn),
    Case("cross_attn", {**ATTENTION, "L": 196}, cross_attn),
    Case("cross_attn", {**ATTENTION, "B": 8, "L": 576}, cross_attn),
    Case("cross_attn", {**ATTENTION, "B": 8}, cross_attn, torch.bfloat16),
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
