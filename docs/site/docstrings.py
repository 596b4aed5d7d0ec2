# SPDX-License-Identifier: Apache-2.0
"""The package's docstrings as reStructuredText: `name: text` as a list, indented lines as code."""

from __future__ import annotations

import re

FIELD = re.compile(r"((?:\w+(?:, | and ))*\w+): (.+)")
PLAIN = re.compile(r"[\\*|]|(?<=\w)_(?=\W|$)")
SECTIONS = ("Args:", "Returns:", "Raises:", "Yields:")
STRONG = ("Expected", "Cost", "Command")


def inline(text: str) -> str:
    """Words in backticks as code, everything else as it is."""
    parts = re.split(r"``?([^`]+)``?", text)
    out = ""
    for index, part in enumerate(parts):
        if index % 2:
            out += ("\\ " if out[-1:].isalnum() else "") + f"``{part}``"
        else:
            out += "\\ " if out.endswith("``") and part[:1].isalnum() else ""
            out += PLAIN.sub(lambda match: "\\" + match[0], part)
    return out


def as_rst(lines: list[str]) -> list[str]:
    """A docstring's lines: sections with a heading in bold, and what `_block` makes of the rest."""
    out: list[str] = []
    rest = list(lines)
    while rest:
        line = rest.pop(0)
        if line in SECTIONS:
            body = []
            while rest and (rest[0].startswith("    ") or not rest[0].strip()):
                body.append(rest.pop(0)[4:])
            out += ["", f"**{line[:-1]}**", "", *_block(body)]
        else:
            body = [line]
            while rest and rest[0] not in SECTIONS:
                body.append(rest.pop(0))
            out += _block(body)
    return out


def _block(lines: list[str]) -> list[str]:
    """`name: text` as an item of a list, which goes on in indented lines; others as code."""
    out: list[str] = []
    state = "text"
    for line in lines:
        field = FIELD.fullmatch(line)
        if not line.strip():
            state = "text"
            out.append("")
        elif field:
            out += [] if state == "field" else [""]
            out.append(f"* {_field(field)}")
            state = "field"
        elif line.startswith("    ") and state == "field":
            out.append(f"  {inline(line.strip())}")
        elif line.startswith("    "):
            out += [] if state == "code" else ["", "::", ""]
            out.append(line)
            state = "code"
        else:
            out += [] if state == "text" else [""]
            out.append(inline(line))
            state = "text"
    return [*out, ""]


def _field(field: re.Match[str]) -> str:
    name = f"**{field[1]}**" if field[1] in STRONG else f"``{field[1]}``"
    return f"{name}: {inline(field[2])}"
