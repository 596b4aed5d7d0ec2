# SPDX-License-Identifier: Apache-2.0
"""README and docs/ say what the code and the committed results say."""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vtclip import ops
from vtclip.cli import COMMANDS, build_parser
from vtclip.environment import VARIABLES

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(
    [*ROOT.glob("*.md"), *DOCS.glob("*.md"), ROOT / "kernels" / "README.md"], key=lambda p: p.name
)
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def words(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def anchors(text: str) -> set[str]:
    """Anchors of a page's headings, as sites of Markdown make them."""
    plain = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", plain, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_the_readme_is_short_and_its_operators_run():
    assert len(README.splitlines()) <= 120
    (example,) = re.findall(r"```python\n(import torch\n.*?)```", README, re.DOTALL)
    scope: dict[str, object] = {}
    exec(compile(example, "README.md", "exec"), scope)
    assert scope["query"].grad.shape == (1, 8, 100, 128)
    assert scope["maps"].shape == (32, 8, 100, 49)


def test_the_speed_table_is_the_one_made_from_the_results():
    script = ROOT / "benchmarks" / "table.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() in words("benchmarks.md")


def test_the_readmes_figures_are_those_of_the_tables():
    rows = ("1.60x forward, 1.81x with gradients", "1.83x / 1.02x", "3.86x per")
    assert all(row in README for row in rows)
    table = words("benchmarks.md")
    assert "| sdpa, query expanded | 1.60x / 1.81x |" in table
    assert "| nn.TransformerDecoderLayer | 2.03x / 1.83x |" in table
    assert "| shared in plain torch | 1.11x / 1.02x |" in table
    assert "| released layer | 5.18x / 3.86x |" in table


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings_that_are_there(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    broken = []
    for target in LINK.findall(text):
        address, _, anchor = target.partition("#")
        if "://" in address or address.startswith(("mailto:", "generated/")):
            continue
        path = (page.parent / address).resolve() if address else page
        there = path.exists()
        if there and anchor and path.suffix == ".md":
            there = anchor in anchors(path.read_text("utf-8"))
        broken += [] if there else [target]
    assert not broken


def test_the_readmes_count_of_faults_is_that_of_the_catalogue():
    (row,) = re.findall(r"^\| all \| (\d+) \| (\d+) \| (\d+) \|", words("reliability.md"), re.M)
    rows, proved, part = row
    sentence = (
        f"{rows} ways to fail are catalogued, {proved} of them proved by tests and {part} in part"
    )
    assert sentence in README


def test_every_operator_has_a_row():
    table = words("operators.md")
    for name in ops.__all__:
        if name.islower():
            assert re.search(rf"^\| .*`{name}`.* \|", table, re.MULTILINE), name


def test_every_page_is_on_the_site():
    listed = re.findall(r"```\{toctree\}.*?```", words("index.md"), re.DOTALL)
    names = {line for block in listed for line in block.splitlines() if re.fullmatch(r"\w+", line)}
    assert names == {path.stem for path in DOCS.glob("*.md")} - {"index"}


def parsers() -> dict[str, argparse.ArgumentParser]:
    (commands,) = (
        action
        for action in build_parser()._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    return dict(commands.choices)


def test_every_argument_of_every_command_has_a_help():
    silent = [
        f"{name} {action.option_strings or action.dest}"
        for name, parser in parsers().items()
        for action in parser._actions
        if not action.help
    ]
    assert not silent
    assert [name for name, _, _ in COMMANDS] == list(parsers())


def test_options_that_pages_name_exist():
    """Options in the commands of code blocks; programs other than vtclip have their own."""
    known = {name: {*parser._option_string_actions} for name, parser in parsers().items()}
    strange = []
    for page in PAGES:
        for block in re.findall(r"```\n(.*?)```", page.read_text("utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                for name, rest in re.findall(r"(?:^|&& |-m )vtclip (\w+)([^#&]*)", line):
                    used = re.findall(r"(?<=\s)--[a-z][\w-]*", rest)
                    strange += [f"{page.name}: {o}" for o in used if o not in known.get(name, used)]
    assert not strange


def test_words_of_the_page_of_troubles_are_in_the_code():
    symptoms = re.findall(r"^\| (.+?) \| .+? \| .+? \|$", words("troubles.md"), re.MULTILINE)
    quoted = [text for symptom in symptoms for text in re.findall(r"`([^`]+)`", symptom)]
    quoted = [text for text in quoted if " " in text]
    sources = [ROOT / "setup.py", *(ROOT / "vtclip").rglob("*.py")]
    code = "\n".join(path.read_text("utf-8") for path in sources)
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # texts go on in the next line
    code = re.sub(r"\{[^{}]*\}", "@", code)
    for text in quoted:
        shown = re.sub(r"8\.0 9\.0|8\.[06]|cuda(?= cannot)", "@", text)
        assert shown in code or text in code, text
    assert len(quoted) > 8


def test_the_page_of_troubles_lists_the_variables():
    table = words("troubles.md").split("## Environment variables")[1]
    listed = set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE))
    own = {name for name in VARIABLES if name.startswith("VTCLIP_")}
    assert own | {"VTCLIP_EXT", "TRITON_INTERPRET"} <= listed
