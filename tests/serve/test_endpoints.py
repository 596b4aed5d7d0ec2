# SPDX-License-Identifier: Apache-2.0
"""The endpoints: what the run says, in JSON, CSV and pictures."""

from __future__ import annotations

import base64
import csv
import io
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image
from service import World, client_of, files, predictor_of

from vtclip.files import unescape
from vtclip.runs.classifier import Classifier

for needed in ("fastapi", "uvicorn", "python_multipart", "httpx"):
    pytest.importorskip(needed, reason="the extra serve, and httpx for its test client")

BROKEN = ("broken.png", b"\x89PNG\r\n\x1a\nno more")
RATE = 0.2  # that nine validation images allow


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def predictor(world: World) -> Any:
    return predictor_of(world.run("takl"), RATE)


@pytest.fixture(scope="module")
def client(predictor: Any) -> Iterator[Any]:
    with client_of(predictor) as client:
        yield client


@pytest.fixture(scope="module")
def classifier(world: World) -> Classifier:
    return Classifier.load(world.run("takl"), device="cpu")


def test_health_and_classes_say_what_runs(client, classifier):
    health = client.get("/health").json()
    assert health["status"] == "ready"
    assert (health["run"], health["method"], health["classes"]) == ("takl", "takl", 3)
    assert health["model"] == classifier.clip.name
    classes = client.get("/api/classes").json()
    assert classes["classes"] == classifier.class_names
    assert (classes["unknown"], classes["explain"]) == (RATE, "training images")
    assert {classes["api_version"], health["api_version"]} == {1}


def test_predict_says_what_the_classifier_says(client, classifier, world):
    paths = world.paths[:5]
    body = client.post("/api/predict?topk=2&coverage=0.8", files=files(*paths)).json()
    assert [entry["image"] for entry in body["images"]] == [path.name for path in paths]
    answers = classifier.answer_each(paths, 2, unknown=RATE, coverage=0.8)
    for entry, answer in zip(body["images"], answers, strict=True):
        assert [tuple(one.values()) for one in entry["predictions"]] == answer.predictions
        assert (entry["unknown"], entry["p_value"]) == (answer.unknown, answer.p_value)
        assert entry["set"] == [one.label for one in answer.set]


def test_unknown_can_be_left_out_and_what_the_run_does_not_allow_is_refused(client, world):
    path = files(world.paths[0])
    entry = client.post("/api/predict?unknown=0", files=path).json()["images"][0]
    assert "unknown" not in entry
    refused = client.post("/api/predict?unknown=0.001", files=path)
    assert refused.status_code == 422
    assert refused.json()["error"].startswith("unknown")
    assert client.post("/api/predict?coverage=0.9999", files=path).status_code == 422


def test_a_broken_image_is_named_and_the_others_are_answered(client, world):
    good = world.paths[0]
    body = client.post("/api/predict", files=files(good, BROKEN, ("empty.jpg", b""), good)).json()
    first, broken, empty, last = body["images"]
    assert first == last
    assert first["predictions"]
    assert broken["image"] == "broken.png"
    assert broken["error"].startswith("damaged")
    assert empty["error"] == "the file is empty"


def test_several_threads_at_once_get_the_same_answers(client, classifier, world):
    paths = world.paths[:8]
    expected = [classifier.predict(path, 3) for path in paths]
    found: dict[int, Any] = {}

    def ask(number: int) -> None:
        sent = files(paths[number])
        answer = client.post("/api/predict?topk=3&unknown=0", files=sent).json()
        found[number] = [tuple(one.values()) for one in answer["images"][0]["predictions"]]

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[number] for number in range(8)] == expected


def test_batch_is_csv_without_formulas_or_further_lines(client, world):
    good = world.paths[0].read_bytes()
    names = ["=1+1.png", "two\nlines.png", "a,b;=2.png"]
    sent = files(*((name, good) for name in names), ("@bad.png", b"no image"))
    answer = client.post("/api/batch?topk=2", files=sent)
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    assert answer.headers["content-disposition"] == 'attachment; filename="predictions.csv"'
    head, *rows = csv.reader(io.StringIO(answer.text))
    assert head == ["image", "rank", "label", "probability", "unknown", "in_set", "error"]
    assert len(rows) == 2 * len(names) + 1
    assert not any(row[0].startswith(("=", "@")) for row in rows)
    # a browser, as the client here, writes a line end in a name as %0A
    assert [unescape(row[0]).replace("%0A", "\n") for row in rows[::2]] == [*names, "@bad.png"]
    assert rows[-1][1:] == ["", "", "", "", "", "not an image of a known format"]


