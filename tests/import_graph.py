# SPDX-License-Identifier: Apache-2.0
"""The imports of the package as a graph of rooms: the folders and files directly below `vtclip/`.

`python tests/import_graph.py [CHECKOUT]` prints rooms, floors, arrows and cycles.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
OUTSIDE = {"__init__", "__main__"}  # the package's face; it imports everything when asked


class ImportGraph:
    """`imports[a]` holds the modules of the package that module `a` imports, at any depth of code.

    Relative imports are resolved, and an import inside a function counts as one at the top.
    """

    def __init__(self, root: Path = ROOT) -> None:
        found = {_module(path.relative_to(root)): path for path in (root / "vtclip").rglob("*.py")}
        found |= {f"vtclip.kernels.{path.stem}": path for path in (root / "kernels").glob("*.py")}
        self.paths = dict(sorted(found.items()))
        self.imports = {
            module: set(self._resolved(module, path)) - {module}
            for module, path in self.paths.items()
        }

    def _resolved(self, module: str, path: Path) -> Iterator[str]:
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for name in imported_names(path, package):
            while name and name not in self.paths:
                name = name.rpartition(".")[0]
            if name:
                yield name

    @functools.cached_property
    def rooms(self) -> dict[str, set[str]]:
        """For each room the other rooms it imports."""
        graph: dict[str, set[str]] = {}
        for module, targets in self.imports.items():
            if room(module) not in OUTSIDE:
                others = {room(target) for target in targets} - OUTSIDE - {room(module)}
                graph.setdefault(room(module), set()).update(others)
        return graph

    def floors(self) -> dict[str, int]:
        """The floor of each room: 1 + that of the highest room it imports. Without cycles only."""

        @functools.cache
        def floor(name: str) -> int:
            return 1 + max((floor(other) for other in self.rooms[name]), default=0)

        return {name: floor(name) for name in self.rooms}


def imported_names(path: Path, package: str = "") -> Iterator[str]:
    """The dotted names that a file imports; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")
            above = ".".join(parents[: len(parents) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, (above, node.module)))
            yield from (f"{base}.{alias.name}" for alias in node.names)


def room(module: str) -> str:
    """The folder or file below `vtclip/` in which a module lies."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def _module(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of names that reach each other."""
    reach = {start: _reachable(graph, start) for start in graph}
    groups = {tuple(sorted(b for b in reach[a] if a in reach[b])) for a in graph if a in reach[a]}
    return [list(group) for group in sorted(groups)]


def _reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [*graph[start]]
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            waiting += graph[name]
    return seen


def main(root: Path) -> None:
    graph = ImportGraph(root)
    arrows = sum(len(targets) for targets in graph.rooms.values())
    groups = cycles(graph.rooms)
    lines = [f"{len(graph.rooms)} rooms, {arrows} arrows, {len(groups)} cycles"]
    lines += [f"cycle: {', '.join(cycle)}" for cycle in groups]
    if not groups:
        floors = graph.floors()
        for floor in range(max(floors.values()), 0, -1):
            lines.append(f"{floor}: {', '.join(n for n in sorted(floors) if floors[n] == floor)}")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
