# SPDX-License-Identifier: Apache-2.0
"""The rules of CONTRIBUTING.md that a machine can check."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
from pathlib import Path

import pytest

from vtclip import ops

ROOT = Path(__file__).parents[1]
OPS = sorted(path.stem for path in (ROOT / "vtclip" / "ops").glob("[a-z]*.py"))
WALL, AIM = 600, 300


def tracked(*patterns: str) -> list[Path]:
    done = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *patterns],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in done.stdout.splitlines() if (ROOT / line).is_file()]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "place",
    [
        "vtclip/ops/{}.py",
        "vtclip/reference/{}.py",
        "kernels/{}.py",
        "csrc/cpu/{}_cpu.cpp",
        "csrc/cuda/{}_cuda.cu",
        "tests/ops/test_{}.py",
    ],
)
def test_an_op_has_one_name_everywhere(op, place):
    assert (ROOT / place.format(op)).is_file()


def test_no_file_passes_the_wall():
    sources = tracked("*.py", "*.cpp", "*.h", "*.cu", "*.cuh")
    assert sources
    long = {
        str(p.relative_to(ROOT)): n
        for p in sources
        if (n := len(p.read_text().splitlines())) > WALL
    }
    assert not long


def test_setup_py_and_engine_stay_small():
    assert len((ROOT / "setup.py").read_text().splitlines()) < 120
    assert len((ROOT / "vtclip" / "engine.py").read_text().splitlines()) <= 200


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


# folder -> what it must not import
FORBIDDEN = {
    "vtclip/reference": ("vtclip.ops", "vtclip.backends", "vtclip.kernels", "triton"),
    "kernels": ("vtclip.ops", "vtclip.backends", "vtclip.reference", "vtclip.heads"),
    "vtclip/backends": ("vtclip.ops", "vtclip.heads"),
    "vtclip/ops": ("vtclip.heads", "vtclip.data", "vtclip.train.engine", "triton", "open_clip"),
    "vtclip/heads": ("vtclip.data", "vtclip.train.engine", "vtclip.clip", "triton", "open_clip"),
    "vtclip/data": ("vtclip.heads", "vtclip.train.engine", "open_clip"),
}


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_arrows_point_one_way(folder):
    files = [p for p in (ROOT / folder).rglob("*.py") if not p.name.startswith("test_")]
    assert files
    for path in files:
        source = path.read_text()
        for name in imports(path):
            assert not name.startswith(FORBIDDEN[folder]), f"{path.name} imports {name}"
        assert source.startswith("# SPDX-License-Identifier: Apache-2.0"), path


def test_only_the_clip_package_imports_open_clip():
    users = [
        p for p in tracked("vtclip/*.py") if any(n.startswith("open_clip") for n in imports(p))
    ]
    assert {p.parent.relative_to(ROOT) for p in users} == {Path("vtclip/clip")}


@pytest.mark.parametrize("name", [n for n in ops.__all__ if n.islower()])
def test_signatures_have_positional_tensors_and_keyword_options(name):
    parameters = inspect.signature(getattr(ops, name)).parameters.values()
    for parameter in parameters:
        assert parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if parameter.annotation == "Tensor | None":  # an operand, or an option as key_mask
            continue
        is_tensor = parameter.annotation == "Tensor"
        assert (parameter.kind == parameter.POSITIONAL_OR_KEYWORD) == is_tensor
    assert list(parameters)[-1].name == "impl"


def test_cpp_checks_carry_messages():
    for path in tracked("csrc/*.cpp", "csrc/*.h", "csrc/*.cu", "csrc/*.cuh"):
        for call in re.findall(r"TORCH_CHECK\(([^;]*)\);", path.read_text()):
            assert "," in call, f"{path.name}: a check without a message: {call}"
        assert path.read_text().startswith("// SPDX-License-Identifier: Apache-2.0"), path


def test_no_banners_or_reruns_or_loose_xfail():
    for path in tracked("*.py", "*.cpp", "*.h", "*.cu"):
        if path == Path(__file__):
            continue
        text = path.read_text()
        assert not re.search(r"^\s*(#|//)\s*[-=*#]{5,}", text, re.MULTILINE), f"{path}: banner"
        assert "flaky" not in text, path
        assert "strict=False)" not in text or "xfail" not in text, path