def test_an_explanation_adds_up_and_shows_its_training_images(client, world):
    sent = files(world.paths[0])
    why = client.post("/api/explain?top=2", files=sent).json()
    parts = [*why["terms"].values(), *(row["log_odds"] for row in why["rows"])]
    assert sum(parts) + why["rest"]["log_odds"] == pytest.approx(why["log_odds"], abs=1e-6)
    row = next(row for row in why["rows"] if row["kind"] == "image")
    shown = client.get(f"/api/training-image/{row['training_image']}")
    assert shown.headers["content-type"] == "image/png"
    with (
        Image.open(io.BytesIO(shown.content)) as small,
        Image.open(world.images / row["name"]) as one,
    ):
        assert small.size == one.size
        assert small.tobytes() == one.convert("RGB").tobytes()
    named = client.post("/api/explain?class=ocean", files=sent).json()
    assert named["label"] == "ocean"
    unknown = client.post("/api/explain?class=ozean", files=sent)
    assert (unknown.status_code, "'ocean'" in unknown.json()["error"]) == (422, True)
    assert client.post("/api/explain?format=png", files=sent).status_code == 409
    assert client.post("/api/explain", files=files(BROKEN)).status_code == 422
    assert client.post("/api/explain", files=sent * 2).status_code == 422


@pytest.mark.parametrize("number", ["9", "-1", "10000000000000000000000"])
def test_an_unknown_training_image_is_a_404(client, number):
    answer = client.get(f"/api/training-image/{number}")
    assert answer.status_code == 404
    assert answer.json() == {"error": f"no training image {number}: the run lists 9"}


def test_a_training_image_is_a_number_and_never_a_path(client, world):
    for name in ("..%2f..%2fetc%2fpasswd", "%2fetc%2fpasswd", "grass%2f00.png", "0.png"):
        answer = client.get(f"/api/training-image/{name}")
        assert answer.status_code in (404, 422)
        assert list(answer.json()) == ["error"]


def test_a_training_image_that_is_gone_or_changed_is_a_404(world, tmp_path):
    predictor = predictor_of(world.run("takl"))
    with client_of(predictor) as client:
        number = 0
        place = world.images / predictor._images.names[number]
        data = place.read_bytes()
        for spoil in (place.unlink, lambda: place.write_bytes(data + b"x")):
            spoil()
            try:
                answer = client.get(f"/api/training-image/{number}")
            finally:
                place.write_bytes(data)
            assert answer.status_code == 404
            assert answer.json()["error"] == "training image 0 is gone, or is not that of the fit"
        assert client.get(f"/api/training-image/{number}").status_code == 200


def test_a_heat_map_is_a_picture(world):
    with client_of(predictor_of(world.run("vtclip"))) as client:
        assert client.get("/api/classes").json()["explain"] == "heat map"
        sent = files(world.paths[0])
        why = client.post("/api/explain?class=sunset", files=sent).json()
        shown = client.post("/api/explain?class=sunset&format=png", files=sent)
        assert why["label"] == "sunset"
        assert base64.b64decode(why["heat_map"]) == shown.content
        with Image.open(io.BytesIO(shown.content)) as heat:
            assert (heat.format, heat.size) == ("PNG", (320, 320))
        best = client.post("/api/predict?topk=1", files=sent).json()["images"][0]["predictions"][0]
        predicted = client.post("/api/explain", files=sent).json()
        assert (predicted["label"], predicted["probability"]) == tuple(best.values())


def test_a_method_that_cannot_be_explained_says_so(world):
    with client_of(predictor_of(world.run("clip-adapter"))) as client:
        assert client.get("/api/classes").json()["explain"] is None
        answer = client.post("/api/explain", files=files(world.paths[0]))
        assert answer.status_code == 409
        assert answer.json()["error"].startswith(
            "not available for this method: method clip-adapter cannot be explained"
        )


def test_the_schema_names_every_endpoint_and_its_answer(client):
    schema = client.get("/api/openapi.json").json()
    assert set(schema["paths"]) == {
        *("/health", "/api/classes", "/api/predict", "/api/explain", "/api/batch"),
        "/api/training-image/{number}",
    }
    fields = schema["components"]["schemas"]
    health, classes = client.get("/health").json(), client.get("/api/classes").json()
    assert set(fields["Health"]["properties"]) == set(health)
    assert set(fields["Classes"]["properties"]) == set(classes)
    body = schema["paths"]["/api/predict"]["post"]["requestBody"]["content"]
    assert list(body) == ["multipart/form-data"]
    names = {one["name"] for one in schema["paths"]["/api/explain"]["post"]["parameters"]}
    assert names == {"class", "top", "format"}


def test_answers_have_the_fields_of_the_schema(client, world):
    fields = client.get("/api/openapi.json").json()["components"]["schemas"]
    sent = files(world.paths[0], BROKEN)
    images = client.post("/api/predict?coverage=0.8", files=sent).json()["images"]
    assert {name for entry in images for name in entry} == set(fields["Image"]["properties"])
    why = client.post("/api/explain", files=sent[:1]).json()
    assert set(why) == set(fields["Explanation"]["properties"])
    assert set(why["rows"][0]) == set(fields["Row"]["properties"])


def test_what_a_page_loads_is_here_and_of_its_kind(client):
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    for path in ("style.css", "app.js", "icon.svg"):
        assert f"/page/{path}" in page.text
        assert client.get(f"/page/{path}").status_code == 200
    assert client.get("/page/index.html/../../app.py").status_code == 404
    docs = client.get("/docs")
    for text in (page.text, docs.text, client.get("/page/style.css").text):
        assert "//" not in text  # no address of another host
    assert "<script>" not in page.text + docs.text
    assert "style=" not in page.text + docs.text
