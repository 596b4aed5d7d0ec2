# SPDX-License-Identifier: Apache-2.0
"""Pages and tables of the site that are written from the code: commands, reference, data sets."""

from __future__ import annotations

import argparse
import functools
import posixpath
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import vtclip
from vtclip import heads, names, ops
from vtclip.cli import COMMANDS, build_parser
from vtclip.data.sets.table import SETS

ROOT = Path(__file__).resolve().parents[2]
FOLDER = "generated"
COPIED = {  # page of the site -> file of the repository
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "security.md": "SECURITY.md",
    "kernels.md": "kernels/README.md",
    "demo.md": "vtclip/demo/README.md",
}
MODULES = ("ops", "heads", "testing", "nn", "sklearn")
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def generated() -> dict[str, str]:
    """Page -> its Markdown, of all that lies in docs/generated while the site is built."""
    copied = {page: (ROOT / source).read_text("utf-8") for page, source in COPIED.items()}
    return {
        **copied,
        "commands.md": commands(),
        "ops.md": reference("vtclip.ops", ops.__all__, "Operators: reference"),
        "heads.md": reference("vtclip.heads", head_names(), "Heads: reference"),
        "python.md": reference("vtclip", python_names(), "Python: reference"),
    }


@functools.cache
def tables() -> dict[str, str]:
    """Mark in a page -> what stands there."""
    return {"DATA_SETS": data_sets()}


def python_names() -> list[str]:
    """Public names of the package that are no modules."""
    return [name for name in vtclip.__all__ if name not in ("__version__", *MODULES)]


def head_names() -> list[str]:
    """The classes of the methods, in the order of `names.METHODS`."""
    return list(dict.fromkeys(heads.HEADS[name].__name__ for name in names.METHODS))


def reference(module: str, public: Sequence[str], title: str) -> str:
    """A page that autodoc fills from the docstrings of `public`."""
    lines = [f"# {title}", ""]
    for name in public:
        value = getattr(__import__(module, fromlist=[name]), name)
        kind = "class" if isinstance(value, type) else "function"
        lines += [f"## {name}", "", "```{eval-rst}", f".. auto{kind}:: {module}.{name}"]
        lines += ["   :members:"] * (kind == "class" and module == "vtclip") + ["```", ""]
    return "\n".join(lines)


def commands() -> str:
    """Every command with its options, by their groups."""
    parser = build_parser()
    (subparsers,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    lines = ["# Commands", "", "`vtclip COMMAND --help` prints the same.", ""]
    lines += ["| command | what it does |", "| --- | --- |"]
    lines += [f"| [`{name}`](#{name}) | {summary} |" for name, _, summary in COMMANDS]
    status = "../run_files.md#exit-status-of-every-command"
    lines += ["", f"Exit status: [results and files]({status}).", ""]
    for name, _, summary in COMMANDS:
        lines += [f"## {name}", "", f"{summary[0].upper()}{summary[1:]}.", ""]
        lines += _options(subparsers.choices[name])
    return "\n".join(lines)


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The tables of a command's options."""
    for group in parser._action_groups:
        shown = [a for a in group._group_actions if a.help != argparse.SUPPRESS]
        shown = [action for action in shown if "--help" not in action.option_strings]
        if not shown:
            continue
        title = {"positional arguments": "arguments"}.get(group.title or "", group.title)
        yield from (f"| {title} | |", "| --- | --- |")
        formatter = parser._get_formatter()
        for action in shown:
            name = formatter._format_action_invocation(action).replace("|", "\\|")
            text = formatter._expand_help(action) if action.help else ""
            yield f"| `{name}` | {_cell(text)} |"
        yield ""


def _cell(text: str) -> str:
    """Text that is shown as it is in a cell of a Markdown table."""
    return re.sub(r"([|*_<>{}\[\]])", r"\\\1", text)


def data_sets() -> str:
    """The table of data sets."""
    lines = ["| name | classes | train / val / test images | folder | template |"]
    lines += ["| --- | ---: | --- | --- | --- |"]
    for name, spec in SETS.items():
        counts = " / ".join("-" if count is None else f"{count:,}" for count in spec.counts)
        template = _cell(spec.template)
        lines += [f"| `{name}` | {spec.classes} | {counts} | `{spec.folder}` | {template} |"]
    return "\n".join(lines)


def with_links(text: str, page: str) -> str:
    """The Markdown of a page (`own_images.md`, `generated/security.md`) with links of the site.

    In the files a link leads to a file of the repository. What is a page of the site becomes a
    link to it, any other file its name.
    """
    own = page.removeprefix(f"{FOLDER}/")
    source = COPIED.get(own, f"docs/{page}") if page.startswith(FOLDER) else f"docs/{page}"
    return LINK.sub(lambda link: _link(link, source, page), text)


def _link(link: re.Match[str], source: str, page: str) -> str:
    text, target = link.groups()
    address, mark, anchor = target.partition("#")
    if not address or "://" in address or address.startswith("mailto:"):
        return link[0]
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), address))
    copied = {file: f"{FOLDER}/{name}" for name, file in COPIED.items()}
    found = copied.get(path)
    if found is None and path.startswith("docs/") and path.endswith((".md", ".ipynb")):
        found = path.removeprefix("docs/")
    if found is not None:
        return f"[{text}]({posixpath.relpath(found, posixpath.dirname(page) or '.')}{mark}{anchor})"
    if not (ROOT / path).exists():
        return link[0]  # the build refuses it
    return text if path in text or Path(path).name in text else f"{text} (`{path}`)"
