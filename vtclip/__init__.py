# SPDX-License-Identifier: Apache-2.0
"""Fused cross-attention kernels for CLIP adaptation, and the adapters built on them.

`import vtclip` costs torch and nothing else: Triton, the compiled extension, open_clip and the
training loop are imported when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "ops": "vtclip.ops",
    "nn": "vtclip.nn",
    "heads": "vtclip.heads",
    "testing": "vtclip.testing",
    "fit": "vtclip.runs.fit:fit",
    "evaluate": "vtclip.runs.evaluate:evaluate",
    "extend": "vtclip.runs.extend:extend",
    "export": "vtclip.runs.export:export",
    "load_exported": "vtclip.runs.export:load_exported",
    "repeat": "vtclip.runs.repeat:repeat",
    "Run": "vtclip.runs.result:Run",
    "Classifier": "vtclip.runs.classifier:Classifier",
    "open_source": "vtclip.data.sources:open_source",
    "load_clip": "vtclip.clip:load_clip",
}

__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'vtclip' has no attribute {name!r}")
    module, _, attribute = _LAZY[name].partition(":")
    loaded = importlib.import_module(module)
    value = getattr(loaded, attribute) if attribute else loaded
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
