# SPDX-License-Identifier: Apache-2.0
"""A table of built-in things under their names, and of those that others add to it. No torch."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.metadata import EntryPoint
from typing import TypeVar

logger = logging.getLogger(__name__)
METHODS, DATA_SETS = "vtclip.methods", "vtclip.data_sets"  # groups of entry points
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,63}")  # fit for a list with commas and a folder
RESERVED = ("all", "test", "none")
T = TypeVar("T")

# group -> name -> what was registered in this process
_registered: dict[str, dict[str, object]] = {METHODS: {}, DATA_SETS: {}}


def names_beside(group: str) -> list[str]:
    """The names in `group` that are not built in, without importing what they stand for."""
    return list(dict.fromkeys([*_registered[group], *installed(group)]))


def installed(group: str) -> Mapping[str, EntryPoint]:
    """The entry points of the installed distributions, by name; of two of one name the first."""
    return _installed(group, tuple(sys.path))


@functools.cache
def _installed(group: str, path: tuple[str, ...]) -> Mapping[str, EntryPoint]:
    del path  # of which the answer is
    found: dict[str, EntryPoint] = {}
    for point in importlib.metadata.entry_points(group=group):
        other = found.setdefault(point.name, point)
        if other != point:
            logger.warning(
                "%s %r of %s is that of %s already", group, point.name, _whose(point), _whose(other)
            )
    return found


def _whose(point: EntryPoint) -> str:
    return "an unknown distribution" if point.dist is None else named(point.dist)


def named(dist: importlib.metadata.Distribution) -> str:
    return f"{dist.metadata['Name']} {dist.version}"


class Registry(Mapping[str, T]):
    """Built-in values by name, those registered in this process, and those of entry points.

    `name in registry` and `registry[name]` import nothing of others for a built-in name; going
    through all of it imports every distribution that has a name in `group`. What cannot be used is
    left out there with one warning, and is a ValueError where it is asked for by name.

    what: what the values are called in messages. check: takes a name and the object of an entry
    point or a registration and returns the value, or raises a TypeError or ValueError in one line.
    """

    def __init__(self, what: str, group: str, check: Callable[[str, object], T]) -> None:
        self.what, self.group, self.check = what, group, check
        self.builtin: dict[str, T] = {}
        self._added: dict[str, T] = {}
        self._loaded: dict[EntryPoint, T | ValueError] = {}

    def __getitem__(self, name: str) -> T:
        for known in (self.builtin, self._added):
            if name in known:
                return known[name]
        point = installed(self.group).get(name)
        if point is None:
            raise KeyError(name)
        found = self._load(point)
        if isinstance(found, ValueError):
            raise found
        return found

    def _load(self, point: EntryPoint) -> T | ValueError:
        if point not in self._loaded:
            try:
                self._loaded[point] = self.check(point.name, point.load())
            except Exception as error:  # another's code may raise anything
                fault = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                self._loaded[point] = ValueError(
                    f"{self.what} {point.name!r} of {_whose(point)} cannot be used: {fault}"
                )
        return self._loaded[point]

    def __contains__(self, name: object) -> bool:
        if name in self.builtin or name in self._added:
            return True
        return isinstance(name, str) and name in installed(self.group)

    def __iter__(self) -> Iterator[str]:
        yield from self.builtin
        yield from self._added
        for name, point in installed(self.group).items():
            if name in self.builtin or name in self._added:
                continue
            known = point in self._loaded
            found = self._load(point)
            if not isinstance(found, ValueError):
                yield name
            elif not known:
                logger.warning("%s", found)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @property
    def names(self) -> list[str]:
        """All names, without importing what those of entry points stand for."""
        return list(dict.fromkeys([*self.builtin, *self._added, *installed(self.group)]))

    def add(self, name: str, value: object, *, replace: bool, taken: Iterable[str] = ()) -> T:
        """Put `value` under a name of its own; `replace`: of one that was added here before.

        taken: other names that are in use.
        """
        if not isinstance(name, str):
            raise TypeError(f"{self.what}: name must be a str, got {type(name).__name__}")
        if not NAME.fullmatch(name) or name in RESERVED:
            raise ValueError(
                f"{self.what}: name must be letters, digits and . _ + - and none of "
                f"{', '.join(RESERVED)}, got {name!a}"
            )
        again = replace and name in self._added
        if not again and (name in self or name in taken):
            raise ValueError(f"{self.what} {name!r} is there already{self._by(name)}")
        checked = self.check(name, value)
        self._added[name] = checked
        _registered[self.group][name] = checked
        return checked

    def _by(self, name: str) -> str:
        if name in self._added:
            return ", registered before; replace=True puts the new one in its place"
        point = installed(self.group).get(name)
        return "" if point is None or name in self.builtin else f", of {_whose(point)}"

    def remove(self, name: str) -> None:
        """Take back what was added in this process; a ValueError for any other name."""
        if name not in self._added:
            raise ValueError(f"{self.what} {name!r} was not registered in this process")
        del self._added[name], _registered[self.group][name]

    def origin(self, name: str, module: str) -> dict[str, str | None] | None:
        """Distribution, version and module of what is not built in; None of what is.

        module: of the value. Without a distribution the version is the module's `__version__`.
        """
        if name in self.builtin:
            return None
        point = None if name in self._added else installed(self.group).get(name)
        if point is not None and point.dist is not None:
            dist = point.dist
            return {"distribution": dist.metadata["Name"], "version": dist.version,
                    "module": point.module}  # fmt: skip
        top = module.partition(".")[0]
        of_module = importlib.metadata.packages_distributions().get(top, [])
        if of_module:
            version = importlib.metadata.version(of_module[0])
            return {"distribution": of_module[0], "version": version, "module": module}
        said = getattr(sys.modules.get(top), "__version__", None)
        return {"distribution": None, "version": said if isinstance(said, str) else None,
                "module": module}  # fmt: skip


def missing_line(what: str, name: str, origin: object) -> str:
    """What to do where `name`, of the recorded origin, is not here."""
    source = origin if isinstance(origin, Mapping) else {}
    texts = {key: value for key in ("distribution", "version", "module")
             if isinstance(value := source.get(key), str) and value}  # fmt: skip
    version = f" {texts['version']}" if "version" in texts else ""
    if "distribution" in texts:
        return (
            f"{what} {name!r} is of the package {texts['distribution']}{version}, "
            "which is not installed here"
        )
    module = texts.get("module", "its module")
    return (
        f"{what} {name!r} was registered by the module {module}{version}, "
        "which has not registered it here"
    )
