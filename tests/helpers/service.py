# SPDX-License-Identifier: Apache-2.0
"""A small run as a service: in this process, as an ASGI call, and as a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from commands import environment
from pictures import colours, small_model
from PIL import Image

import vtclip
from vtclip.runs.classifier import Classifier

BOUNDARY = "vtclip-test"
HOST = "testserver"


class World:
    """A model, a folder of pictures of three classes, and runs of it by method."""

    def __init__(self, root: Path) -> None:
        self.root, self.images = root, colours(root / "images", 12, (20, 24))
        self.model = small_model(root / "model")

    def run(self, method: str, **options: Any) -> Path:
        out = self.root / method
        if not out.exists():
            usual = {"shots": 3, "device": "cpu", "threads": 1, "cache_dir": self.root / "cache"}
            vtclip.fit(self.images, method=method, model=str(self.model), out=out,
                       refit=False, **{**usual, **options})  # fmt: skip
        return out

    @property
    def paths(self) -> list[Path]:
        return sorted(self.images.glob("*/*.png"))


def predictor_of(folder: Path, unknown: float | None = None, **limits: Any) -> Any:
    from vtclip.serve.limits import Limits
    from vtclip.serve.predictor import Predictor

    classifier = Classifier.load(folder, device="cpu")
    return Predictor(folder, classifier, Limits(**{"timeout": 60.0, **limits}), unknown)


@contextlib.contextmanager
def client_of(predictor: Any, log: list[str] | None = None, **desk: Any) -> Iterator[Any]:
    """A client of the guarded application, which it calls in a loop of its own."""
    from starlette.testclient import TestClient

    from vtclip.serve.app import build_app
    from vtclip.serve.guard import Guard
    from vtclip.serve.work import Desk

    lines = [] if log is None else log
    app = Guard(build_app(predictor, Desk(**desk)), frozenset((HOST,)), lines.append)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def files(*images: tuple[str, bytes] | Path) -> list[tuple[str, tuple[str, bytes]]]:
    """For a client: pairs of name and bytes, or paths, as fields of a form."""
    pairs = [(one.name, one.read_bytes()) if isinstance(one, Path) else one for one in images]
    return [("images", pair) for pair in pairs]


def form(*images: tuple[str, bytes], field: str = "images") -> bytes:
    """The body of a form, with names exactly as they are."""
    body = b""
    for name, data in images:
        body += f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"; '.encode()
        body += b'filename="' + name.encode("utf-8", "surrogateescape") + b'"\r\n\r\n'
        body += data + b"\r\n"
    return body + f"--{BOUNDARY}--\r\n".encode()


FORM = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}


def picture(side: int, kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (side, side), "navy").save(data, format=kind)
    return data.getvalue()


def asgi(
    app: Any, path: str, pieces: Iterable[bytes], headers: dict[str, str], method: str = "POST"
) -> tuple[int, dict[str, str], bytes, int]:
    """Status, headers and body of one call, and how many pieces of the body were taken."""
    sent: list[dict[str, Any]] = []
    waiting, taken = iter([*pieces, None]), 0

    async def receive() -> dict[str, Any]:
        nonlocal taken
        piece = next(waiting)
        taken += piece is not None
        return {"type": "http.request", "body": piece or b"", "more_body": piece is not None}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    raw = [(b"host", HOST.encode()), *((a.encode(), b.encode()) for a, b in headers.items())]
    scope = {"type": "http", "method": method, "path": path, "raw_path": path.encode(),
             "query_string": b"", "headers": raw, "client": ("127.0.0.1", 1), "server": (HOST, 80),
             "http_version": "1.1", "scheme": "http", "root_path": ""}  # fmt: skip
    asyncio.run(app(scope, receive, send))
    got = {a.decode().lower(): b.decode() for a, b in sent[0]["headers"]}
    return sent[0]["status"], got, b"".join(one.get("body", b"") for one in sent[1:]), taken


class Process:
    """`vtclip serve` in a process of its own; `port` is its own choice."""

    def __init__(self, folder: Path, *words: str, log: Path) -> None:
        command = [sys.executable, "-m", "vtclip", "serve", str(folder), "--port", "0"]
        self.log = log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                [*command, "--device", "cpu", "--threads", "1", *words],
                stdout=subprocess.PIPE, stderr=errors, text=True, env=environment(),
            )  # fmt: skip
        start = time.monotonic()
        self.line = self.process.stdout.readline() if self.process.stdout else ""
        self.seconds = time.monotonic() - start
        if not self.line.startswith("http://127.0.0.1:"):
            raise RuntimeError(f"{self.line} {log.read_text()}")
        self.url = self.line.split()[0].rstrip("/")
        self.port = int(self.url.rpartition(":")[2])

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def stop(self, signum: int) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signum)
        status = self.process.wait(60)
        if self.process.stdout is not None:
            self.process.stdout.close()
        return status


def answer_of(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """Status and JSON of what comes until the other side closes or the body is there."""
    data = b""
    while piece := connection.recv(65536):
        data += piece
        head, _, body = data.partition(b"\r\n\r\n")
        if body.endswith(b"\n"):
            break
    return int(head.split()[1]), json.loads(body)
