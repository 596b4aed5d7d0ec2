# SPDX-License-Identifier: Apache-2.0
"""One recipe per method: `get_config(shots)` answers the settings it is trained with."""

from __future__ import annotations

from collections.abc import Callable

from vtclip.config import FitConfig

from . import auto, rada, vtclip, zeroshot

RECIPES: dict[str, Callable[[int], FitConfig]] = {
    "auto": auto.get_config,
    "vtclip": vtclip.get_config,
    "rada": rada.get_config,
    "zeroshot": zeroshot.get_config,
}
