# SPDX-License-Identifier: Apache-2.0
"""The line that a fit on a GPU begins with where nobody has seen its kernels right on this GPU."""

from __future__ import annotations

import logging

import torch

from vtclip.backends import record
from vtclip.distributed import is_first

logger = logging.getLogger(__name__)
_said: set[torch.device] = set()


def say_unless_proven(device: torch.device) -> None:
    """One warning per process and GPU; none for a CPU, nor of a process behind the first."""
    if device.type != "cuda" or device in _said or not is_first():
        return
    _said.add(device)
    standing = record.standing(device)
    if standing.kind != "proven":
        logger.warning("%s", standing.line)
