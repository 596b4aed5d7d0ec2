# SPDX-License-Identifier: Apache-2.0
"""What the specification, the schemas and the operators share: dtypes and codes of arguments."""

from __future__ import annotations

import torch

from vtclip.names import PENALTIES

# how the penalty of a mask travels through the schemas
PENALTY_CODES = {name: code for code, name in enumerate(PENALTIES)}


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype statistics are kept in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32
