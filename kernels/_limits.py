# SPDX-License-Identifier: Apache-2.0
"""What the kernels can run. Imports no Triton, so that a backend can ask before it is loaded."""

import torch

MAX_HEAD_WIDTH = 256  # of attention: one padded [rows, d] tile
MAX_WIDTH = 16384  # of all others: one row of a program
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def why_not(dtype: torch.dtype, width: int, limit: int) -> list[str]:
    """Reasons against a launch on tensors of `dtype`; without any it can run."""
    reasons = []
    if dtype not in DTYPES:
        reasons.append(f"has no {str(dtype).removeprefix('torch.')} kernel")
    if width > limit:
        kind = "head width" if limit == MAX_HEAD_WIDTH else "width"
        reasons.append(f"{kind} {width} is above {limit}")
    return reasons
