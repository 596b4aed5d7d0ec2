# SPDX-License-Identifier: Apache-2.0
"""The rules of CONTRIBUTING.md that a machine can check."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import subprocess
from pathlib import Path

import pytest

from vtclip import ops

ROOT = Path(__file__).parents[1]
_spec = importlib.util.spec_from_file_location("import_graph", ROOT / "tests" / "import_graph.py")
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
ImportGraph, cycles, imported_names = _module.ImportGraph, _module.cycles, _module.imported_names
OUTSIDE = _module.OUTSIDE
OPS = sorted(path.stem for path in (ROOT / "vtclip" / "ops").glob("[a-z]*.py"))
WALL, LONGEST_FUNCTION = 600, 80


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
    assert len((ROOT / "vtclip" / "train" / "engine.py").read_text().splitlines()) <= 200


# room below vtclip/ -> the rooms it imports: the whole tree, from the floors at the bottom upwards
BASE = {"names", "files", "schemas", "machine", "distributed"}  # import none of the rooms below
ARROWS = {
    **{room: set() for room in BASE - {"distributed", "files"}},
    "environment": set(),
    "extensions": set(),
    "distributed": {"environment"},
    "writing": set(),
    "files": {"writing"},  # which hands it on
    "kernels": set(),
    "clip": {"names", "files", "schemas"},
    "reference": {"names"},
    "backends": {"kernels", "reference", "files"},
    "ops": {"backends", "reference", "names"},
    "testing": {"ops", "backends", "names"},
    "info": {"ops", "backends", "testing", "files"},
    "nn": {"ops"},
    "heads": {"ops", "names", "extensions"},
    "data": {"clip", "environment", "extensions", *BASE},
    "train": {"heads", "data", "clip", *BASE},
    "runs": {
        *("train", "heads", "data", "clip", "ops", "backends", "environment", "extensions", *BASE),
    },
    "sklearn": {"train", "heads", "data", "names"},
    "tune": {"kernels", "backends", "testing", "files"},
    "bench": {"runs", "train", "heads", "data", "clip", "environment", *BASE},
    "demo": {"runs", "data", "clip", "files", "machine"},
    "serve": {"runs", "data", "names", "files", "machine"},
    "cli": {
        *("bench", "serve", "demo", "tune", "info", "runs", "train", "data", "backends"),
        *("testing", "extensions", "heads"),
        *("clip", "names", "files", "machine", "environment"),
    },
}
GRAPH = ImportGraph()
ROOT_FILES, FLOORS = 9, 10  # at most, besides __init__ and __main__


@pytest.mark.parametrize("room", GRAPH.rooms)
def test_a_room_imports_what_the_tree_shows(room):
    assert GRAPH.rooms[room] == ARROWS[room]


def test_the_tree_has_no_cycles_and_few_floors():
    assert set(ARROWS) == set(GRAPH.rooms)
    assert cycles(GRAPH.rooms) == []
    face = {"vtclip"}  # which names everything for type checkers, and imports it when asked
    inside = {m: targets - face for m, targets in GRAPH.imports.items() if m not in face}
    assert cycles(inside) == []
    assert max(GRAPH.floors().values()) <= FLOORS
    loose = [p.stem for p in (ROOT / "vtclip").glob("*.py") if p.stem not in OUTSIDE]
    assert len(loose) <= ROOT_FILES


def test_the_graph_sees_relative_and_late_imports(tmp_path):
    for name, code in {
        "vtclip/__init__": "from vtclip import low",
        "vtclip/low": "def late():\n    from .high.part import x",
        "vtclip/high/__init__": "",
        "vtclip/high/part": "from .. import low\nfrom .other import y",
        "vtclip/high/other": "from . import part",
    }.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    graph = ImportGraph(tmp_path)
    assert graph.rooms == {"low": {"high"}, "high": {"low"}}
    assert cycles(graph.rooms) == [["high", "low"]]
    assert graph.imports["vtclip.high.other"] == {"vtclip.high.part"}


# folder -> libraries it must not import
FOREIGN = {
    "vtclip/reference": ("triton", "open_clip"),
    "vtclip/backends": ("triton", "open_clip"),
    "vtclip/ops": ("triton", "open_clip"),
    "vtclip/nn": ("triton", "open_clip"),
    "vtclip/heads": ("triton", "open_clip"),
    "vtclip/data": ("triton", "open_clip"),
}


@pytest.mark.parametrize("folder", FOREIGN)
def test_libraries_are_imported_where_they_belong(folder):
    files = [*(ROOT / folder).rglob("*.py")]
    assert files
    for path in files:
        for name in imported_names(path):
            assert not name.startswith(FOREIGN[folder]), f"{path.name} imports {name}"


def test_backends_read_dtypes_alone_of_the_reference():
    modules = {m for m in GRAPH.imports if m.startswith("vtclip.backends")}
    targets = {t for m in modules for t in GRAPH.imports[m] if t.startswith("vtclip.reference")}
    assert targets == {"vtclip.reference._dtypes"}


def test_sources_name_their_licence():
    for path in tracked("*.py"):
        assert path.read_text().startswith("# SPDX-License-Identifier: Apache-2.0"), path


def test_only_the_clip_package_imports_open_clip():
    users = [
        p
        for p in tracked("vtclip/*.py")
        if any(n.startswith("open_clip") for n in imported_names(p))
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


# what else writes files: an own log or list of rows, a temporary folder, a switch of the system
WRITERS = {"writing", "runs/folder", "bench/rows", "testing/selftest", "testing/selftest_worker"}
WRITERS |= {"machine"}


def test_files_are_written_by_the_module_for_it():
    """vtclip.writing: random names, one step, never through a planted link."""
    write = re.compile(r"\.write_(text|bytes)\(|O_CREAT|\bopen\([^)\n]*\"[wax]b?\+?\"")
    found = {p for p in tracked("vtclip/*.py") if write.search(p.read_text())}
    names = {p.relative_to(ROOT / "vtclip").with_suffix("").as_posix() for p in found}
    assert names == WRITERS


def test_nothing_is_pickled():
    """What is saved is tensors, JSON and text, so that a reader that runs nothing reads it all."""
    pickled = re.compile(
        r"(?<!safetensors\.)\b(torch\.save|pickle\.dumps?|np\.savez?|joblib)\b|weights_only=False"
    )
    assert not [p for p in tracked("vtclip/*.py") if pickled.search(p.read_text())]


def test_functions_stay_short():
    """Of Python outside the kernels, whose arguments fill a page."""
    for path in tracked("vtclip/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = node.end_lineno - node.lineno + 1
                assert lines <= LONGEST_FUNCTION, f"{path}: {node.name} has {lines} lines"


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
