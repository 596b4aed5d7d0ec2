# SPDX-License-Identifier: Apache-2.0
"""The environment variables that the package reads, each named once, and what a launcher's say.

Imports nothing of the package, and no torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

VARIABLES = {
    "VTCLIP_CACHE": "folder of features, texts and records; default ~/.cache/vtclip",
    "VTCLIP_TUNED": "table of tiles that `vtclip tune` wrote: a file, or 1 for that in the cache",
    "VTCLIP_CPU_CAPABILITY": "which instructions the CPU kernels use at most (read in C++)",
    "TRITON_INTERPRET": "1: Triton runs kernels as Python",
    "NO_COLOR": "any text: no colours, on a terminal either",
    "TERM": "dumb: no colours; the terminal's own name elsewhere",
    "WT_SESSION": "set by Windows Terminal, whose consoles show colours",
    "PYTHONPATH": "passed on to the processes of `vtclip selftest`",
    "RANK": "number of this process, set by torchrun",
    "WORLD_SIZE": "how many processes there are, set by torchrun",
    "LOCAL_RANK": "number of this process on this machine, set by torchrun",
    "LOCAL_WORLD_SIZE": "how many processes this machine has, set by torchrun",
    "MASTER_ADDR": "where the processes meet, set by torchrun",
    "MASTER_PORT": "where the processes meet, set by torchrun",
}
# read by setup.py and by tests; to a command they are known, and mean nothing
ELSEWHERE = (
    *("VTCLIP_EXT", "VTCLIP_WERROR", "VTCLIP_GPU_REHEARSE", "VTCLIP_PTX_BUILD"),
    "VTCLIP_FUZZ_SECONDS",
)
PREFIX = "VTCLIP_"
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
HINT = "start the processes with torchrun, or unset it"


def process_number(name: str, default: int) -> int:
    """The whole number in a launcher's variable; a ValueError names it."""
    value = os.environ.get(name, str(default))
    if not value.isascii() or not value.isdecimal():
        raise ValueError(f"{name} must be a whole number, got {value!a}; {HINT}")
    return int(value)


def num_processes() -> int:
    """How many processes the launcher started; 1 without one."""
    return process_number("WORLD_SIZE", 1)


def is_first() -> bool:
    """Whether this process is the only one, or the first of several."""
    return num_processes() == 1 or process_number("RANK", 0) == 0


def check_launcher() -> None:
    """Refuse variables that no launcher set together: they would silence or change a run.

    A lone RANK=0 says what is so without it, and passes.
    """
    size = num_processes()
    if size < 1:
        raise ValueError(f"WORLD_SIZE must be at least 1, got {size}; {HINT}")
    whose = f"WORLD_SIZE is {size}" if "WORLD_SIZE" in os.environ else "WORLD_SIZE is not set"
    if size > 1:
        missing = [name for name in LAUNCHER if name not in os.environ]
        if missing:
            verb = "is" if len(missing) == 1 else "are"
            raise ValueError(f"{whose} but {', '.join(missing)} {verb} not set; {HINT}")
    for name in ("RANK", "LOCAL_RANK"):
        if process_number(name, 0) >= size:
            raise ValueError(f"{name} is {process_number(name, 0)} but {whose}; {HINT}")
    local = process_number("LOCAL_WORLD_SIZE", 1)
    if not 1 <= local <= size:
        raise ValueError(f"LOCAL_WORLD_SIZE is {local} but {whose}; {HINT}")


def unknown_variables(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Variables that begin like ours and are not; a misspelt one would do nothing in silence."""
    known = {*VARIABLES, *ELSEWHERE}
    return sorted(name for name in environ if name.startswith(PREFIX) and name not in known)
