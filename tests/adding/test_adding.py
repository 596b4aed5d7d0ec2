# SPDX-License-Identifier: Apache-2.0
"""docs/adding.md lists every file: toys that touch just these pass the tests of their kind.

A copy of the repository gets an operator, a method and a data set from `templates/` and `edits.py`.
What it cannot check here: the CUDA launcher, which only nvcc compiles, and `resources.csv`, which
only nvcc can write.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import cpp_extension

from vtclip.backends import native

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TEMPLATES = HERE / "templates"
PAGE = (ROOT / "docs" / "adding.md").read_text(encoding="utf-8")
_spec = importlib.util.spec_from_file_location("edits", HERE / "edits.py")
edits = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(edits)

WRITTEN_BY_NVCC = "csrc/cuda/resources.csv"
MOST = {"An operator": 21, "A method": 6, "A data set": 4}
TOYS = {
    "An operator": ("toy_dots", edits.OPERATOR),
    "A method": ("toy_scale", edits.METHOD),
    "A data set": ("toy_shapes", edits.DATA_SET),
}
USERS = (
    r"docs/|vtclip/heads/|vtclip/ops/_projections|tests/test_selftest|tests/mutation"
    r"|tests/helpers/floors|tests/ops/test_any_layout"
)
every_kind = pytest.mark.parametrize("kind", TOYS)


def git(*arguments: str) -> list[str]:
    """Lines that git writes about the working tree."""
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode not in (0, 1):  # 1: git grep has found nothing
        pytest.skip("not a git checkout")
    return done.stdout.splitlines()


def files_of(kind: str, name: str) -> tuple[list[str], list[str]]:
    """(files to touch, files to touch only where they apply) by the page, for a thing `name`."""
    section = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    (text,) = (part for part in section if part.startswith(f"{kind}\n"))
    needed, sometimes = text.split("### Only where it applies")

    def paths(table: str) -> list[str]:
        rows = re.findall(r"^\| (`[^|]+`) \|", table, flags=re.MULTILINE)
        named = [path for row in rows for path in re.findall(r"`([^`]+)`", row)]
        return [path.replace("X", name) for path in named]

    return paths(needed), paths(sometimes)


def new_files(name: str) -> dict[str, Path]:
    """Path in the repository -> template, of the thing `name`."""
    return {
        str(path.relative_to(TEMPLATES)).removesuffix(".in"): path
        for path in sorted(TEMPLATES.rglob("*.in"))
        if name in path.name
    }


@every_kind
def test_the_page_lists_what_the_toy_touches(kind):
    name, changes = TOYS[kind]
    needed, sometimes = files_of(kind, name)
    assert len(set(needed + sometimes)) == len(needed + sometimes)
    assert len(needed) <= MOST[kind]
    assert set(needed) - {WRITTEN_BY_NVCC} == {*new_files(name), *changes}
    assert not [path for path in new_files(name) if (ROOT / path).exists()]


@pytest.mark.parametrize(
    ("kind", "name", "where", "users"),
    [
        # users: callers of the operator, pages that show what was measured, and the test that
        # breaks a few operators
        ("An operator", "unit_products", (".",), USERS),
        ("A method", "proker", ("vtclip", "tests/heads", "*.md"), "docs/|vtclip/sklearn/"),
        ("A data set", "food101", ("vtclip", "tests/data", "tests/helpers"), "docs/"),
    ],
)
def test_the_page_lists_where_a_real_one_appears(kind, name, where, users):
    # tests/reliability names single tests as examples
    outside = ["tests/adding", "tests/reliability", "benchmarks/results", "docs/adding.md"]
    apart = [f":!{path}" for path in outside]
    seen = set(git("grep", "-lI", "--untracked", name, "--", *where, *apart))
    needed, sometimes = files_of(kind, name)
    strange = seen - {*needed, *sometimes}
    assert not {path for path in strange if not re.match(users, path)}
    assert set(needed) - seen <= {"CHANGELOG.md"}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository with the toys in it, and the compiled extension where it is built."""
    folder = tmp_path_factory.mktemp("adding") / "repository"
    built = [str(path.relative_to(ROOT)) for path in (ROOT / "vtclip").glob("_C.*.so")]
    for path in git("ls-files", "-co", "--exclude-standard") + built:
        source, target = ROOT / path, folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink() or source.is_file():
            shutil.copy(source, target, follow_symlinks=False)
    for name, changes in TOYS.values():
        for path, template in new_files(name).items():
            shutil.copy(template, folder / path)
        for path, places in changes.items():
            text = (folder / path).read_text(encoding="utf-8")
            for place, added in places:
                assert text.count(place) == 1, f"{path}: {place!r} must occur once"
                text = text.replace(place, added + place)
            (folder / path).write_text(text, encoding="utf-8")
    return folder


