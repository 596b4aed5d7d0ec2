# SPDX-License-Identifier: Apache-2.0
"""Methods beside the built-in ones: what a class must have, and the table of all."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from vtclip.extensions.registry import METHODS, Registry
from vtclip.heads._head import Head, ImageHead
from vtclip.heads.config import FitConfig

Recipe = Callable[[int], FitConfig]
WIDTH = 64  # of the two class texts on which a new head is tried


def check_head(name: str, kind: object) -> type[Head]:
    """`kind`, called `name`, where it has all that a fit and a file of it ask for.

    One line that names what is missing: TypeError for what is no head, else ValueError.
    """
    if not (inspect.isclass(kind) and issubclass(kind, Head)):
        what = kind.__name__ if inspect.isclass(kind) else type(kind).__name__
        raise TypeError(f"method {name!r}: it must be a subclass of vtclip.heads.Head, got {what}")
    what = f"method {name!r}: {kind.__name__}"
    own = vars(kind).get("method", name)
    if own != name:
        raise ValueError(f"{what}.method must be {name!r}, got {own!r}")
    if issubclass(kind, ImageHead):
        if kind.image_logits is ImageHead.image_logits and kind.forward is ImageHead.forward:
            raise ValueError(f"{what} lacks image_logits(image)")
    elif kind.forward is torch.nn.Module.forward:
        raise ValueError(f"{what} lacks forward(image, spatial=None, spatial_mask=None)")
    _check_options(what, kind)
    _check_recipe(what, kind)
    kind.method = name
    return kind


def _check_options(what: str, kind: type[Head]) -> None:
    parameters = list(inspect.signature(kind).parameters.values())
    if not parameters or parameters[0].name != "text":
        raise ValueError(f"{what}.__init__ lacks text as its first argument")
    for parameter in parameters[1:]:
        if parameter.kind is not parameter.KEYWORD_ONLY:
            wish = "a keyword of its own, behind the *"
            raise ValueError(f"{what}.__init__: {parameter.name} must be {wish}")
        if parameter.default is parameter.empty:
            raise ValueError(f"{what}.__init__: option {parameter.name} lacks a default")
    names = [parameter.name for parameter in parameters]
    for name in ["logit_scale", *(["spatial_dim"] if kind.needs_spatial else [])]:
        if name not in names:
            raise ValueError(f"{what}.__init__ lacks the option {name}")


def _check_recipe(what: str, kind: type[Head]) -> None:
    """Try a head over two class texts, its options and its recipe."""
    made: object = kind.recipe(16)
    if not isinstance(made, FitConfig):
        got = type(made).__name__
        raise TypeError(f"{what}.recipe must return a vtclip.heads.FitConfig, got {got}")
    recipe, takes = made, inspect.signature(kind).parameters
    for option in recipe.head:
        if option not in takes:
            raise ValueError(f"{what}.recipe sets head option {option}, which __init__ lacks")
    with torch.random.fork_rng(devices=[]):
        try:
            options: dict[str, Any] = dict(recipe.head)
            head = kind(torch.eye(2, WIDTH), **options)
        except Exception as error:  # another's code may raise anything
            fault = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            fact = f"cannot be made of class texts [2, {WIDTH}]: {fault}"
            raise ValueError(f"{what} {fact}") from None
    for name in takes:
        if name != "text" and not _has(head, name):
            raise ValueError(f"{what} lacks the attribute {name}, an option of its __init__")
    if recipe.epochs and not any(p.requires_grad for p in head.parameters()):
        raise ValueError(f"{what} lacks parameters to train, and recipe asks for epochs")


def _has(value: object, name: str) -> bool:
    try:
        getattr(value, name)
    except AttributeError:
        return False
    return True


# method -> class; the built-in ones are filled in by heads/__init__.py, which alone knows them
HEADS: Registry[type[Head]] = Registry("method", METHODS, check_head)


def register_method(
    name: str, head: type[Head], recipe: Recipe | None = None, *, replace: bool = False
) -> None:
    """Make `head` the method `name`, in this process, for all that takes a method by name.

        class Centroid(vtclip.heads.ImageHead): ...
        vtclip.register_method("centroid", Centroid)
        vtclip.fit("my_images", method="centroid")

    name: letters, digits and . _ + -; it becomes `head.method`. A taken name is a ValueError.
    head: a subclass of `vtclip.heads.Head`, which says what a head has. What is missing is named
        in a ValueError of one line; it is tried on two class texts of width 64.
    recipe: from images per class to the `vtclip.heads.FitConfig` that trains it; it becomes
        `head.recipe`. None keeps the class's own, by default no training (epochs=0).
    replace: in place of what was registered under this name before, as a notebook's cell does.

    A run names the distribution or module that the class is of, and loads where the name is
    registered again. For the command line make it an entry point (`vtclip.extensions`).
    """
    if recipe is not None:
        if not callable(recipe):
            raise TypeError(f"recipe must be callable, got {type(recipe).__name__}")
        if inspect.isclass(head) and issubclass(head, Head):
            before = vars(head).get("recipe")
            head.recipe = staticmethod(recipe)  # type: ignore[method-assign,assignment]
            try:
                HEADS.add(name, head, replace=replace)
            except (TypeError, ValueError):
                if before is None:
                    del head.recipe
                else:
                    head.recipe = before  # type: ignore[method-assign]
                raise
            return
    HEADS.add(name, head, replace=replace)


def method_from(name: str) -> dict[str, str | None] | None:
    """Where a method comes from that is not built in, as a run records it; None of one that is."""
    return None if name in HEADS.builtin else HEADS.origin(name, HEADS[name].__module__)
