# SPDX-License-Identifier: Apache-2.0
"""A bar with the time left, of commands that need torch alone: without tqdm there is none."""

from __future__ import annotations

import importlib.util
from typing import Any

from vtclip.cli.parsing import on_terminal


class Bar:
    """On stderr where somebody watches; `reach` moves it to a number of `total`."""

    def __init__(self, what: str, unit: str) -> None:
        self._bar: Any = None
        if on_terminal() and importlib.util.find_spec("tqdm"):
            from tqdm import tqdm

            self._bar = tqdm(desc=what, unit=unit, leave=False)

    def reach(self, count: int, total: int) -> None:
        if self._bar is not None:
            self._bar.total = total
            self._bar.update(count - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
