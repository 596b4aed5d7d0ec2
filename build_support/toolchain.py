# SPDX-License-Identifier: Apache-2.0
"""What this machine offers a build: the CUDA toolkit, the GPUs to compile for, cores and memory."""

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

# where no GPU is visible: 8.0 serves 8.6 and 8.9, PTX what is newer than 9.0. Both come from one
# PTX, which halves the front end's time: no kernel has code for 9.0 alone.
DEFAULT_ARCHES = "8.0+PTX;9.0"
DEFAULT_FLAGS = ("-gencode=arch=compute_80,code=[compute_80,sm_80,sm_90]",)
OLDEST_GPU = (7, 5)
JOB_BYTES = 2**30  # the largest file's compiler, about twice over


def _output(*command: str) -> str:
    """What a tool prints; nothing where it cannot be run, fails or hangs."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout + done.stderr if done.returncode == 0 else ""


def cuda_home() -> str:
    """The toolkit behind CUDA_HOME or nvcc; nvcc may be a link or a script outside its toolkit."""
    nvcc = shutil.which("nvcc")
    if os.environ.get("CUDA_HOME") or nvcc is None:
        return os.environ.get("CUDA_HOME", "")
    top = re.search(r"^#\$ TOP=(.+)$", _output(nvcc, "--dryrun", "-x", "cu", os.devnull), re.M)
    return str(Path(top[1]).resolve() if top else Path(nvcc).resolve().parents[1])


def why_no_cuda(home: str) -> str:
    """Why the toolkit cannot compile for the installed torch; empty where it can."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build"
    if not Path(home, "bin", "nvcc").is_file():
        return f"no CUDA toolkit found (no nvcc on PATH or in CUDA_HOME = {home!r})"
    release = re.search(r"release (\d+)\.", _output(f"{home}/bin/nvcc", "--version"))
    if release is not None and release[1] == torch.version.cuda.split(".")[0]:
        return ""
    return f"toolkit at {home} is CUDA {release and release[1]}, torch has {torch.version.cuda}"


def visible_gpus() -> list[tuple[int, int]]:
    """Compute capabilities of the GPUs that the driver lists; nothing is started on them."""
    listed = _output("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    return sorted({(int(a), int(b)) for a, b in re.findall(r"^(\d+)\.(\d+)\s*$", listed, re.M)})


class Architectures(NamedTuple):
    """TORCH_CUDA_ARCH_LIST, why it is so, and flags of nvcc where torch has no say."""

    names: str
    why: str
    flags: tuple[str, ...] = ()


def architectures(home: str) -> Architectures:
    given = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if given:
        return Architectures(given, "TORCH_CUDA_ARCH_LIST")
    gpus = visible_gpus()
    if not gpus:
        return Architectures(DEFAULT_ARCHES, "no GPU is visible", DEFAULT_FLAGS)
    known = re.findall(r"sm_(\d+)", _output(f"{home}/bin/nvcc", "--list-gpu-code"))
    own = [(a, b) for a, b in gpus if (a, b) >= OLDEST_GPU and f"{a}{b}" in known]
    text = {gpu: "{}.{}".format(*gpu) for gpu in gpus}
    why = "the visible GPUs"
    if len(own) < len(gpus):
        without = ", ".join(text[gpu] for gpu in gpus if gpu not in own)
        why += f"; nvcc or vtclip has no code of its own for {without}"
    if not own:
        return Architectures(DEFAULT_ARCHES, why, DEFAULT_FLAGS)
    return Architectures(";".join(text[gpu] for gpu in own) + "+PTX", why)


def _free_bytes() -> int | None:
    """Memory that can be had without swapping, within the container's limit if there is one."""
    free = None
    for path, pattern, unit in (
        ("/proc/meminfo", r"^MemAvailable:\s+(\d+) kB", 1024),
        ("/sys/fs/cgroup/memory.max", r"^(\d+)$", 1),
    ):
        try:
            found = re.search(pattern, Path(path).read_text(), re.M)
        except OSError:
            continue
        if found:
            free = min(int(found[1]) * unit, free or int(found[1]) * unit)
    return free


def jobs() -> int:
    """Files compiled at a time: one per core that this process may use and GiB that is free."""
    usable = getattr(os, "sched_getaffinity", None)
    cores = len(usable(0)) if usable else os.cpu_count() or 1
    free = _free_bytes()
    return max(1, cores if free is None else min(cores, free // JOB_BYTES))
