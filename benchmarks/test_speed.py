# SPDX-License-Identifier: Apache-2.0
"""Ours beside every baseline: forward, and forward+backward, interleaved in one run.

    pytest benchmarks/ --benchmark-only

No number without a right result: each provider's output is first held against float64. On CUDA the
cases of `targets.py` come first; a baseline that a device refuses is a row with the reason.
pytest-benchmark is shown the interleaved seconds of our provider; the CSV holds all providers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from registry import Case, Work
from results import ROWS
from timing import Captured, Timing, interleaved, peak_bytes

# a warning is an error here: torch warns of each fused attention that refuses a call
REFUSALS = (RuntimeError, NotImplementedError, UserWarning)


class Replay:
    """Measured seconds as a clock, so that pytest-benchmark reports rounds run interleaved."""

    now = 0.0
    left: list[float] = []

    def __call__(self) -> None:
        Replay.now += Replay.left.pop(0)


def providers_of(case: Case, work: Work, compiled: bool) -> dict[str, Callable[..., torch.Tensor]]:
    providers = dict(work.providers)
    if compiled:
        for name in case.compiled:
            providers[f"{name}, compiled"] = torch.compile(work.providers[name])
            if name in work.parameters:
                work.parameters[f"{name}, compiled"] = work.parameters[name]
    return {
        name: provider
        for name, provider in providers.items()
        if compiled or not name.endswith(", compiled")
    }


def call_of(work: Work, name: str, provider: Callable[..., torch.Tensor], mode: str):
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


def reason_of(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:160]


def is_ours(name: str) -> bool:
    """Whether a failure is a failure of the test; a baseline may not run on a device."""
    return name == "vtclip" or not torch.cuda.is_available()


def _error(out: torch.Tensor, oracle: torch.Tensor) -> float:
    return float((out.detach().double() - oracle).abs().max() / oracle.abs().max())


def _on_device(
    calls: dict[str, Callable[[], object]], work: Work, graph: bool
) -> tuple[dict[str, Callable[[], object]], dict[str, dict[str, object]], dict[str, str]]:
    # calls to time, captured where the case says so; columns of CUDA rows; why a baseline has none
    timed, columns, refused = {}, {}, {}
    for name, call in calls.items():
        try:
            ready = Captured(call) if graph else call
            ready()
        except REFUSALS as error:
            if is_ours(name):
                raise
            refused[name] = reason_of(error)
            continue
        timed[name] = ready
        columns[name] = {"graph": "yes" if graph else "no", "backward_mib": ""}
    return timed, columns, refused


def _backward_mib(work: Work, name: str, provider: Callable[..., torch.Tensor]) -> float:
    out = provider(*work.leaves)
    wanted, seed = work.wanted(name), torch.ones_like(out)
    call = functools.partial(torch.autograd.grad, out, wanted, seed, retain_graph=True)
    return peak_bytes(call, "cuda") / 2**20


@pytest.mark.benchmark(timer=lambda: Replay.now)
@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def test_speed(case: Case, mode: str, benchmark, request: pytest.FixtureRequest) -> None:
    option = request.config.getoption
    device = option("--bench-device")
    torch.set_num_threads(option("--bench-threads"))
    torch.manual_seed(0)
    work = case.build(device, case.dtype, **case.shape)
    providers = providers_of(case, work, not option("--bench-no-compile"))
    errors: dict[str, float] = {}
    refused: dict[str, str] = {}
    with torch.no_grad():
        oracle = work.oracle()
        for name, provider in providers.items():
            try:
                errors[name] = _error(provider(*work.leaves), oracle)
            except REFUSALS as error:
                if is_ours(name) and not name.startswith("sdpa "):
                    raise
                refused[name] = reason_of(error)
    loose = 100 * torch.finfo(case.dtype).eps
    assert max(errors.values()) < loose, errors
    calls = {
        name: call_of(work, name, providers[name], mode)
        for name in errors
        if mode == "forward" or name not in work.forward_only
    }
    columns: dict[str, dict[str, object]] = {}
    if device == "cuda":
        calls, columns, uncaptured = _on_device(calls, work, case.graph)
        refused |= uncaptured
        for name, call in calls.items():
            if isinstance(call, Captured) and mode == "forward":
                errors[name] = _error(call(), oracle)
                assert errors[name] < loose, f"{name}, replayed: {errors[name]:.1e}"
            if work.backward_memory and mode != "forward":
                columns[name]["backward_mib"] = _backward_mib(work, name, providers[name])
    timings = interleaved(calls, device=device, budget_s=option("--bench-budget"))
    ours = timings["vtclip"].quantile(0.5)
    for name, timing in timings.items():
        ROWS.append(_row(case, mode, name, timing, errors[name], ours) | columns.get(name, {}))
    for name, reason in refused.items():
        empty = {"case": case.name, "op": case.op, "mode": mode, "provider": name, "note": reason}
        ROWS.append(empty)
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
