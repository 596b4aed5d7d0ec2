# SPDX-License-Identifier: Apache-2.0
"""The documentation site, by Sphinx: `python docs/serve.py` builds it and serves it."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE / "site")]
import docstrings  # noqa: E402
import pages  # noqa: E402

import vtclip  # noqa: E402

project = "vtclip"
author = "the vtclip developers"
version = release = vtclip.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx_copybutton"]
exclude_patterns = ["site", "examples/*.py"]
highlight_language = "text"
html_theme = "furo"
copyright = "the vtclip developers, Apache-2.0"
html_title = f"vtclip {release}"
html_static_path = ["site/static"]
html_css_files = ["site.css"]
html_show_sphinx = False
smartquotes = False  # options begin with two hyphens
html_copy_source = False
myst_heading_anchors = 4
myst_links_external_new_tab = False
nb_execution_mode = "off"  # they are kept executed; tests/examples runs them
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_preserve_defaults = True
maximum_signature_line_length = 88
python_use_unqualified_type_names = True
copybutton_prompt_text = r"\$ |>>> "
copybutton_prompt_is_regexp = True


def write_generated(app: Any) -> None:
    """Writes what the code says into docs/generated, which git ignores."""
    folder = HERE / pages.FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, text in pages.generated().items():
        (folder / name).write_text(text, encoding="utf-8")


def read_page(app: Any, name: str, source: list[str]) -> None:
    """Links of the repository become those of the site; marks become tables."""
    if not (HERE / f"{name}.md").is_file():
        return
    text = pages.with_links(source[0], f"{name}.md")
    for mark, table in pages.tables().items():
        text = text.replace(f"\n{mark}\n", f"\n{table}\n")
    source[0] = text


def read_docstring(
    app: Any, what: str, name: str, item: Any, options: Any, lines: list[str]
) -> None:
    lines[:] = docstrings.as_rst(list(lines))


def setup(app: Any) -> None:
    app.connect("builder-inited", write_generated)
    app.connect("source-read", read_page)
    app.connect("autodoc-process-docstring", read_docstring)
