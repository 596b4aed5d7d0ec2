# SPDX-License-Identifier: Apache-2.0
"""A command on a pseudo-terminal, as somebody who watches it has it."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from typing import Any

from commands import environment


def on_terminal(*words: Any, out: bool = True, **variables: str) -> tuple[int, str, str]:
    """Exit status, what the terminal shows, and what a pipe gets that takes stdout if not `out`."""
    import fcntl
    import termios

    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    env = environment(**{"TERM": "xterm", "NO_COLOR": "", **variables})
    child = subprocess.Popen(
        [sys.executable, "-m", "vtclip", *map(str, words)],
        stdin=theirs,
        stdout=theirs if out else subprocess.PIPE,
        stderr=theirs,
        env=env,
    )
    os.close(theirs)
    shown = bytearray()
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:  # EIO: the last writer has gone
        pass
    os.close(ours)
    piped, _ = child.communicate(timeout=300)
    return child.returncode, shown.decode(), (piped or b"").decode()
