# SPDX-License-Identifier: Apache-2.0
"""The page in a browser: images in, classes out, on a narrow screen, by keyboard, without harm."""

from __future__ import annotations

import csv
import io
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, chromium
from service import Process, World

from vtclip.runs.classifier import Classifier

for needed in ("fastapi", "uvicorn", "python_multipart"):
    pytest.importorskip(needed, reason="the extra serve")
PROGRAM = chromium()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium here")

EVIL = "<img src=x onerror=document.title='harm'>.png"
READY = "document.querySelectorAll('#classes li').length == 3"
DONE = "/classified/.test(document.getElementById('status').textContent)"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("page"))


@pytest.fixture(scope="module")
def service(world: World) -> Iterator[Process]:
    process = Process(world.run("takl"), "--unknown", "0", log=world.root / "log.txt")
    yield process
    process.stop(signal.SIGTERM)


@pytest.fixture(scope="module")
def browser(world: World) -> Iterator[Browser]:
    browser = Browser(str(PROGRAM), world.root)
    yield browser
    browser.close()


@pytest.fixture
def chosen(world: World, tmp_path: Path) -> list[Path]:
    """An image with a name that is a tag, another one, and what is no image."""
    paths = [tmp_path / EVIL, tmp_path / "sea.png", tmp_path / "=broken.jpg"]
    for path, data in zip(paths, (world.paths[0], world.paths[12]), strict=False):
        path.write_bytes(data.read_bytes())
    paths[2].write_bytes(b"no image")
    return paths


@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (390, "dark")])
def test_images_are_classified_and_explained(service, browser, world, chosen, width, scheme):
    browser.said.clear()
    browser.show(service.url, width, scheme)
    browser.wait_for(READY)
    browser.choose("#files", chosen)
    browser.wait_for(DONE)
    status = browser.value("document.getElementById('status').textContent")
    assert status == "2 images classified, 1 not"
    classifier = Classifier.load(world.run("takl"), device="cpu")
    best = [classifier.predict(path, 1)[0].label for path in chosen[:2]]
    assert (
        browser.value("[...document.querySelectorAll('.verdict')].map(e => e.textContent)") == best
    )
    names = browser.value("[...document.querySelectorAll('.top .file')].map(e => e.textContent)")
    assert [name for name in names if name.endswith(("png", "jpg"))] == [p.name for p in chosen]
    error = browser.value("document.querySelector('.card .error').textContent")
    assert error == "not an image of a known format"
    browser.value("document.querySelector('.more').click()")
    browser.wait_for("document.querySelectorAll('.rows img').length > 0")
    browser.wait_for("[...document.querySelectorAll('.rows img')].every(e => e.naturalWidth > 0)")
    assert browser.value("document.querySelector('.more').getAttribute('aria-expanded')") == "true"
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value("document.querySelectorAll('img[src=x]').length") == 0
    assert browser.value("document.title") == "takl: what is in an image"
    assert browser.said == []


def test_a_selection_becomes_a_table(service, browser, chosen, tmp_path):
    browser.show(service.url, 390)
    browser.wait_for(READY)
    browser.do("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    browser.choose("#batch", chosen)
    browser.wait_for("!document.getElementById('csv').hidden")
    browser.value("document.getElementById('csv').click()")
    table, until = tmp_path / "predictions.csv", time.monotonic() + 60
    while not table.exists() and time.monotonic() < until:
        time.sleep(0.05)
    head, *rows = csv.reader(io.StringIO(table.read_text()))
    assert head[0] == "image"
    assert [row[0] for row in rows] == [EVIL, "sea.png", "'=broken.jpg"]


def test_everything_is_reached_by_keyboard(service, browser, chosen):
    browser.show(service.url, 390)
    browser.wait_for(READY)
    browser.choose("#files", chosen[:1])
    browser.wait_for(DONE)
    browser.value("document.body.focus()")
    reached = []
    for _ in range(12):
        browser.press("Tab", 9)
        reached.append(
            browser.value("document.activeElement.id || document.activeElement.className")
        )
        if reached[-1] == "more":
            browser.press("Enter", 13)
    assert {"files", "topk", "clear", "more", "batch"} <= set(reached)
    browser.wait_for("document.querySelectorAll('.rows li').length > 0")


def test_no_color_of_text_is_faint(service, browser):
    """WCAG AA: a contrast of 4.5 between text and ground, in light and in dark."""
    contrast = """(() => {
      const light = (text) => {
        const [r, g, b] = text.match(/[0-9.]+/g).slice(0, 3).map(v => v / 255)
          .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const probe = document.body.appendChild(document.createElement("i"));
      const of = (name) => {
        probe.style.color = `var(--${name})`;
        return light(getComputedStyle(probe).color);
      };
      const pairs = [["ink", "ground"], ["soft", "ground"], ["soft", "panel"], ["ink", "panel"],
        ["warn", "warn-ground"], ["bad", "bad-ground"], ["on-strong", "strong"],
        ["strong", "ground"], ["strong", "panel"], ["soft", "track"]];
      return pairs.map(([a, b]) => {
        const [low, high] = [of(a), of(b)].sort((x, y) => x - y);
        return (high + 0.05) / (low + 0.05);
      });
    })()"""
    for scheme in ("light", "dark"):
        browser.show(service.url, 390, scheme)
        browser.wait_for(READY)
        assert min(browser.value(contrast)) >= 4.5, scheme
