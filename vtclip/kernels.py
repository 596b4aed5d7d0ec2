# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels as the package `vtclip.kernels`.

Their folder lies beside this file where vtclip is installed, and at the top of the repository in a
checkout. A symbolic link would do the same, but Git for Windows writes links as text files.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

_installed = Path(__file__).with_suffix("")
_checkout = Path(__file__).parents[1] / "kernels"
__path__ = [str(_installed if _installed.is_dir() else _checkout)]

if TYPE_CHECKING:

    def __getattr__(name: str) -> Any: ...  # the files of that folder
