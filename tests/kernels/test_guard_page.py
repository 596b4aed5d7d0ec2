# SPDX-License-Identifier: Apache-2.0
"""No kernel touches memory behind its tensors, and the test that says so notices a lost mask."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

pytestmark = pytest.mark.skipif(os.name != "posix", reason="guard pages need mprotect")

MASKS = {
    "load_rows": (
        "_math.py",
        "tl.load(ptr + offs, mask=in_row[:, None] & (offs_d < D)[None, :], other=0.0)",
        "tl.load(ptr + offs)",
    ),
    "store_rows": (
        "_math.py",
        "tl.store(ptr + offs, cast(tile, ptr.dtype.element_ty), mask=mask)",
        "tl.store(ptr + offs, cast(tile, ptr.dtype.element_ty))",
    ),
    "key_mask": ("_math.py", ", mask=keep, other=0) != 0", ") != 0"),
    "lse": (
        "cross_attn.py",
        "tl.store(lse_ptr + b * H * K + offs_k, lse, mask=in_k)",
        "tl.store(lse_ptr + b * H * K + offs_k, lse)",
    ),
}


def run(package, path):
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(path)}
    command = [sys.executable, str(HERE / "_guard.py"), package]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_kernels_stay_inside():
    result = run("vtclip.kernels", ROOT)
    assert result.returncode == 0, result.stderr[-4000:]


@pytest.mark.parametrize("name", MASKS)
def test_a_lost_mask_is_seen(name, mutant):
    file_name, mask, without = MASKS[name]
    file = mutant / file_name
    text = file.read_text()
    assert mask in text
    file.write_text(text.replace(mask, without))
    result = run("mutant", f"{mutant.parent}{os.pathsep}{ROOT}")
    assert result.returncode == -signal.SIGSEGV, (result.returncode, result.stderr[-2000:])
