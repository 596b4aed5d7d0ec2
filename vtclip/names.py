# SPDX-License-Identifier: Apache-2.0
"""The names that users type, each list written once, and the nearest known one to a wrong name.

Everything that offers, checks or orders these names reads them here. Imports nothing of the
package, and no torch.
"""

from __future__ import annotations

import contextlib
import contextvars
import difflib
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Literal, get_args

# in the order in which help, tables and pages list them
METHODS = (
    *("zeroshot", "calip", "autoclip", "linear-probe", "clip-adapter", "coop", "tip-adapter"),
    *("tip-adapter-f", "tip-x", "proker", "takl", "proto-clip"),
    *("cross-modal", "gda", "lp++", "taskres", "zs-lp", "clap", "ape", "ape-t", "prolip"),
    *("mm-adapter", "vtclip", "rada", "auto"),
)
TUNED_METHODS = ("vtclip", "rada")  # those whose kernels `vtclip tune` times

Penalty = Literal["none", "l1", "mse", "linf"]
PENALTIES: tuple[Penalty, ...] = get_args(Penalty)  # of RAda's mask; the place is a kernel's code
QUERIES = ("image", "text", "pair")  # of RAda's attention

OPTIMIZERS = ("sgd", "adamw")
LOSSES = ("ce", "gce")
PRECISIONS = ("fp32", "bf16")  # of trained encoders
POSITIONS = ("end", "middle", "front")  # of the class name among CoOp's context vectors
# images per class where none are named: a benchmark takes each, a fit the most that there are
SHOTS = (1, 2, 4, 8, 16)
# files that list images
LIST_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")
MAX_SEED = 2**32 - 1  # of the range that torch, NumPy and random all take


# whether options are called as on the command line in messages
_as_typed = contextvars.ContextVar("as_typed", default=False)
_TYPED = {  # option of Python: what the command line calls it, where it is more than dashes
    "num_context": "--context-length",
    "init": "--context-init",
    "source": "SOURCE",
    "path": "--out",
}


@contextlib.contextmanager
def as_typed() -> Iterator[None]:
    """Within it messages call options by the names of the command line."""
    token = _as_typed.set(True)
    try:
        yield
    finally:
        _as_typed.reset(token)


def option(name: str) -> str:
    """How the user knows an option of Python's: `test_fraction`, or in a command `--test-fraction`.

    Messages name options by this, so that either user can type what they read.
    """
    if not _as_typed.get():
        return name
    return _TYPED.get(name, "--" + name.replace("_", "-"))


def in_order(methods: Iterable[str]) -> list[str]:
    """Methods in the order of `METHODS`, and those of others behind them by name."""

    def place(name: str) -> tuple[int, str]:
        known = name in METHODS
        return METHODS.index(name) if known else len(METHODS), "" if known else name

    return sorted(methods, key=place)


def name_key(name: str) -> str:
    """`name` without case, double spaces, underscores and forms of the same letter."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().replace("_", " ").split())


def as_known(names: Sequence[str], known: Iterable[str]) -> dict[str, str]:
    """Those of `names` that are one of `known` but for what `name_key` passes over, and which.

    A name that is known as it is, or whose known form is among `names` as well, is left out.
    """
    of_key = {name_key(name): name for name in known}
    exact = set(of_key.values())
    found = {name: of_key.get(name_key(name)) for name in names if name not in exact}
    return {name: one for name, one in found.items() if one is not None and one not in names}


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean X?" or, where nothing is near, the first few choices."""
    choices = list(known)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    shown = ", ".join(name if name.isprintable() else ascii(name) for name in choices[:8])
    return f"; choices: {shown}" + (", ..." if len(choices) > 8 else "")


def pick(what: str, name: str, known: Iterable[str]) -> str:
    """`name`, or a ValueError if it is none of `known`."""
    choices = known if isinstance(known, Collection) else list(known)
    if name not in choices:
        raise ValueError(f"unknown {what} {name!r}{nearest(name, choices)}")
    return name


def index_of(name: str, class_names: Sequence[str]) -> int:
    """The place of the class called `name`, or a ValueError."""
    return list(class_names).index(pick("class", name, class_names))
