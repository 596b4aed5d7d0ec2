# SPDX-License-Identifier: Apache-2.0
"""Every public function on the C++ kernels: offsets beyond 32 bits, after a fork, whole masks."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from vtclip import ops
from vtclip.backends import native
from vtclip.testing.problems import FUNCTIONS, Function

SIZES = {"B": 2, "K": 3, "L": 5, "H": 2, "d": 9, "D": 9, "C": 9, "F": 4}
FAR = 2**31  # elements, so that neither they nor their bytes fit into 32 bits

pytestmark = [
    pytest.mark.skipif(bool(native.load_cpu()), reason=native.load_cpu() or "loaded"),
    pytest.mark.skipif(
        sys.platform != "linux", reason="memory without pages, and fork, as on Linux"
    ),
]
each_function = pytest.mark.parametrize("call", FUNCTIONS.values(), ids=FUNCTIONS)


def results(call: Function, leaves: list[Tensor]) -> list[Tensor]:
    """The outputs and the gradients for output gradients that differ from row to row."""
    outputs = call.outputs(*leaves, impl="cpu")
    seeds = [torch.arange(out.numel()).cos().view(out.shape).to(out.dtype) for out in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, seeds)]


@pytest.fixture(scope="module")
def holder() -> Iterator[Tensor]:
    """More than 2^31 float32 elements, of which pages exist only where something was written."""
    no_reserve = 0x4000
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
    memory = mmap.mmap(-1, 4 * (FAR + 2**20), flags=flags)
    return torch.frombuffer(memory, dtype=torch.float32)


def axes_of(shape: torch.Size) -> set[int]:
    """The first and the last axis with more than one element."""
    long = [axis for axis, size in enumerate(shape) if size > 1]
    return {long[0], long[-1]}


@each_function
def test_offsets_beyond_32_bits(call, holder):
    """Each argument in turn, its first and its last axis as far apart."""
    drawn = [tensor.detach() for tensor in call.draw(SIZES)]
    expected = results(call, [tensor.clone().requires_grad_() for tensor in drawn])
    for i, tensor in enumerate(drawn):
        for axis in axes_of(tensor.shape):
            order = [a for a in range(tensor.dim()) if a != axis]
            strides, step = [0] * tensor.dim(), 1
            for a in reversed(order):
                strides[a] = step
                step *= tensor.shape[a]
            strides[axis] = -(-FAR // (tensor.shape[axis] - 1)) + step
            far = holder.as_strided(tensor.shape, strides).copy_(tensor)
            given = [far if j == i else other for j, other in enumerate(drawn)]
            found = results(call, [t.detach().requires_grad_() for t in given])
            same = [torch.equal(a, b) for a, b in zip(found, expected, strict=True)]
            assert all(same), (i, axis, same)


FORK = """
import os, sys
import torch
from vtclip.testing.problems import FUNCTIONS
sizes = {"B": 9, "K": 40, "L": 33, "H": 2, "d": 16, "D": 64, "C": 64, "F": 32}
torch.set_num_threads(2)
drawn = {name: call.draw(sizes) for name, call in FUNCTIONS.items()}

def everything():
    found = []
    for name, call in FUNCTIONS.items():
        outputs = call.outputs(*drawn[name], impl="cpu")
        seeds = [torch.ones_like(out) for out in outputs]
        found += [*outputs, *torch.autograd.grad(outputs, drawn[name], seeds)]
    return found

with torch.no_grad():
    torch.randn(2000, 200).sum(1)  # torch's threads are there
before = everything()
process = os.fork()
if process == 0:
    threads = int(sys.argv[1])
    if threads:
        torch.set_num_threads(threads)
    same = [torch.equal(a, b) for a, b in zip(everything(), before, strict=True)]
    os._exit(0 if all(same) else 3)
_, status = os.waitpid(process, 0)
after = [torch.equal(a, b) for a, b in zip(everything(), before, strict=True)]
sys.exit(os.waitstatus_to_exitcode(status) or (0 if all(after) else 4))
"""


@pytest.mark.parametrize("threads", [1])
def test_a_forked_process_has_the_same_bits(threads, root):
    """As a worker of a DataLoader, which takes one thread: those of its parent are not there."""
    paths = [str(root), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-W", "ignore", "-c", FORK, str(threads)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


MASKED = [name for name, call in FUNCTIONS.items() if "key_mask" in call.op.arguments]


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("name", MASKED)
def test_an_image_hidden_whole_is_zero_and_changes_no_other(name, dtype):
    call = FUNCTIONS[name]
    leaves = call.draw(SIZES, dtype=getattr(torch, dtype))
    query, *tokens = leaves
    with torch.no_grad():
        for tensor in tokens:
            tensor[0] = torch.nan  # whatever is hidden
    mask = torch.tensor([[False] * SIZES["L"], [True] * SIZES["L"]])
    outputs = call.outputs(*leaves, key_mask=mask, impl="cpu")
    grads = torch.autograd.grad(outputs, leaves, [torch.ones_like(out) for out in outputs])
    assert (outputs[0][0] == 0).all()
    assert all((lse[0] == -torch.inf).all() for lse in outputs[1:])
    assert all((grad[0] == 0).all() for grad in grads[1:])
    alone = [query.detach().requires_grad_(), *(t[1:].detach().requires_grad_() for t in tokens)]
    plain = getattr(ops, name)(*alone, impl="cpu")
    plain = plain if isinstance(plain, tuple) else (plain,)
    expected = torch.autograd.grad(plain, alone, [torch.ones_like(out) for out in plain])
    rows = [out[1:] for out in outputs] + [grad[1:] for grad in grads[1:]]
    wanted = [*plain, *expected[1:]]
    assert all(torch.equal(a, b) for a, b in zip(rows, wanted, strict=True))
    torch.testing.assert_close(grads[0], expected[0])
