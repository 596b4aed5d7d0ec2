# SPDX-License-Identifier: Apache-2.0
"""`vtclip tune` on a machine that has torch and Triton and nothing else."""

from __future__ import annotations

from commands import environment, python

CODE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("tqdm", "PIL", "numpy", "open_clip", "safetensors"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
from vtclip.cli import main
sys.exit(main(["tune", "--device", "cuda"]))
"""


def test_tune_gets_as_far_as_the_device():
    done = python("-W", "ignore", "-c", CODE, env=environment(CUDA_VISIBLE_DEVICES=""))
    assert done.returncode == 2
    assert done.stderr == "vtclip tune: needs a CUDA device to time on, torch finds none\n"
