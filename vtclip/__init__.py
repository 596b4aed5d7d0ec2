# SPDX-License-Identifier: Apache-2.0
"""Few-shot adaptation of a frozen CLIP, and the fused attention operators under it.

    run = vtclip.fit("my_images", model="ViT-B-32:openai", shots=16, out="run")
    classifier = vtclip.Classifier.load("run")
    classifier.predict("photo.jpg", topk=3)

    fit, evaluate, extend, repeat         a run: train and test it, add classes, do it again
    Run, Classifier                       what is read from its folder; what predicts with it
    export, load_exported                 one file of it that runs without vtclip
    open_source, load_clip                features of a source of images; a model by its name
    register_method, register_data_set    names of your own for fit, bench and the command line
    vtclip.sklearn.FewShotClassifier      a method on a matrix of features (extra sklearn)
    ops, nn, heads, testing               operators; modules; methods as torch modules; budgets

`import vtclip` costs torch and nothing else: Triton, the compiled extension, open_clip and the
training loop are imported when they are first used. `help(vtclip.fit)` has every option.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the names of `_LAZY`, for type checkers and editors
    from vtclip import heads as heads
    from vtclip import nn as nn
    from vtclip import ops as ops
    from vtclip import testing as testing
    from vtclip.clip import load_clip as load_clip
    from vtclip.data.sets import register_data_set as register_data_set
    from vtclip.data.sources import open_source as open_source
    from vtclip.heads import register_method as register_method
    from vtclip.runs.classifier import Classifier as Classifier
    from vtclip.runs.evaluate import evaluate as evaluate
    from vtclip.runs.export import export as export
    from vtclip.runs.export import load_exported as load_exported
    from vtclip.runs.extend import extend as extend
    from vtclip.runs.fit import fit as fit
    from vtclip.runs.repeat import repeat as repeat
    from vtclip.runs.result import Run as Run

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
    "register_method": "vtclip.heads:register_method",
    "register_data_set": "vtclip.data.sets:register_data_set",
}

__all__ = ["__version__", *_LAZY]

if not TYPE_CHECKING:  # a type checker that saw it would take any name for Any

    def __getattr__(name: str) -> object:
        if name not in _LAZY:
            raise AttributeError(f"module 'vtclip' has no attribute {name!r}")
        module, _, attribute = _LAZY[name].partition(":")
        loaded = importlib.import_module(module)
        value = getattr(loaded, attribute) if attribute else loaded
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
