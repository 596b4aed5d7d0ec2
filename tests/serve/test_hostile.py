# SPDX-License-Identifier: Apache-2.0
"""Requests that somebody made to harm: sizes, times, names, hosts, pages of other sites."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from service import BOUNDARY, FORM, World, asgi, client_of, files, form, picture, predictor_of

for needed in ("fastapi", "uvicorn", "python_multipart", "httpx"):
    pytest.importorskip(needed, reason="the extra serve, and httpx for its test client")

LIMITS = {"max_upload": 20_000, "max_images": 3, "max_pixels": 64 * 64}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("hostile"))


@pytest.fixture
def predictor(world: World) -> Any:
    return predictor_of(world.run("takl"), **LIMITS)


@pytest.fixture
def client(predictor: Any) -> Iterator[Any]:
    with client_of(predictor) as client:
        yield client


def guarded(predictor: Any, log: list[str], hosts: Any = None) -> Any:
    from vtclip.serve.app import build_app
    from vtclip.serve.guard import Guard

    return Guard(build_app(predictor), hosts, log.append)


def test_a_body_is_bounded_while_it_is_read(predictor):
    log: list[str] = []
    pieces = [b"x" * 1000] * 100
    status, headers, body, taken = asgi(guarded(predictor, log), "/api/predict", pieces, FORM)
    assert (status, taken) == (413, 21)
    assert json.loads(body) == {"error": "the body has more than 20000 bytes, the limit"}
    assert headers["x-content-type-options"] == "nosniff"
    announced = {**FORM, "content-length": "100000"}
    status, _, _, taken = asgi(guarded(predictor, log), "/api/predict", pieces, announced)
    assert (status, taken) == (413, 0)
    assert [line.split(";")[0].split()[3] for line in log] == ["413", "413"]


def test_too_many_images_and_other_fields_are_refused(client, world):
    small = ("a.png", picture(8))
    assert client.post("/api/predict", files=files(*[small] * 3)).status_code == 200
    answer = client.post("/api/predict", files=files(*[small] * 4))
    assert answer.status_code == 413
    assert answer.json()["error"] == "more than 3 images in one request, the limit"
    answer = client.post("/api/predict", files=[("path\n", small)])
    assert answer.status_code == 422
    assert "are in fields called 'images'" in answer.json()["error"]


def test_pixels_are_bounded_by_the_header_alone(client, monkeypatch):
    from vtclip.serve import predictor as module

    decoded: list[str] = []
    real = module.decode

    def counted(data: bytes, name: str) -> Any:
        decoded.append(name)
        return real(data, name)

    monkeypatch.setattr(module, "decode", counted)
    sent = files(
        ("small.png", picture(64)), ("large.png", picture(65)), ("large.jpg", picture(99, "JPEG"))
    )
    small, png, jpeg = client.post("/api/predict", files=sent).json()["images"]
    assert "predictions" in small
    assert png["error"] == "65 x 65 is more than 4096 pixels"
    assert jpeg["error"] == "99 x 99 is more than 4096 pixels"
    assert decoded == ["small.png"]


def test_what_costs_more_than_it_weighs_is_not_opened(client):
    photo = picture(16, "JPEG")
    start = photo.index(b"\xff\xda")
    scan = photo[start : start + 14] + b"\0\0"
    costly = photo[:start] + scan * 120 + photo[start:]
    (entry,) = client.post("/api/predict", files=files(("a.jpg", costly))).json()["images"]
    assert entry["error"] == "too costly to decode: 121 scans, the limit at its size is 100"


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"", "multipart/form-data; boundary=x", 400),
        (b"x" * 500, "multipart/form-data; boundary=x", 400),
        (b"--x--\r\n", "multipart/form-data; boundary=x", 422),
        (form(("a.png", b"1"))[:-9], FORM["content-type"], 400),
        (form(("a.png", b"1")), "multipart/form-data", 415),
        (form(("a.png", b"1")), "application/json", 415),
        (b"images=1", "application/x-www-form-urlencoded", 415),
        (b"--x\r\n" + b"a: b\r\n" * 1000, "multipart/form-data; boundary=x", 400),
        (b"--x\r\nno-name: 1\r\n\r\n1\r\n--x--\r\n", "multipart/form-data; boundary=x", 422),
        (b"{}", None, 415),
    ],
)
def test_a_body_that_is_no_form_is_one_line(predictor, body, kind, status):
    log: list[str] = []
    headers = {} if kind is None else {"content-type": kind}
    for path in ("/api/predict", "/api/batch", "/api/explain"):
        got, _, said, _ = asgi(guarded(predictor, log), path, [body], headers)
        assert got == status, said
        assert list(json.loads(said)) == ["error"]
        assert said.count(b"\n") == 1


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("/etc/passwd", "/etc/passwd"),
        ("../../../etc/passwd", "../../../etc/passwd"),
        ("C:\\x.png", "x.png"),  # a browser of old sent the whole path
        ("a\u202eb.png", "a\u202eb.png"),
        ("\udcff.png", "\udcff.png"),
        ("", "image 1"),
        ("x" * 500, "x" * 255),
    ],
)
def test_a_name_is_a_name_and_opens_nothing(predictor, monkeypatch, name, shown):
    from vtclip.data import decode

    monkeypatch.setattr(decode, "read_file", None)  # whoever opens a path fails
    log: list[str] = []
    body = form((name, picture(8)), ("b.png", b""))
    status, _, said, _ = asgi(guarded(predictor, log), "/api/predict", [body], FORM)
    first, second = json.loads(said)["images"]
    assert (status, first["image"]) == (200, shown)
    assert first["predictions"]
    assert second["error"] == "the file is empty"
    assert said.isascii()
    assert all(line.isprintable() for line in log)


def test_the_log_has_one_printable_line_per_request(client, predictor):
    log: list[str] = []
    app = guarded(predictor, log)
    names = ["a\x1b[2J.png", "b\u2028.png", "c.png", "d.png"]
    for name in names[:2]:
        asgi(app, "/api/predict", [form((name, b"no image"))], FORM)
    asgi(app, "/api/x\n127.0.0.1 GET / 200", [], {}, method="GET")
    assert len(log) == 3
    assert all(line.isprintable() for line in log)
    assert "1 image; 1 unreadable: 'a\\x1b[2J.png'" in log[0]
    assert log[2].startswith("127.0.0.1 GET /api/x\\n127.0.0.1 GET / 200 404 ")


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.", "[", ""])
def test_another_host_is_refused_where_names_are_known(predictor, host):
    from vtclip.serve.guard import LOCAL

    app = guarded(predictor, [], LOCAL)
    for path in ("/", "/health", "/api/classes"):
        status, body = call_as(app, path, host)
        assert status == 421
        assert json.loads(body)["error"].endswith("is not a name of this service")


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000"])
def test_names_of_this_machine_are_answered(predictor, host):
    from vtclip.serve.guard import LOCAL

    assert call_as(guarded(predictor, [], LOCAL), "/health", host)[0] == 200


def call_as(app: Any, path: str, *hosts: str) -> tuple[int, bytes]:
    """A GET request with these Host headers and no other."""

    async def rehosted(scope: Any, receive: Any, send: Any) -> None:
        scope["headers"] = [(b"host", host.encode()) for host in hosts]
        await app(scope, receive, send)

    status, _, body, _ = asgi(rehosted, path, [], {}, method="GET")
    return status, body


def test_a_request_has_one_host(predictor):
    app = guarded(predictor, [])
    assert call_as(app, "/health")[0] == 400
    assert call_as(app, "/health", "a", "b")[0] == 400
    assert call_as(app, "/health", "anything")[0] == 200


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        ({}, True),
        ({"Origin": "http://testserver"}, True),
        ({"Origin": "https://testserver", "Sec-Fetch-Site": "same-origin"}, True),
        ({"Origin": "http://evil.example"}, False),
        ({"Origin": "http://testserver.evil.example"}, False),
        ({"Origin": "http://testserver:81"}, False),
        ({"Origin": "null"}, False),
        ({"Origin": "http://["}, False),
        ({"Sec-Fetch-Site": "cross-site"}, False),
    ],
)
def test_a_page_of_another_site_sends_nothing(client, world, headers, allowed):
    sent = files(("a.png", picture(8)))
    for path in ("/api/predict", "/api/batch", "/api/explain"):
        answer = client.post(path, files=sent, headers=headers)
        assert answer.status_code == (200 if allowed else 403)
        assert allowed or answer.json() == {
            "error": "the request comes from a page of another site"
        }


def test_every_answer_has_the_headers(client):
    for path in ("/", "/docs", "/page/app.js", "/health", "/nowhere", "/api/training-image/x"):
        headers = client.get(path).headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'; ")
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in headers


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/api/predict", 405),
        ("DELETE", "/health", 405),
        ("GET", "/nowhere", 404),
        ("GET", "/page/../predictor.py", 404),
        ("GET", "/page/%2e%2e/predictor.py", 404),
        ("POST", "/api/predict?topk=0", 422),
        ("POST", "/api/predict?topk=%0A1e999", 422),
        ("POST", "/api/explain?format=gif", 422),
        ("POST", "/api/explain?top=x", 422),
        ("POST", "/api/predict?unknown=nan", 422),
        ("POST", "/api/predict?coverage=inf", 422),
    ],
)
def test_what_is_wrong_is_said_in_one_line(client, method, path, status):
    answer = client.request(method, path, files=files(("a.png", picture(8))))
    assert answer.status_code == status
    assert list(answer.json()) == ["error"]
    assert answer.text.count("\n") == 1
    assert answer.text[:-1].isprintable()
    assert "Traceback" not in answer.text


def test_nothing_of_a_traceback_goes_out(predictor, monkeypatch):
    log: list[str] = []

    def broken(*_: Any) -> None:
        raise KeyError("a secret of\nthe process")

    with client_of(predictor, log) as client:
        monkeypatch.setattr(predictor, "answers", broken)
        answer = client.post("/api/predict", files=files(("a.png", picture(8))))
        assert (answer.status_code, answer.json()) == (500, {"error": "internal error"})
        assert client.get("/health").status_code == 200
    assert "500" in log[0]
    assert "KeyError" in log[0]
    assert log[0].isprintable()


def test_memory_that_runs_out_is_said_and_survived(predictor, monkeypatch):
    def full(*_: Any) -> None:
        raise MemoryError("no room")

    with client_of(predictor) as client:
        with monkeypatch.context() as patch:
            patch.setattr(predictor, "answers", full)
            answer = client.post("/api/predict", files=files(("a.png", picture(8))))
        assert (answer.status_code, answer.json()) == (503, {"error": "not enough memory"})
        assert answer.headers["retry-after"] == "10"
        assert client.post("/api/predict", files=files(("a.png", picture(8)))).status_code == 200


class Held:
    """Holds the decoding of images until `go`, and counts how many are in it at once."""

    def __init__(self, predictor: Any, monkeypatch: Any) -> None:
        self.go, self.lock, self.now, self.most = threading.Event(), threading.Lock(), 0, 0
        self.begun = 0
        self.real = predictor._pixels
        monkeypatch.setattr(predictor, "_pixels", self)

    def __call__(self, upload: Any) -> Any:
        with self.lock:
            self.now += 1
            self.begun += 1
            self.most = max(self.most, self.now)
        self.go.wait(30)
        with self.lock:
            self.now -= 1
        return self.real(upload)


def test_so_many_are_decoded_at_once_and_others_wait_or_are_refused(predictor, monkeypatch):
    held = Held(predictor, monkeypatch)
    sent = files(("a.png", picture(8)))
    with client_of(predictor, at_once=2, most_open=4) as client, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(client.post, "/api/predict", files=sent) for _ in range(7)]
        until = time.monotonic() + 30
        while sum(one.done() for one in asked) < 3 and time.monotonic() < until:
            time.sleep(0.01)
        refused = [one.result() for one in asked if one.done()]
        assert client.get("/health").status_code == 200
        held.go.set()
        statuses = sorted(one.result().status_code for one in asked)
    assert statuses == [200] * 4 + [503] * 3
    assert {one.headers["retry-after"] for one in refused} == {"1"}
    assert {one.json()["error"] for one in refused} == {
        "4 requests are open, the limit; come again"
    }
    assert held.most == 2


def test_a_request_that_takes_too_long_is_answered_and_leaves_its_place(world, monkeypatch):
    predictor = predictor_of(world.run("takl"), **LIMITS, timeout=0.4)
    held = Held(predictor, monkeypatch)
    sent = files(("a.png", picture(8)), ("b.png", picture(8)))
    with client_of(predictor, at_once=1, most_open=2) as client:
        answer = client.post("/api/predict", files=sent)
        assert answer.status_code == 504
        assert answer.json() == {"error": "the answer took more than 0.4 s, the limit"}
        waiting = client.post("/api/predict", files=sent)
        assert (waiting.status_code, waiting.headers["retry-after"]) == (503, "1")
        held.go.set()
        predictor.limits = replace(predictor.limits, timeout=60.0)
        assert client.post("/api/predict", files=sent).status_code == 200
    assert held.begun == 3  # of the first request the second image was not begun


def test_a_body_that_never_ends_is_given_up(world):
    import asyncio

    predictor = predictor_of(world.run("takl"), **LIMITS, timeout=0.3)
    app, sent = guarded(predictor, []), []

    async def receive() -> Any:
        await asyncio.sleep(3600)

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [
        (b"host", b"x"),
        (b"content-type", f"multipart/form-data; boundary={BOUNDARY}".encode()),
    ]
    scope = {"type": "http", "method": "POST", "path": "/api/predict", "raw_path": b"/api/predict",
             "query_string": b"", "headers": headers, "client": None, "root_path": "",
             "http_version": "1.1", "scheme": "http", "server": ("x", 80)}  # fmt: skip
    start = time.monotonic()
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 408
    assert time.monotonic() - start < 30
    assert json.loads(sent[1]["body"]) == {"error": "the body took more than 0.3 s, the limit"}
