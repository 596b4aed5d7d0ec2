# SPDX-License-Identifier: Apache-2.0
"""What the build compiles, for which GPUs, in which order, once: with stand-in compilers."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from checkouts import ROOT, copy_of_the_tree

from vtclip.backends import native

_spec = importlib.util.spec_from_file_location("toolchain", ROOT / "build_support" / "toolchain.py")
toolchain = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(toolchain)

# writes its arguments into LOG and leaves an empty file where it was to write one
COMPILER = """\
#!/bin/sh
case " $* " in
  *" --version "*) [ -n "{release}" ] && echo "release {release}, V{release}.0" && exit ;;
  *" --list-gpu-code "*) printf 'sm_75\\nsm_80\\nsm_90\\nsm_120\\n'; exit ;;
esac
case " $* " in *" -o "*) ;; *) exec c++ "$@" ;; esac
echo "{name} $*" >> {log}
while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done
"""


class Build(NamedTuple):
    """A copy of the tree, and compilers that only note how they were called."""

    tree: Path
    log: Path
    env: dict[str, str]

    def __call__(self, **env: str) -> tuple[str, list[str]]:
        """Builds; what was printed, and the calls."""
        self.log.write_text("")
        done = subprocess.run(
            [sys.executable, "setup.py", "build_ext", "--inplace"],
            cwd=self.tree, capture_output=True, text=True, env={**self.env, **env},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr, self.log.read_text().splitlines()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(Build, what the first one printed, its calls) in the richest mode this torch allows."""
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler")
    pytest.importorskip("ninja", reason="the build is ninja's")
    folder = tmp_path_factory.mktemp("build")
    tools = folder / "toolkit" / "bin"
    tools.mkdir(parents=True)
    for name, release in (("nvcc", torch.version.cuda or ""), ("c++", "")):
        script = COMPILER.format(name=name, release=release, log=folder / "log")
        (tools / name).write_text(script.replace("exec c++", f"exec {shutil.which('c++')}"))
        (tools / name).chmod(0o755)
    (tools / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    (tools / "nvidia-smi").chmod(0o755)
    mode = "cpu" if torch.version.cuda is None else "cuda"
    env = {**os.environ, "CXX": str(tools / "c++"), "CUDA_HOME": str(tools.parent)}
    env |= {"VTCLIP_EXT": mode, "MAX_JOBS": "1", "PATH": f"{tools}:{os.environ['PATH']}"}
    for name in ("TORCH_CUDA_ARCH_LIST", "CFLAGS", "CC"):
        env.pop(name, None)
    build = Build(copy_of_the_tree(folder), folder / "log", env)
    return build, *build()


def compiled(calls: list[str]) -> list[str]:
    """The sources of the calls, in their order."""
    return [m[1] for call in calls if (m := re.search(r" -c \S*?/(csrc/\S+)", call))]


def test_every_file_is_compiled_once_and_then_linked(built):
    build, printed, calls = built
    sources = compiled(calls)
    wanted = [p for p in (build.tree / "csrc").rglob("*") if p.suffix in (".cpp", ".cu")]
    if build.env["VTCLIP_EXT"] == "cpu":
        wanted = [p for p in wanted if p.suffix == ".cpp"]
    assert sorted(sources) == sorted(str(p.relative_to(build.tree)) for p in wanted)
    linked = [" -shared " in call for call in calls]
    assert linked == sorted(linked)  # in one run: no library waits for another's compilers
    assert f"vtclip: {len(wanted)} files, 1 at a time (MAX_JOBS)" in printed
    assert f"vtclip: file {len(wanted)} of {len(wanted)} compiled" in printed


def test_what_takes_longest_is_begun_first(built):
    build, _, calls = built
    sources = compiled(calls)
    if build.env["VTCLIP_EXT"] == "cuda":
        assert sources[0].startswith("csrc/cuda/cross_attn")
    suffixes = [Path(source).suffix for source in sources]
    assert suffixes == sorted(suffixes, reverse=True)


def test_an_unchanged_tree_is_not_compiled_again(built):
    build, _, _ = built
    assert compiled(build()[1]) == []
    (build.tree / "csrc" / "module.cpp").touch()
    assert compiled(build()[1]) == ["csrc/module.cpp"]


def test_libraries_are_small(built):
    """No debug information, which Python's own flags ask for; device code compressed."""
    for call in built[2]:
        if " -shared " in call:
            assert " -Wl,-s" in call or sys.platform != "linux"
        elif call.startswith("c++"):
            assert re.findall(r" -g\d?(?= )", call)[-1:] == [" -g0"]
        else:
            assert " -Xfatbin=-compress-all " in call
    if native.cuda_library() is not None:
        sizes = [path.stat().st_size for path in (ROOT / "vtclip").glob("_C*.so")]
        assert sum(sizes) <= 20e6


def test_without_a_gpu_the_default_is_compiled_and_said(built):
    build, printed, calls = built
    if build.env["VTCLIP_EXT"] == "cpu":
        pytest.skip("this torch is a CPU build")
    of_nvcc = [call for call in calls if call.startswith("nvcc")]
    for call in of_nvcc:
        codes = "-gencode=arch=compute_80,code=[compute_80,sm_80,sm_90]"
        assert [word for word in call.split() if "arch=" in word] == [codes]
    assert of_nvcc
    assert "for 8.0+PTX;9.0 (no GPU is visible)" in printed


def test_a_list_of_architectures_wins(built):
    build, _, _ = built
    if build.env["VTCLIP_EXT"] == "cpu":
        pytest.skip("this torch is a CPU build")
    printed, calls = build(TORCH_CUDA_ARCH_LIST="7.5;9.0+PTX")
    for call in calls:
        if call.startswith("nvcc"):
            codes = set(re.findall(r"code=(\w+)", call.replace("arch=", " ")))
            assert codes == {"sm_75", "sm_90", "compute_90"}
    assert "for 7.5;9.0+PTX (TORCH_CUDA_ARCH_LIST)" in printed


GPUS = "the visible GPUs; nvcc or vtclip has no code of its own for "


@pytest.mark.parametrize(
    ("listed", "given", "wanted"),
    [
        ("8.0\n9.0\n8.0\n", "", ("8.0+PTX;9.0", "the visible GPUs")),
        ("12.0\n", "", ("12.0+PTX", "the visible GPUs")),
        ("9.0\n", "7.5", ("7.5", "TORCH_CUDA_ARCH_LIST")),
        ("", "", ("8.0+PTX;9.0", "no GPU is visible")),
        ("Failed to initialize NVML\n", "", ("8.0+PTX;9.0", "no GPU is visible")),
        ("7.0\n13.0\n", "", ("8.0+PTX;9.0", f"{GPUS}7.0, 13.0")),
        ("7.0\n9.0\n", "", ("9.0+PTX", f"{GPUS}7.0")),
    ],
)  # fmt: skip
def test_the_visible_gpus_are_compiled_for(monkeypatch, listed, given, wanted):
    outputs = {"nvidia-smi": listed, "/toolkit/bin/nvcc": "sm_75\nsm_80\nsm_90\nsm_120\n"}
    monkeypatch.setattr(toolchain, "_output", lambda command, *_: outputs[command])
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    found = toolchain.architectures("/toolkit")
    assert found[:2] == wanted
    assert bool(found.flags) == (found.names == toolchain.DEFAULT_ARCHES)


@pytest.mark.parametrize(("gib", "jobs"), [(None, 8), (3.5, 3), (0.2, 1), (99.0, 8)])
def test_no_more_jobs_than_memory_holds(monkeypatch, gib, jobs):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(toolchain, "_free_bytes", lambda: gib and int(gib * 2**30))
    assert toolchain.jobs() == jobs
