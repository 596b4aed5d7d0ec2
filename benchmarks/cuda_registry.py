# SPDX-License-Identifier: Apache-2.0
"""The cases of `targets.py`, for a CUDA device only: providers that CPU tables do not show.

In bfloat16, hidden width F = 4 C. Added to `registry.py`'s baselines: every backend of torch's
scaled_dot_product_attention, FlexAttention with its log-sum-exp re-weighted, and what vtclip does
without Triton.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import baselines
import rada_baselines
import registry
import torch
from registry import Case, Provider, Work
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from vtclip import ops
from vtclip.ops import _select

FLEX = "FlexAttention re-weighted by its log-sum-exp"
SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
}


@contextmanager
def _no_triton() -> Iterator[None]:
    before = _select.BACKENDS
    _select.BACKENDS = tuple(backend for backend in before if backend.name != "triton")
    try:
        yield
    finally:
        _select.BACKENDS = before


def without_triton(provider: Provider) -> Provider:
    """The same call, its operators taken from the CUDA library, else from the reference."""

    def call(*leaves: Tensor) -> Tensor:
        with _no_triton():  # the backward keeps what the forward has chosen
            return provider(*leaves)

    return call


def sdpa_by(backend: SDPBackend) -> Provider:
    """torch's fused attention of the expanded query, by one of its backends or not at all."""

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return baselines.attention_sdpa(query, key, value)

    return call


def cross_attn(device: str, dtype: torch.dtype, **shape: int) -> Work:
    work = registry.cross_attn(device, dtype, **shape)
    del work.providers["sdpa, query expanded"]
    work.providers |= {name: sdpa_by(backend) for name, backend in SDPA.items()}
    if device == "cuda":
        work.providers["vtclip, impl=cuda"] = lambda *t: ops.cross_attn(*t, impl="cuda")
    work.backward_memory = True
    return work


def uncompiled(module: nn.Module) -> Provider:
    """FlexAttention as plain torch, which it warns about: to check a result, not to time."""

    def call(*leaves: Tensor) -> Tensor:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="flex_attention called without")
            out: Tensor = module(*leaves)
            return out

    return call


def _sharing_parameters(work: Work, providers: dict[str, Provider]) -> Work:
    # providers that share the parameters of ours
    work.providers |= providers
    work.parameters |= dict.fromkeys(providers, work.parameters["vtclip"])
    return work


def vtclip_head(device: str, dtype: torch.dtype, **shape: int) -> Work:
    work = registry.vtclip_head(device, dtype, **shape)
    return _sharing_parameters(
        work, {"vtclip, without Triton": without_triton(work.providers["vtclip"])}
    )


def rada_head(device: str, dtype: torch.dtype, **shape: int) -> Work:
    work = registry.rada_head(device, dtype, **shape)
    reduced = work.providers["shared and reduced in plain torch"]
    flex = rada_baselines.FlexRAda(reduced.text, reduced.num_heads, reduced.scale)
    flex = flex.to(device=device, dtype=dtype)
    flex.load_state_dict(reduced.state_dict())
    _sharing_parameters(work, {"vtclip, without Triton": without_triton(work.providers["vtclip"])})
    if device == "cuda":
        name = f"{FLEX}, compiled"
        work.providers[name] = torch.compile(flex)
    else:
        name = FLEX
        work.providers[name] = uncompiled(flex)
        work.forward_only = (*work.forward_only, name)
    work.parameters[name] = registry.trained_parameters(flex)
    return work


def _case(op: str, build: Callable[..., Work], *, graph: bool = False, **shape: int) -> Case:
    compiled = {
        "cross_attn": ("naive", "folded in plain torch"),
        "VTCLIP": ("nn.TransformerDecoderLayer", "shared in plain torch"),
        "RAda": ("released layer", "shared and reduced in plain torch"),
    }[op]
    return Case(op, shape, build, torch.bfloat16, compiled=compiled, graph=graph)


CASES = (
    *(_case("RAda", rada_head, B=32, K=K, D=512, H=8, graph=K == 50) for K in (1000, 500, 50)),
    _case("VTCLIP", vtclip_head, B=32, K=1000, C=1024, L=49, F=4096),
    _case("VTCLIP", vtclip_head, B=128, K=1000, C=512, L=196, F=2048),
    _case("VTCLIP", vtclip_head, B=32, K=100, C=1024, L=49, F=4096, graph=True),
    *(
        _case("cross_attn", cross_attn, B=32, H=8, K=1000, L=L, d=128)
        for L in (49, 100, 196, 256, 576)
    ),
)
TINY = {"B": 2, "K": 5, "C": 32, "D": 32, "L": 7, "F": 48, "d": 16, "H": 2}


def tiny(case: Case) -> Case:
    """The same case at sizes for a CPU, to see that every provider gives the right result.

    Decoder layers have 8 heads whatever the case, hence C = 32.
    """
    shape = {letter: min(size, TINY[letter]) for letter, size in case.shape.items()}
    return replace(case, shape=shape, graph=False)