def run_tests(copy: Path, *arguments: str, **environment: str) -> tuple[int, str]:
    """(number of tests that passed, the report) of pytest in the copy; any failure is one here."""
    old = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [str(copy), *(path for path in old if path and Path(path).resolve() != ROOT)]
    plain = {"PYTHONPATH": os.pathsep.join(paths), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=copy,
        env=os.environ | plain | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return int(re.search(r"(\d+) passed", done.stdout)[1]), done.stdout


@pytest.fixture(scope="module")
def library(copy: Path) -> Path:
    """The CPU kernel of the toy, compiled alone; it joins the operators of the extension."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    if reason := native.load_cpu():
        pytest.skip(reason)
    target = copy / "libtoy.so"
    done = subprocess.run(
        [
            *(compiler, "-shared", "-fPIC", "-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror"),
            "-DTORCH_TARGET_VERSION=0x020b000000000000",
            f"-I{copy / 'csrc'}",
            *(f"-isystem{path}" for path in cpp_extension.include_paths()),
            str(copy / "csrc" / "cpu" / "toy_dots_cpu.cpp"),
            *("-o", str(target)),
            *(f"-L{path}" for path in cpp_extension.library_paths()),
            *("-ltorch", "-ltorch_cpu", "-lc10"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return target


TABLES = (
    *("tests/test_layout.py", "tests/test_testing.py", "tests/backends/test_schemas.py"),
    "tests/tune/test_tune.py",
)
OF_TABLES = "toy or every_schema or every_public_function or every_launcher or timed_for_one"
# loads the library before the tests
PLUGIN = """\
import os
import torch
from vtclip.backends import native
assert not native.load_cpu()
torch.ops.load_library(os.environ["TOY_LIBRARY"])
"""


@pytest.mark.slow
def test_the_toy_operator_without_its_cpu_kernel(copy):
    """Reference and Triton; asked for the rest, the selector says what is missing."""
    passed, report = run_tests(copy, "tests/ops/test_toy_dots.py", "-k=test_every_dtype or not cpu")
    assert passed >= 25
    if not native.load_cpu():
        assert "toy_dots has no CPU kernel in this build" in report


@pytest.mark.slow
def test_the_toy_operator_with_its_cpu_kernel(copy, library):
    (copy / "toy_cpu.py").write_text(PLUGIN)
    plugin = ("-p", "toy_cpu", "tests/ops/test_toy_dots.py", *TABLES, "-k", OF_TABLES)
    passed, report = run_tests(copy, *plugin, TOY_LIBRARY=str(library))
    assert passed >= 60
    assert "has no CPU kernel" not in report


@pytest.mark.slow
def test_the_toy_blocks_of_the_gpu_on_the_host(copy):
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    passed, _ = run_tests(copy, "tests/cuda_host/test_toy_dots.py")
    assert passed == 28


@pytest.mark.slow
def test_the_toy_method_and_data_set(copy):
    passed, _ = run_tests(copy, "tests/heads/test_common.py", "tests/data/test_sets.py", "-k=toy")
    assert passed >= 20
    named = ("tests/test_names.py", "tests/data/test_sets.py::test_the_table")
    passed, _ = run_tests(copy, *named)
    assert passed >= 15
