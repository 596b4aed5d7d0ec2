# SPDX-License-Identifier: Apache-2.0
"""Executes PTX on the CPU with NumPy and checks what it does; see README.md."""

from .machine import launch
from .memory import Memory
from .parse import Kernel, Module, Parameter
from .report import Checks, Finding, PtxError, Report, Unsupported

__all__ = [
    "Checks", "Finding", "Kernel", "Memory", "Module", "Parameter", "PtxError", "Report",
    "Unsupported", "launch",
]  # fmt: skip
