# SPDX-License-Identifier: Apache-2.0
"""`vtclip serve` as a process: its address, slow and endless clients, signals, many at once."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from service import BOUNDARY, FORM, Process, World, answer_of, form

from vtclip.runs.classifier import Classifier

for needed in ("fastapi", "uvicorn", "python_multipart"):
    pytest.importorskip(needed, reason="the extra serve")

TIMEOUT = 5


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("process"))


@pytest.fixture(scope="module")
def service(world: World) -> Iterator[Process]:
    words = ("--max-upload", "1", "--timeout", str(TIMEOUT), "--unknown", "0")
    process = Process(world.run("takl"), *words, log=world.root / "log.txt")
    yield process
    assert process.stop(signal.SIGTERM) == 128 + signal.SIGTERM


def ask(service: Process, method: str, path: str, body: bytes = b"", **headers: str) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=60)
    connection.request(method, path, body or None, headers)
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


def post(service: Process, path: Path) -> Any:
    body = form((path.name, path.read_bytes()))
    kind = FORM["content-type"]
    return ask(service, "POST", "/api/predict?topk=3", body, **{"Content-Type": kind})


def test_the_line_says_where_and_what(service):
    assert service.line == (
        f"http://127.0.0.1:{service.port}/  run takl, takl of 3 classes, "
        f"model {ask(service, 'GET', '/health')[1]['model']}, cpu\n"
    )


def test_the_example_of_a_client_prints_what_the_classifier_says(service, world):
    script = Path(__file__).parents[2] / "docs" / "examples" / "ask_a_service.py"
    broken = world.root / "broken.png"
    broken.write_bytes(b"no image")
    words = [f"http://127.0.0.1:{service.port}", str(world.paths[0]), str(broken)]
    done = subprocess.run(
        [sys.executable, str(script), *words], capture_output=True, text=True, check=True
    )
    (((label, share),),) = Classifier.load(world.run("takl"), device="cpu").predict(
        [world.paths[0]], topk=1
    )
    first, second, third = done.stdout.splitlines()
    assert first == "takl: takl of 3 classes"
    assert second == f"{world.paths[0].name}: {label} ({100 * share:.1f} %)"
    assert third == "broken.png: not an image of a known format"


def test_eight_clients_at_once_get_what_the_classifier_says(service, world):
    classifier = Classifier.load(world.run("takl"), device="cpu")
    paths = [world.paths[number] for number in range(8)] * 3
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda path: post(service, path), paths))
    for path, (status, body) in zip(paths, found, strict=True):
        (entry,) = body["images"]
        shown = [tuple(one.values()) for one in entry["predictions"]]
        assert status == 200
        assert shown == classifier.predict(path, 3)


def test_answers_are_sent_without_delay():
    """Head and body are two writes: the second does not wait until the first is confirmed."""
    from vtclip.serve.server import bind

    with bind("127.0.0.1", 0) as bound:
        assert bound.proto == socket.IPPROTO_TCP


def test_a_body_of_unknown_length_is_bounded(service):
    with service.connect() as client:
        head = (
            f"POST /api/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: {FORM['content-type']}"
        )
        client.sendall(f"{head}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        piece = b"10000\r\n" + b"x" * 65536 + b"\r\n"
        for _ in range(17):  # one more than is allowed
            client.sendall(piece)
        status, body = answer_of(client)
    assert status == 413
    assert body == {"error": "the body has more than 1048576 bytes, the limit"}


def test_a_slow_body_is_given_up_and_others_are_answered_meanwhile(service, world):
    with service.connect() as client:
        head = (
            f"POST /api/predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: {FORM['content-type']}"
        )
        client.sendall(f"{head}\r\nContent-Length: 1000\r\n\r\n--{BOUNDARY}".encode())
        assert post(service, world.paths[0])[0] == 200
        status, body = answer_of(client)
    assert (status, body) == (408, {"error": "the body took more than 5 s, the limit"})


def test_headers_that_never_end_are_given_up(service):
    start = time.monotonic()
    with service.connect() as silent, service.connect() as slow:
        slow.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        assert [client.recv(100) for client in (silent, slow)] == [b"", b""]
    assert time.monotonic() - start < 4 * TIMEOUT


def test_another_name_of_this_machine_is_refused(service):
    status, body = ask(service, "GET", "/health", Host="evil.example:80")
    assert (status, list(body)) == (421, ["error"])


def test_what_is_no_http_is_refused_and_the_service_goes_on(service):
    for data in (b"\x16\x03\x01\x02\x00\r\n\r\n", b"GET " + b"x" * 200_000 + b" HTTP/1.1\r\n\r\n"):
        with service.connect() as client:
            client.sendall(data)
            assert client.recv(65536).startswith(b"HTTP/1.1 400 ")
    assert ask(service, "GET", "/health")[0] == 200
    said = service.log.read_text()
    assert "Traceback" not in said
    assert "WARNING" not in said
    assert all(line.isprintable() for line in said.splitlines())


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_quietly(world, tmp_path, signum):
    process = Process(world.run("takl"), "--unknown", "0", log=tmp_path / "log.txt")
    with process.connect() as open_one:
        open_one.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        start = time.monotonic()
        assert process.stop(signum) == 128 + signum
    assert time.monotonic() - start < 30
    last = "interrupted" if signum == signal.SIGINT else "terminated"
    assert (tmp_path / "log.txt").read_text() == f"{last}\n"
    with (
        pytest.raises(ConnectionRefusedError),
        socket.create_connection(("127.0.0.1", process.port)),
    ):
        pass
