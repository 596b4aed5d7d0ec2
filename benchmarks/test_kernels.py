# SPDX-License-Identifier: Apache-2.0
"""Kernels of a call, counted by torch's profiler: collected with --bench-count alone.

In a process of its own, because a profiler that was on once makes every later launch slower.
"""

from __future__ import annotations

import pytest
import torch
from registry import Case
from results import ROWS
from test_speed import REFUSALS, call_of, is_ours, providers_of, reason_of
from timing import kernel_count


@pytest.mark.parametrize("mode", ["forward", "forward+backward"])
def test_kernels(case: Case, mode: str, request: pytest.FixtureRequest) -> None:
    device = request.config.getoption("--bench-device")
    if device != "cuda":
        pytest.skip("kernels are counted on a CUDA device")
    torch.manual_seed(0)
    work = case.build(device, case.dtype, **case.shape)
    for name, provider in providers_of(case, work, compiled=False).items():
        if mode != "forward" and name in work.forward_only:
            continue
        row = {"case": case.name, "op": case.op, "mode": mode, "provider": name}
        try:
            ROWS.append({**row, "kernels": kernel_count(call_of(work, name, provider, mode))})
        except REFUSALS as error:
            if is_ours(name):
                raise
            ROWS.append({**row, "note": reason_of(error)})
