# SPDX-License-Identifier: Apache-2.0
"""What is said once in a process is said once in every test."""

from __future__ import annotations

import pytest

from vtclip.clip.names import say_once


@pytest.fixture(autouse=True)
def _said_nothing() -> None:
    say_once.cache_clear()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-architectures",
        action="store_true",
        help="tests/clip: every architecture of open_clip, not one of each family",
    )
