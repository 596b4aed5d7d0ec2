# SPDX-License-Identifier: Apache-2.0
"""The plain torch implementation: runs on every device and dtype, differentiated by torch."""

from __future__ import annotations

from typing import Any


class _Reference:
    def why_not(self, problem: Any) -> tuple[str, ...]:
        return ()

    def function(self, name: str) -> Any:
        raise AttributeError(f"the reference of {name} is called directly")


REFERENCE = _Reference()
