# SPDX-License-Identifier: Apache-2.0
"""Ours beside every baseline: forward, and forward+backward, interleaved in one run.

    pytest benchmarks/ --benchmark-only

No number without a right result: each provider's output is first held against float64.
pytest-benchmark is shown the interleaved seconds of our provider; the CSV holds all providers.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from registry import CASES, Case, Work
from results import ROWS
from timing import Timing, interleaved


class Replay:
    """Measured seconds as a clock, so that pytest-benchmark reports rounds run interleaved."""

    now = 0.0
    left: list[float] = []

    def __call__(self) -> None:
        Replay.now += Replay.left.pop(0)


def _providers(case: Case, work: Work, compiled: bool) -> dict[str, Callable[..., torch.Tensor]]:
    providers = dict(work.providers)
    if compiled:
        for name in case.compiled:
            providers[f"{name}, compiled"] = torch.compile(work.providers[name])
            if name in work.parameters:
                work.parameters[f"{name}, compiled"] = work.parameters[name]
    return providers


def _call(work: Work, name: str, provider: Callable[..., torch.Tensor], mode: str):
    if mode == "forward":

        def forward() -> torch.Tensor:
            with torch.no_grad():
                return provider(*work.leaves)

        return forward
    wanted = work.wanted(name)

    def both() -> tuple[torch.Tensor, ...]:
        out = provider(*work.leaves)
        return torch.autograd.grad(out, wanted, torch.ones_like(out))

    return both


@pytest.mark.benchmark(timer=lambda: Replay.now)
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_speed(case: Case, mode: str, benchmark, request: pytest.FixtureRequest) -> None:
    option = request.config.getoption
    device = option("--bench-device")
    torch.set_num_threads(option("--bench-threads"))
    torch.manual_seed(0)
    work = case.build(device, case.dtype, **case.shape)
    providers = _providers(case, work, not option("--bench-no-compile"))
    with torch.no_grad():
        oracle = work.oracle()
        errors = {
            name: float((provider(*work.leaves).double() - oracle).abs().max() / oracle.abs().max())
            for name, provider in providers.items()
        }
    loose = 100 * torch.finfo(case.dtype).eps
    assert max(errors.values()) < loose, errors
    calls = {
        name: _call(work, name, provider, mode)
        for name, provider in providers.items()
        if mode == "forward" or name not in work.forward_only
    }
    timings = interleaved(calls, device=device, budget_s=option("--bench-budget"))
    ours = timings["vtclip"].quantile(0.5)
    for name, timing in timings.items():
        ROWS.append(_row(case, mode, name, timing, errors[name], ours))
    Replay.left = list(timings["vtclip"].seconds)
    benchmark.extra_info.update(
        {f"{name}, x ours": t.quantile(0.5) / ours for name, t in timings.items()}
    )
    benchmark.pedantic(Replay(), rounds=len(Replay.left), iterations=1)


def _row(
    case: Case, mode: str, provider: str, timing: Timing, error: float, ours: float
) -> dict[str, object]:
    return {
        "case": case.name,
        "op": case.op,
        "dtype": str(case.dtype).removeprefix("torch."),
        "mode": mode,
        "provider": provider,
        "median_ms": 1e3 * timing.quantile(0.5),
        "p20_ms": 1e3 * timing.quantile(0.2),
        "p80_ms": 1e3 * timing.quantile(0.8),
        "times_ours": timing.quantile(0.5) / ours,
        "peak_mib": timing.peak_bytes / 2**20,
        "error": error,
        "rounds": len(timing.seconds),
    }
