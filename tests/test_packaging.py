# SPDX-License-Identifier: Apache-2.0
"""The build: its modes, its refusals, and what a wheel holds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from vtclip.backends import native

ROOT = Path(__file__).parents[1]


def copy_of_the_tree(where: Path) -> Path:
    """The sources, without what a build leaves behind."""
    tree = where / "tree"
    shutil.copytree(
        ROOT,
        tree,
        symlinks=True,
        ignore=shutil.ignore_patterns(".git", "build", "*.so", "*.egg-info", "__pycache__", "runs"),
    )
    return tree


def python(cwd: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, **env}
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, capture_output=True, text=True, env=given
    )


def setup(tree: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return python(tree, "setup.py", *command, **env)


def test_kernels_link_is_relative_and_not_a_package():
    assert os.readlink(ROOT / "vtclip" / "kernels") == "../kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_a_root_level_import_of_kernels_is_not_ours():
    code = "import importlib.util as u; s = u.find_spec('kernels'); print(s and s.origin)"
    done = python(ROOT, "-c", code)
    assert str(ROOT) not in done.stdout


def test_pure_python_wheel_holds_kernels_assets_and_no_binary(tmp_path):
    tree = copy_of_the_tree(tmp_path)
    done = setup(tree, "bdist_wheel", "-d", str(tmp_path), VTCLIP_EXT="off")
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("py3-none-any.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for wanted in (
        "vtclip/kernels/cross_attn.py",
        "vtclip/ops/cross_attn.py",
        "vtclip/py.typed",
        "vtclip/demo/assets/open_clip_model.safetensors",
    ):
        assert wanted in names
    assert not [name for name in names if name.startswith("kernels/") or name.endswith(".so")]
    # installed somewhere else, with the checkout out of reach, it works
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = "import vtclip, vtclip.info; print(vtclip.__file__); vtclip.info.main()"
    done = python(tmp_path, "-c", code, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    assert str(site) in done.stdout
    assert "is not built" in done.stdout


def test_unknown_mode_is_refused(tmp_path):
    done = setup(copy_of_the_tree(tmp_path), "--version", VTCLIP_EXT="gpu")
    assert done.returncode != 0
    assert "VTCLIP_EXT must be one of auto, cpu, cuda, off, got 'gpu'" in done.stderr


def test_a_mode_that_cannot_be_met_is_an_error_and_auto_says_why(tmp_path):
    tree = copy_of_the_tree(tmp_path)
    done = setup(tree, "--version", VTCLIP_EXT="cpu", CXX="no-such-compiler")
    assert done.returncode != 0
    assert "VTCLIP_EXT=cpu cannot be met: C++ compiler" in done.stderr
    done = setup(tree, "--version", VTCLIP_EXT="auto", CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert "no extension: C++ compiler 'no-such-compiler' was not found" in done.stderr
    done = setup(tree, "--version", VTCLIP_EXT="cuda", CUDA_HOME=str(tmp_path / "nowhere"))
    assert done.returncode != 0
    assert "VTCLIP_EXT=cuda cannot be met" in done.stderr


@pytest.mark.slow
def test_cpu_mode_builds_no_cuda_and_says_so(tmp_path):
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        pytest.skip("no C++ compiler")
    tree = copy_of_the_tree(tmp_path)
    done = setup(tree, "build_ext", "--inplace", VTCLIP_EXT="cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((tree / "vtclip").glob("_C.*.so"))
    assert not list((tree / "vtclip").glob("_C_cuda*.so"))
    code = "from vtclip.backends import native; print(native.load_cpu(), native.build_info())"
    done = python(tree, "-c", code, PYTHONPATH=str(tree))
    assert "not built: VTCLIP_EXT=cpu" in done.stdout, done.stderr


def test_this_build_loads_and_remembers_its_decision():
    if native.load_cpu():
        pytest.skip(native.load_cpu())
    info = native.build_info()
    assert info["mode"] in ("auto", "cpu", "cuda")
    if native.cuda_library() is not None and torch.version.cuda is not None:
        assert native.load_cuda() == ""
        assert "nvcc" in info["cuda"]
