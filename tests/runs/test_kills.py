# SPDX-License-Identifier: Apache-2.0
"""Kills of whole commands: what they leave is the run before or the new one, and nothing blocks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import python

SCRIPT = Path(__file__).with_name("kill_commands.py")


@pytest.mark.parametrize("command", ["fit", "train", "extend", "export", "bench", "features"])
def test_25_kills_and_as_many_points_leave_the_old_or_the_new(command):
    done = python(SCRIPT, command, 25, "--points", 25, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    counts = json.loads(done.stdout)
    assert counts["faults"] == {}
    assert counts["kills"] >= 30
    assert len(counts["found"]) >= 2  # kills before and after the step that decides
