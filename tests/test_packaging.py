# SPDX-License-Identifier: Apache-2.0
"""The build: its modes, its refusals, and what a wheel holds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from checkouts import ROOT, copy_of_the_tree

from vtclip.backends import native

# the argument came with Python 3.12 and with later 3.10 and 3.11
SAFE = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}


def python(cwd: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, **env}
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, capture_output=True, text=True, env=given
    )


def setup(tree: Path, *command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return python(tree, "setup.py", *command, **env)


def modules_of_kernels() -> list[str]:
    return sorted(path.stem for path in (ROOT / "kernels").glob("*.py"))


IMPORT_KERNELS = (
    "import importlib, inspect, vtclip, vtclip.kernels\n"
    f"for name in {modules_of_kernels()}:\n"
    "    module = importlib.import_module(f'vtclip.kernels.{name}')\n"
    "    assert inspect.getsource(module)\n"
    "print(module.__file__)\n"
)


def test_no_file_of_the_repository_is_a_link():
    """Git for Windows checks links out as text files that hold the path."""
    done = subprocess.run(["git", "ls-files", "-s"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    assert not [line for line in done.stdout.splitlines() if line.startswith("120000")]
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
    held = {name for name in names if name.startswith("vtclip/kernels/")}
    assert held == {f"vtclip/kernels/{name}.py" for name in modules_of_kernels()}
    # installed somewhere else, with the checkout out of reach, it works
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = "import vtclip, vtclip.info; print(vtclip.__file__); vtclip.info.main()"
    done = python(tmp_path, "-c", code, PYTHONPATH=str(site))
    assert done.returncode == 0, done.stderr
    assert str(site) in done.stdout
    assert "is not built" in done.stdout


def test_every_kernel_is_found_wherever_vtclip_lies(tmp_path):
    """In a checkout, in a wheel of a clone without links, and in a wheel of its sdist."""
    pytest.importorskip("triton", reason="the kernels import it")
    done = python(tmp_path, "-c", IMPORT_KERNELS, PYTHONPATH=str(ROOT))
    assert done.stdout.strip() == str(ROOT / "kernels" / f"{modules_of_kernels()[-1]}.py")
    tree = copy_of_the_tree(tmp_path)
    done = setup(tree, "sdist", "-d", str(tmp_path), VTCLIP_EXT="off")
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "sdist", **SAFE)
    (unpacked,) = (tmp_path / "sdist").iterdir()
    for number, source in enumerate((tree, unpacked)):
        site = tmp_path / f"site{number}"
        done = setup(source, "bdist_wheel", "-d", str(site), VTCLIP_EXT="off")
        assert done.returncode == 0, done.stderr
        (wheel,) = site.glob("*.whl")
        zipfile.ZipFile(wheel).extractall(site)
        # an unrelated package of the name in the same folder is left alone
        (site / "kernels").mkdir()
        (site / "kernels" / "__init__.py").write_text("")
        done = python(tmp_path, "-c", IMPORT_KERNELS, PYTHONPATH=str(site))
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(str(site / "vtclip" / "kernels"))


def test_an_editable_install_finds_the_kernels(tmp_path):
    pytest.importorskip("triton", reason="the kernels import it")
    tree, site = copy_of_the_tree(tmp_path), tmp_path / "site"
    done = python(
        tmp_path, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "--no-index",
        "--disable-pip-version-check", "--target", str(site), "-e", str(tree), VTCLIP_EXT="off",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # without the pointers of the environment, which may lead to another checkout
    others = [path for path in sys.path if path and not Path(path, "vtclip").exists()]
    code = f"import site; site.addsitedir({str(site)!r})\n{IMPORT_KERNELS}"
    done = python(tmp_path, "-S", "-c", code, PYTHONPATH=os.pathsep.join([str(site), *others]))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tree / "kernels"))


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


# compiles the kernels as empty files
WITHOUT_KERNELS = """\
#!/bin/sh
for word in "$@"; do
  [ "$last" = -o ] && out=$word
  case "$word" in */csrc/cpu/*.cpp) kernel=$word ;; esac
  last=$word
done
[ -n "$kernel" ] && exec {compiler} -x c++ -fPIC -c /dev/null -o "$out"
exec {compiler} "$@"
"""


@pytest.mark.slow
def test_cpu_mode_builds_no_cuda_and_says_so(tmp_path):
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("no C++ compiler")
    tree, wrapper = copy_of_the_tree(tmp_path), tmp_path / "c++"
    wrapper.write_text(WITHOUT_KERNELS.format(compiler=compiler))
    wrapper.chmod(0o755)
    done = setup(tree, "build_ext", "--inplace", VTCLIP_EXT="cpu", CXX=str(wrapper))
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
