# SPDX-License-Identifier: Apache-2.0
"""What a launch reports, and the errors of the executor."""

from dataclasses import dataclass, field

import numpy as np


class PtxError(Exception):
    """PTX that cannot be read or run."""


class Unsupported(PtxError):
    """An opcode or a form of it that is not modelled."""


@dataclass(frozen=True)
class Checks:
    """What is looked for; bounds are always checked."""

    alignment: bool = True
    uninitialised: bool = True
    shared_races: bool = True
    global_races: bool = True
    barriers: bool = True
    proxies: bool = True


@dataclass
class Finding:
    """One kind of fault at one instruction; `count` lanes or executions showed it."""

    kind: str
    message: str
    line: int
    count: int = 1

    def __str__(self) -> str:
        return f"{self.kind} in line {self.line}, {self.count} times: {self.message}"


@dataclass
class Report:
    """The outcome of a launch."""

    executed: np.ndarray  # bool for each instruction: reached by at least one lane
    findings: list[Finding] = field(default_factory=list)
    steps: int = 0  # instructions, each for all lanes that stand together
    thread_instructions: int = 0
    matrix_products: int = 0  # of warps and warpgroups
