# SPDX-License-Identifier: Apache-2.0
"""What a child process needs on disk: the stand-in, and a CUDA library with its PTX.

The installed library serves where its fatbin holds PTX of the architecture and no source is newer.
Else the same sources are compiled to PTX alone, without ptxas, into VTCLIP_PTX_BUILD (default:
build/ptx of the checkout), one object per source and content of what it may include.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[3]
HOST = Path(__file__).parents[1] / "host"
SOURCES = ROOT / "csrc"
JOBS = min(2, os.cpu_count() or 1)


class Library(NamedTuple):
    """A CUDA library of vtclip and the PTX of its kernels."""

    path: Path
    ptx: Path
    installed: bool


def folder() -> Path:
    """Where everything built here is kept."""
    path = Path(os.environ.get("VTCLIP_PTX_BUILD", ROOT / "build" / "ptx"))
    path.mkdir(parents=True, exist_ok=True)
    return path


def _digest(*parts: str | bytes | Path) -> str:
    total = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else part
        total.update(data if isinstance(data, bytes) else data.encode())
        total.update(b"\0")
    return total.hexdigest()[:16]


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def replaced(path: Path, *command: str | Path) -> Path:
    """`path` as `command ... -o OTHER` makes it, in one step; kept where it is there already."""
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as unfinished:  # of this thread alone
            _run(*command, "-o", Path(unfinished) / path.name)
            (Path(unfinished) / path.name).replace(path)
    return path


def standin() -> Path:
    """The library to preload: CUDA runtime, torch's device, blocks of memory."""
    files = sorted(HOST.glob("*.cpp"))
    path = folder() / f"standin-{_digest(*files)}.so"
    compiler = os.environ.get("CXX", "c++").split()
    flags = ("-O2", "-std=c++20", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")
    return replaced(path, *compiler, *flags, *files, "-ldl")


def cuobjdump() -> str:
    """The tool that lists what a fatbin holds; Triton brings one."""
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    found = shutil.which("cuobjdump") or (str(bundled) if bundled.exists() else None)
    if found is None:
        raise RuntimeError("no cuobjdump: neither on PATH nor beside the installed Triton")
    return found


def nvcc() -> str | None:
    """The compiler, if there is one."""
    return shutil.which("nvcc")


def modules(text: str) -> list[str]:
    """The PTX modules that cuobjdump prints."""
    parts = re.split(r"(?=^\.version )", text, flags=re.MULTILINE)
    return [part.partition("\nFatbin ")[0] for part in parts if ".entry" in part]


def _ptx_of(library: Path, arch: str) -> str:
    """All modules of `library` for `arch`; empty without any."""
    wanted = re.compile(rf"^\.target {arch}\b", re.MULTILINE)
    return "\n".join(m for m in modules(_run(cuobjdump(), "-ptx", library)) if wanted.search(m))


def _installed(arch: str) -> tuple[Library | None, str]:
    """The installed CUDA library if it will do, and why it will not."""
    from vtclip.backends import native

    path = native.cuda_library()
    if path is None:
        return None, "no CUDA library is installed"
    newest = max(p.stat().st_mtime for p in SOURCES.rglob("*") if p.suffix != ".csv")
    if path.stat().st_mtime <= newest:
        return None, f"{path.name} is older than its sources"
    kept = folder() / f"installed-{arch}-{_digest(path)}.ptx"
    if not kept.exists():
        kept.write_text(_ptx_of(path, arch))
    if not kept.stat().st_size:
        return None, f"{path.name} holds no PTX of {arch}"
    return Library(path, kept, True), ""


def why_not(arch: str) -> str:
    """Why there can be no CUDA library with PTX of `arch`, or the empty string."""
    found, reason = _installed(arch)
    return "" if found or nvcc() else f"{reason}, and there is no nvcc to compile one"


@functools.cache
def missing(set_name: str) -> str:
    """Why the kernels of a set cannot be had on this machine, or the empty string."""
    if sys.platform != "linux":
        return "the stand-in of the CUDA runtime is for Linux"
    if shutil.which(os.environ.get("CXX", "c++").split()[0]) is None:
        return "no C++ compiler for the stand-in of the CUDA runtime"
    if set_name == "cuda":
        return why_not("sm_90")
    from vtclip.backends import triton

    return triton.load()


def library(arch: str) -> Library:
    """The CUDA library whose host code runs, and a file with its PTX for `arch` ("sm_90")."""
    return _installed(arch)[0] or _built(arch)


def _included(source: Path, seen: set[Path]) -> set[Path]:
    """`source` and every file of csrc that it includes, by whatever it includes."""
    seen.add(source)
    for name in re.findall(r'^#include "([^"]+)"', source.read_text(), re.MULTILINE):
        for path in (source.parent / name, SOURCES / name):
            if path.exists() and path.resolve() not in seen:
                _included(path.resolve(), seen)
    return seen


def _built(arch: str) -> Library:
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError(why_not(arch))
    from torch.utils import cpp_extension

    sources = sorted((SOURCES / "cuda").rglob("*.cu"))
    virtual = arch.replace("sm", "compute")
    # as setup.py and torch's build helper pass them; -O concerns the host code alone
    flags = [
        "-O1", "-std=c++20", "-Xcompiler", "-fPIC", *cpp_extension.COMMON_NVCC_FLAGS,
        f"-gencode=arch={virtual},code={virtual}", "-DUSE_CUDA=1",
        *(f"-isystem={path}" for path in cpp_extension.include_paths()),
        f"-I{SOURCES}", f"-DTORCH_TARGET_VERSION={_target_version()}",
    ]  # fmt: skip
    state = _digest(_run(compiler, "--version"), " ".join(flags))
    place = folder() / arch
    place.mkdir(exist_ok=True)

    def compiled(source: Path) -> Path:
        path = place / f"{source.stem}-{_digest(state, *sorted(_included(source, set())))}.o"
        return replaced(path, compiler, *flags, "-c", source)

    with ThreadPoolExecutor(JOBS) as pool:
        objects = list(pool.map(compiled, sources))
    path = place / f"vtclip-{_digest(*(o.name for o in objects))}.so"
    torch_libraries = cpp_extension.library_paths()
    replaced(path, *os.environ.get("CXX", "c++").split(), "-shared", *objects,
              *(f"-L{p}" for p in torch_libraries), "-ltorch", "-ltorch_cpu", "-lc10")  # fmt: skip
    ptx = path.with_suffix(".ptx")
    if not ptx.exists():
        ptx.write_text(_ptx_of(path, arch))
    return Library(path, ptx, False)


def _target_version() -> str:
    found = re.search(r'^TARGET_VERSION = "(\w+)"', (ROOT / "setup.py").read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError("setup.py has no TARGET_VERSION")
    return found[1]


if __name__ == "__main__":
    sys.stdout.write(f"{standin()}\n")
    for name in sys.argv[1:]:
        sys.stdout.write(f"{library(name)}\n")
