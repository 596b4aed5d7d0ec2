# SPDX-License-Identifier: Apache-2.0
"""Kernel tests run on a GPU where there is one, else in Triton's interpreter on CPU tensors."""

import contextlib
import os
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported

try:
    import triton  # noqa: F401
except ImportError as error:  # Triton itself, or numpy, which it does not declare
    WHY_NOT = str(error)
else:
    WHY_NOT = ""


class _Without(pytest.Module):
    def collect(self):
        pytest.skip(f"triton cannot be imported: {WHY_NOT}", allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    """Without Triton every file here is skipped before it is imported."""
    return _Without.from_parent(parent, path=module_path) if WHY_NOT else None


@pytest.fixture
def device():
    if os.environ.get("TRITON_INTERPRET") == "1":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        pytest.skip("no GPU, and the interpreter is switched off by TRITON_INTERPRET")
    return torch.device("cuda")


@pytest.fixture(autouse=True)
def _poisoned_outputs():
    """Fresh memory is NaN, so an element that a kernel forgets fails the comparison."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    assert torch.zeros(1).new_empty((3,)).isnan().all()
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)


@contextlib.contextmanager
def noted_launches():
    """List of kernel names, filled as they are launched."""
    names = []

    def noting(plain, name_of):
        def call(self, *args, **kwargs):
            names.append(name_of(self))
            return plain(self, *args, **kwargs)

        return call

    if os.environ.get("TRITON_INTERPRET") == "1":
        from triton.runtime.interpreter import GridExecutor

        call = noting(GridExecutor.__call__, lambda executor: executor.fn.__name__)
        patch = mock.patch.object(GridExecutor, "__call__", call)
    else:
        from triton.runtime.jit import JITFunction

        run = noting(JITFunction.run, lambda function: function.__name__)
        patch = mock.patch.object(JITFunction, "run", run)
    with patch:
        yield names


@pytest.fixture
def launches():
    """`with launches() as names:` collects the names of the kernels that are launched."""
    return noted_launches


@pytest.fixture
def mutant(tmp_path):
    """A copy of the kernels as the package `mutant`, for a test to break; its files use its own."""
    folder = tmp_path / "mutant"
    shutil.copytree(Path(__file__).parents[2] / "kernels", folder)
    for file in folder.glob("*.py"):
        file.write_text(file.read_text().replace("vtclip.kernels", "mutant"))
    return folder
