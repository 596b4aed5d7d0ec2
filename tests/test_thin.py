# SPDX-License-Identifier: Apache-2.0
"""`pytest --thin N`, which other versions are tested with: fewer parameter sets, every function."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = ("tests/ops/test_cosine_logits.py",)


def collected(*options: str) -> tuple[int, list[str], str]:
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", *options, *FILES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    names = [line for line in done.stdout.splitlines() if line.startswith("tests/")]
    return done.returncode, names, done.stdout.splitlines()[-1] + done.stderr


def test_every_function_is_left_with_fewer_parameter_sets():
    _, every, _ = collected()
    code, some, last = collected("--thin", "5")
    assert code == 0
    assert {name.partition("[")[0] for name in some} == {name.partition("[")[0] for name in every}
    assert set(some) < set(every)
    assert len(every) / 6 < len(some) < len(every) / 3
    assert f"{len(every) - len(some)} deselected" in last
    for dtype in "float32", "float16", "bfloat16":
        assert any(dtype in name for name in some)


def test_a_step_below_one_is_refused():
    code, _, message = collected("--thin", "0")
    assert code == 4
    assert "--thin must be at least 1, got 0" in message
