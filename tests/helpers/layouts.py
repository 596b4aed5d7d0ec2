# SPDX-License-Identifier: Apache-2.0
"""Functions that lay the elements of a tensor out in another way; expanded repeats a row."""

from __future__ import annotations

from vtclip import testing

LAYOUTS = {
    "gaps": testing.spread,
    "misaligned": testing.misaligned,
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "expanded": lambda t: t[:1].expand_as(t),
}
ATTENTION_LAYOUTS = {
    "gaps": testing.spread,
    "misaligned": testing.misaligned,
    "transposed": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "heads-inner": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "expanded": lambda t: t[:, :1].expand_as(t),
}
