# SPDX-License-Identifier: Apache-2.0
"""One recipe per method: `get_config(shots)` answers the settings it is trained with."""

from __future__ import annotations

from collections.abc import Callable

from vtclip.heads.config import FitConfig

from . import (
    auto,
    autoclip,
    calip,
    clip_adapter,
    coop,
    linear_probe,
    mm_adapter,
    proker,
    proto_clip,
    rada,
    tip_adapter,
    tip_adapter_f,
    tip_x,
    vtclip,
    zeroshot,
)

RECIPES: dict[str, Callable[[int], FitConfig]] = {
    "tip-adapter": tip_adapter.get_config,
    "tip-adapter-f": tip_adapter_f.get_config,
    "proker": proker.get_config,
    "tip-x": tip_x.get_config,
    "proto-clip": proto_clip.get_config,
    "coop": coop.get_config,
    "clip-adapter": clip_adapter.get_config,
    "linear-probe": linear_probe.get_config,
    "mm-adapter": mm_adapter.get_config,
    "autoclip": autoclip.get_config,
    "calip": calip.get_config,
    "auto": auto.get_config,
    "vtclip": vtclip.get_config,
    "rada": rada.get_config,
    "zeroshot": zeroshot.get_config,
}
