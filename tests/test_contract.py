# SPDX-License-Identifier: Apache-2.0
"""What importing costs, seen from fresh interpreters."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

BLOCK = """
import importlib.machinery as machinery
found = machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    hidden = name in {blocked!r} or name.split(".")[0] in {blocked!r}
    return None if hidden else found(name, path, target)
machinery.PathFinder.find_spec = staticmethod(find_spec)
"""


def fresh(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**clean, **env}
    )


def test_the_blocker_blocks():
    done = fresh(BLOCK.format(blocked={"triton"}) + "import triton")
    assert done.returncode != 0
    assert "No module named 'triton'" in done.stderr


@pytest.mark.parametrize("blocked", ["triton", "vtclip._C", "open_clip", "torchvision", "tqdm"])
def test_ops_and_info_work_without(blocked):
    code = BLOCK.format(blocked={blocked}) + (
        "import torch, vtclip\n"
        "from vtclip import ops\n"
        "q = torch.randn(1, 2, 3, 4, requires_grad=True)\n"
        "ops.cross_attn(q, torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4)).sum().backward()\n"
        "assert q.grad.isfinite().all()\n"
        "from vtclip import info\n"
        "assert info.main() == 0\n"
    )
    done = fresh(code)
    assert done.returncode == 0, done.stderr
    assert "cross_attn" in done.stdout
    if blocked == "vtclip._C":
        assert "vtclip._C" in done.stdout


def test_import_loads_neither_kernels_nor_models_nor_cuda():
    code = (
        "import json, sys, torch\n"
        "import vtclip, vtclip.ops\n"
        "print(json.dumps([sorted(sys.modules), torch.cuda.is_initialized()]))\n"
    )
    done = fresh(code)
    modules, initialised = json.loads(done.stdout)
    plain = json.loads(
        fresh("import json, sys, torch; print(json.dumps(sorted(sys.modules)))").stdout
    )
    added = set(modules) - set(plain)
    assert not initialised
    unwanted = {"triton", "open_clip", "torchvision", "timm", "tqdm", "PIL", "vtclip._C"}
    assert not {name for name in added if name.split(".")[0] in unwanted or name == "vtclip._C"}


def test_info_costs_at_most_a_second_more_than_torch():
    # The processor's seconds behind the import of torch, in one process: those of torch itself vary
    # by more than a second beside other work. The least of three.
    code = (
        "import time, torch\nstart = time.process_time()\n"
        "import vtclip.info as i\ni.main()\nprint(time.process_time() - start)\n"
    )
    runs = [fresh(code) for _ in range(3)]
    assert [done.returncode for done in runs] == [0, 0, 0]
    assert min(float(done.stdout.splitlines()[-1]) for done in runs) < 1.0


def test_python_dash_o_keeps_every_check():
    code = (
        "import torch\nfrom vtclip import ops\n"
        "try:\n    ops.cosine_logits(torch.ones(2, 3), torch.ones(4, 5))\n"
        "except ValueError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True)
    assert "text must be [K, D] = [4, 3], got [4, 5]" in done.stdout


def test_the_clip_module_loads_no_model_library():
    code = (
        "import sys, vtclip.clip, vtclip.data; "
        "heavy = {'open_clip', 'torchvision', 'timm', 'PIL', 'huggingface_hub', 'triton'}; "
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = fresh(code)
    assert done.returncode == 0, done.stderr


def test_the_command_line_loads_no_torch_before_it_knows_the_command():
    done = fresh("import sys, vtclip.cli; sys.exit('torch' in sys.modules)")
    assert done.returncode == 0, done.stderr


def test_the_specification_needs_torch_only_and_registers_nothing():
    for name in ("cosine_logits", "rational_head"):
        done = fresh(
            f"import json, sys, vtclip.reference.{name}, torch; "
            "ours = [name for name in sys.modules if name.startswith('vtclip.')]; "
            f"registered = hasattr(torch.ops.vtclip, '{name}_fwd'); "
            "print(json.dumps([ours, registered]))"
        )
        modules, registered = json.loads(done.stdout)
        assert not registered
        assert {name.split(".")[1] for name in modules} == {"reference", "names"}
