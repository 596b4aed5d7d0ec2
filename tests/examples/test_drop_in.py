# SPDX-License-Identifier: Apache-2.0
"""docs/examples/drop_in_cross_attn.py runs as it says, alone and under torchrun."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "drop_in_cross_attn.py"


def output(*command: str) -> str:
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command, str(EXAMPLE)], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def differences(text: str) -> dict[str, float]:
    """What was compared, in units of what is allowed."""
    found = re.findall(r"^(.+): differs by (\S+), (\S+) is allowed$", text, re.MULTILINE)
    return {what: float(by) / float(limit) for what, by, limit in found}


def test_it_is_short():
    assert len(EXAMPLE.read_text(encoding="utf-8").splitlines()) < 80


def test_alone_it_compares_and_times():
    text = output()
    compared = differences(text)
    assert list(compared) == [
        "eager, outputs and gradients",
        "compiled, outputs and gradients",
        "nn.SharedQueryAttention",
        "bfloat16 autocast, output",
    ]
    assert max(compared.values()) < 1
    timed = re.findall(r"^(\w+): (\S+) ms of one thread, forward", text, re.MULTILINE)
    assert [name for name, _ in timed] == ["sdpa", "cross_attn"]
    assert all(float(milliseconds) > 0 for _, milliseconds in timed)


def test_under_torchrun_two_processes_have_the_gradients_of_one():
    text = output("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    compared = differences(text)
    assert sorted(compared) == [f"DDP, gradients of process {rank}" for rank in (0, 1)]
    assert max(compared.values()) < 1
