# SPDX-License-Identifier: Apache-2.0
"""The files of the page, and a description of the endpoints without scripts."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from importlib.resources import files

from vtclip.files import Json

FILES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "app.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}


def read_page(name: str) -> bytes:
    """A file of page/, by a name of FILES."""
    return (files("vtclip.serve") / "page" / name).read_bytes()


def describe(openapi: Json) -> str:
    """The endpoints of an OpenAPI document as HTML."""
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<title>Endpoints - vtclip serve</title>"
        '<link rel="icon" href="/page/icon.svg" type="image/svg+xml">'
        '<link rel="stylesheet" href="/page/style.css"></head><body><main>'
        f"<h1>Endpoints of {escape(openapi['info']['title'])} {escape(openapi['info']['version'])}"
        '</h1><p>As an OpenAPI document, with every answer: <a href="/api/openapi.json">'
        '/api/openapi.json</a>. The page: <a href="/">/</a>.</p>'
    )
    return head + "".join(_operations(openapi)) + "</main></body></html>\n"


def _operations(openapi: Json) -> Iterator[str]:
    for path, methods in openapi["paths"].items():
        for method, about in methods.items():
            yield f"<h2><code>{escape(method.upper())} {escape(path)}</code></h2>"
            yield f"<p>{escape(about.get('description', ''))}</p>"
            rows = [_row(one) for one in about.get("parameters", ())]
            if rows:
                yield '<div class="scroll" tabindex="0" role="group" aria-label="Parameters">'
                yield "<table><thead><tr><th>Parameter<th>Default<th>What</thead><tbody>"
                yield from rows
                yield "</tbody></table></div>"
            body = about.get("requestBody")
            for kind in body["content"] if body else ():
                yield f"<p>Body: {escape(kind)}, field <code>images</code>.</p>"
            statuses = ", ".join(escape(str(status)) for status in about["responses"])
            yield f"<p>Status: {statuses}.</p>"


def _row(parameter: Json) -> str:
    cells = (
        f"<code>{escape(parameter['name'])}</code>",
        escape(str(parameter.get("schema", {}).get("default", ""))),
        escape(parameter.get("description", "")),
    )
    return f"<tr><td>{'<td>'.join(cells)}"
