# SPDX-License-Identifier: Apache-2.0
"""One-line changes of a source file, and which of them change no behaviour that a test may hold.

universalmutator proposes; what is dropped is counted by reason:
syntax       does not compile (Python)
text         equal but for comments, docstrings, annotations, the imports of type checkers, and
             the texts of errors, warnings and log lines
"""

from __future__ import annotations

import ast
import contextlib
import io
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

MISSING = "universalmutator is not installed: pip install --no-deps universalmutator"
RULES = {".py": ["universal.rules", "python.rules"], ".h": ["universal.rules", "c_like.rules"]}
RULES[".cpp"] = RULES[".h"]
JUMP = re.compile(r"\n\s*(break|continue);\n$")
SPEAKS = re.compile(r"(Error|Warning|Interrupted)$|^(warn|log|debug|info|warning|error|print)$")


class Change(NamedTuple):
    """Line `line`, counted from 1, becomes `after` (one line or two, with their ends)."""

    file: str
    line: int
    before: str
    after: str

    def applied(self, text: str) -> str:
        lines = text.splitlines(keepends=True)
        lines[self.line - 1] = self.after
        return "".join(lines)

    @property
    def shown(self) -> tuple[str, str]:
        before, after = ("; ".join(t.strip().splitlines()) for t in (self.before, self.after))
        return before, re.sub(r"\s*\n\s*", " ", after) or "(nothing)"


def proposals(path: Path, file: str) -> list[Change]:
    """What universalmutator proposes, in the order of the lines and of its rules."""
    try:
        from universalmutator import mutator
    except ImportError:
        raise SystemExit(MISSING) from None
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    with contextlib.redirect_stdout(io.StringIO()):
        found = mutator.mutants_regexp(lines, RULES[path.suffix], ignorePatterns=[])
    every = [Change(file, line, lines[line - 1], after) for line, after, *_ in found]
    return [c for c in every if path.suffix == ".py" or not _hopeless(c)]


def _hopeless(change: Change) -> bool:
    """Of C++, what hardly ever compiles: a jump put after a line, a line of several taken out, an
    operator in place of a pointer's star or a template's bracket, another number in a name."""
    before, after = change.before, change.after
    if JUMP.search(after):
        return True
    if after.lstrip().startswith("/*"):
        return not before.rstrip().endswith(";")
    place = next((i for i, (b, a) in enumerate(zip(before, after, strict=False)) if a != b), 0)
    here, left = before[place], before[place - 1] if place else " "
    if left in "<>" and before[place - 2] != " ":
        return True
    return (here in "*&<>" and left != " ") or (here.isdigit() and (left.isalpha() or left == "_"))


class Judge:
    """Why a change of one text is dropped; empty where it is worth a run of the tests."""

    def __init__(self, text: str, suffix: str) -> None:
        self.text = text
        self.meaning = python_meaning if suffix == ".py" else cpp_meaning
        self.original = self.meaning(text)

    def why_not(self, change: Change) -> str:
        try:
            changed = self.meaning(change.applied(self.text))
        except (SyntaxError, ValueError):
            return "syntax"
        return "text" if changed == self.original else ""


class _Silent(ast.NodeTransformer):
    """Takes out what only people and type checkers read."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self._body(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return self._body(node)

    def visit_Module(self, node: ast.Module) -> ast.AST:
        return self._body(node)

    def _body(self, node: ast.FunctionDef | ast.ClassDef | ast.Module) -> ast.AST:
        first = node.body[0] if node.body else None
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
            node.body[0] = ast.Pass()
        self.generic_visit(node)
        return node

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        node.annotation = ast.Constant(None)
        self.generic_visit(node)
        return node

    def visit_If(self, node: ast.If) -> ast.AST:
        if ast.unparse(node.test) == "TYPE_CHECKING":
            return ast.Pass()
        self.generic_visit(node)
        return node

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return _Mute().visit(self.generic_visit(node))

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        name = ast.unparse(node.func).rpartition(".")[2]
        return _Mute().visit(node) if SPEAKS.search(name) else node


class _Mute(ast.NodeTransformer):
    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        return ast.Constant("") if isinstance(node.value, str) else node

    def visit_JoinedStr(self, node: ast.JoinedStr) -> ast.AST:
        return ast.Constant("")


class _Used(ast.NodeTransformer):
    """Takes out names that are imported and not used: those of annotations."""

    def __init__(self, tree: ast.AST) -> None:
        nodes = list(ast.walk(tree))
        self.names = {node.id for node in nodes if isinstance(node, ast.Name)}
        # __all__ hands names on
        self.names |= {n.value for n in nodes if isinstance(n, ast.Constant) and n.value}

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        node.names = [a for a in node.names if a.asname or a.name in self.names]
        return node if node.names else ast.Pass()


def python_meaning(text: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compile(text, "changed", "exec", dont_inherit=True)  # a break outside a loop parses
        tree = _Silent().visit(ast.parse(text))
        tree = _Used(tree).visit(tree)
    for node in ast.walk(tree):
        if isinstance(getattr(node, "body", None), list):
            node.body = [one for one in node.body if not isinstance(one, ast.Pass)]
    return ast.dump(tree)


def cpp_meaning(text: str) -> str:
    """Without comments, the inside of strings, and space."""
    token = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\s+', re.DOTALL)
    put: Callable[[re.Match[str]], str] = lambda m: '""' if m[0][0] == '"' else " "  # noqa: E731
    return re.sub(r"\s+", " ", token.sub(put, text))
