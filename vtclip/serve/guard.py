# SPDX-License-Identifier: Apache-2.0
"""Around every request: who may send it, headers of every answer, one line of log, no traceback."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from vtclip.files import printable
from vtclip.serve.limits import Refusal

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

LOCAL = frozenset(("localhost", "127.0.0.1", "::1"))
SAID = "vtclip.said"  # in a scope: what the line of log says of the request beyond its path
LOGGED = 200  # letters of a path or of what is said
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "x-frame-options": "DENY",
    "cache-control": "no-store",
}


def error_body(line: str) -> bytes:
    """One line of JSON in ASCII."""
    return json.dumps({"error": printable(line)}).encode("ascii") + b"\n"


class Guard:
    """An ASGI application around `app`.

    hosts: names by which the service may be called, in lower case; None allows every name.
    log: takes one line per request.
    """

    def __init__(self, app: App, hosts: Collection[str] | None, log: Callable[[str], None]) -> None:
        self._app, self._hosts, self._log = app, hosts, log

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        start, status = time.monotonic(), 0
        said: list[str] = scope.setdefault(SAID, [])

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = _with_headers(message.get("headers", ()))
            await send(message)

        try:
            _check_sender(scope, self._hosts)
            await self._app(scope, receive, sent)
        except Refusal as refusal:
            said.append(refusal.line)
            await _answer(sent, refusal.status, refusal.line)
        except Exception as error:
            said.append(_in_one_line(error))
            if not status:
                await _answer(sent, 500, "internal error")
        milliseconds = round(1000 * (time.monotonic() - start))
        client = (scope.get("client") or ("-",))[0]
        words = [client, scope["method"], _short(scope["path"]), str(status), f"{milliseconds} ms"]
        self._log(" ".join(words) + "".join(f"; {_short(one)}" for one in said))


def _with_headers(headers: Any) -> list[tuple[bytes, bytes]]:
    """The headers of an answer, with those of HEADERS that it does not set itself."""
    own = list(headers)
    names = {name.lower() for name, _ in own}
    more = ((name.encode("ascii"), value.encode("ascii")) for name, value in HEADERS.items())
    return own + [pair for pair in more if pair[0] not in names]


def _check_sender(scope: Message, hosts: Collection[str] | None) -> None:
    """Refuse another name than the service's, and what another site's page sends.

    A page of another site can have its own name resolve to this machine, and can send forms
    anywhere; either shows in a header that no page can change.
    """
    headers: dict[bytes, list[bytes]] = {}
    for name, value in scope["headers"]:
        headers.setdefault(name.lower(), []).append(value)
    if len(headers.get(b"host", ())) != 1:
        raise Refusal(400, "a request has one Host header")
    host = headers[b"host"][0].decode("latin-1").lower()
    if hosts is not None and _name_of(host) not in hosts:
        raise Refusal(421, f"Host {_short(host)!r} is not a name of this service")
    if scope["method"] in ("GET", "HEAD"):
        return
    cross = b"cross-site" in headers.get(b"sec-fetch-site", ())
    if cross or any(_place_of(origin) != host for origin in headers.get(b"origin", ())):
        raise Refusal(403, "the request comes from a page of another site")


def _name_of(host: str) -> str:
    """The name in a Host header: without its port, an IPv6 address without its brackets."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _place_of(origin: bytes) -> str:
    """Name and port of an Origin header; of "null" nothing, which is no Host."""
    try:
        return urlsplit(origin.decode("latin-1").lower()).netloc
    except ValueError:
        return ""


async def _answer(send: Send, status: int, line: str) -> None:
    body = error_body(line)
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _in_one_line(error: Exception) -> str:
    """Kind, message and place of an error that is nobody's input; for the log alone."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:LOGGED] + place


def _short(text: str) -> str:
    shown = printable(text)
    return shown if len(shown) <= 2 * LOGGED else shown[: 2 * LOGGED] + "..."
