# SPDX-License-Identifier: Apache-2.0
"""What cached features say is of the present request: files, model, roles; digests of pictures."""

from __future__ import annotations

import hashlib
import logging
import shutil

import numpy as np
import pytest
from pictures import noise, save
from PIL import Image

from vtclip.data.decode import pixel_digest
from vtclip.data.extract import extract_features
from vtclip.data.featureset import FeatureSet
from vtclip.files import json_digest, to_json


def test_files_that_come_and_go_are_those_of_this_scan(cached, pictures, caplog):
    cached()
    (pictures / "cat" / "empty.jpg").write_bytes(b"")
    (pictures / "cat" / "gone.jpg").symlink_to(pictures / "nothing")
    for _ in range(2):
        caplog.clear()
        found, report = cached()
        assert report.reused
        skipped = [("cat/gone.jpg", "a link to nothing"), ("cat/empty.jpg", "the file is empty")]
        assert report.skipped == found.skipped == skipped
        assert found.records().info["skipped"] == [list(pair) for pair in skipped]
        assert "unreadable: cat/empty.jpg: the file is empty" in caplog.text
    for path in pictures.glob("cat/*.jpg"):
        path.unlink()
    caplog.clear()
    found, report = cached()
    assert report.reused
    assert report.skipped == found.records().info["skipped"] == []
    assert "unreadable" not in caplog.text


def test_files_that_were_skipped_by_the_first_scan_do_not_stay(cached, pictures):
    (pictures / "cat" / "empty.jpg").write_bytes(b"")
    cached()
    (pictures / "cat" / "empty.jpg").unlink()
    found, report = cached()
    assert report.reused
    assert found.records().info["skipped"] == []


def test_damaged_files_are_reported_as_long_as_they_are_there(cached, pictures, caplog):
    (pictures / "cat" / "bad.jpg").write_bytes(b"no image")
    for reused in (False, True):
        caplog.clear()
        _, report = cached()
        assert (report.reused, [name for name, _ in report.skipped]) == (reused, ["cat/bad.jpg"])
        assert "unreadable: cat/bad.jpg: not an image of a known format" in caplog.text


def test_features_that_cannot_be_written_say_the_same(cached, pictures, monkeypatch, fake_clip):
    cached()
    (pictures / "cat" / "empty.jpg").write_bytes(b"")
    monkeypatch.setattr("os.access", lambda *_: False)
    clip = fake_clip()
    clip.name = "moved"
    found, report = cached(model=clip)
    assert (report.reused, report.skipped) == (True, [("cat/empty.jpg", "the file is empty")])
    assert found.records().info["model_name"] == "moved"


def test_the_model_is_the_one_that_was_asked_for(cached, fake_clip):
    one, two = fake_clip(), fake_clip()
    one.name, two.name = "local-dir:/Downloads", "local-dir:/models"
    assert cached(model=one)[0].records().info["model_name"] == one.name
    found, report = cached(model=two)
    assert report.reused
    assert found.records().info["model_name"] == two.name


def test_roles_of_a_layout_reach_the_rows(tmp_path, cached, caplog):
    root = tmp_path / "split"
    for part in ("train", "test"):
        noise(root / part, classes=("cat", "dog"), each=3)
    for _ in range(2):
        caplog.clear()
        records = cached(source=root)[0].records()
        roles = [2 if name.startswith("test/") else 0 for name in records.names]
        assert records.roles.tolist() == roles
        assert records.class_names == ["cat", "dog"]
        line = "split: 2 split folders are used: train/ (6 images) trains, test/ (6) tests"
        assert caplog.text.count(line) == 1


def test_features_folder_keeps_the_roles(tmp_path, fake_clip):
    for part in ("train", "val"):
        noise(tmp_path / "split" / part, classes=("cat", "dog"), each=2)
    extract_features(tmp_path / "split", tmp_path / "out", model=fake_clip())
    assert FeatureSet.open(tmp_path / "out").records().roles.tolist() == [0, 0, 1, 1] * 2


def test_features_folder_that_is_written_again_says_what_was_asked_last(
    pictures, tmp_path, fake_clip
):
    out, clip = tmp_path / "out", fake_clip()
    (pictures / "cat" / "empty.jpg").write_bytes(b"")
    extract_features(pictures, out, model=clip)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    extract_features(pictures, out, model=clip)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (pictures / "cat" / "empty.jpg").unlink()
    clip.name = "moved"
    _, report = extract_features(pictures, out, model=clip)
    info = FeatureSet.open(out).records().info
    assert (report.reused, info["model_name"], info["skipped"]) == (True, "moved", [])


def test_pixels_are_the_same_in_another_file(cached, pictures):
    image = Image.open(pictures / "cat" / "0.png")
    image.save(pictures / "dog" / "again.bmp")
    image.resize((28, 24)).save(pictures / "dog" / "larger.png")
    records = cached()[0].records()
    row = dict(zip(records.names, records.pixels, strict=True))
    assert row["cat/0.png"] == row["dog/again.bmp"] == pixel_digest(image)
    assert len(set(row.values())) == len(row) - 1
    data = (pictures / "dog" / "again.bmp").read_bytes()
    digests = dict(zip(records.names, records.digests, strict=True))
    assert digests["dog/again.bmp"] == hashlib.sha256(data).hexdigest()


def test_the_shape_of_pixels_counts():
    flat = [Image.new("RGB", size, "red") for size in ((4, 9), (6, 6))]
    assert len({pixel_digest(image) for image in flat}) == 2


def test_perceptual_digests_of_copies_are_near(cached, pictures):
    pytest.importorskip("imagehash", reason="the extra duplicates is not installed")
    y, x = np.mgrid[0:300, 0:400] / 50
    waves = np.stack([np.sin(x * (k + 1) + y * y) for k in range(3)], axis=-1) * 120 + 128
    save(waves, pictures / "cat" / "waves.png")
    image = Image.open(pictures / "cat" / "waves.png")
    image.save(pictures / "dog" / "waves.jpg", quality=60)
    image.resize((200, 150)).save(pictures / "dog" / "small.png")
    Image.new("RGB", (40, 40), "red").save(pictures / "dog" / "flat.png")
    records = cached()[0].records()
    row = dict(zip(records.names, records.perceptual, strict=True))

    def bits(a: str, b: str) -> int:
        return (int(row[a], 16) ^ int(row[b], 16)).bit_count()

    assert row["dog/flat.png"] is None
    assert bits("cat/waves.png", "dog/waves.jpg") <= 4
    assert bits("cat/waves.png", "dog/small.png") <= 4
    assert bits("cat/waves.png", "cat/0.png") > 10


def test_features_from_before_stay_valid(cached, fake_clip):
    found, _ = cached()
    manifest = {name: value for name, value in found.manifest.items()
                if name not in ("pixels", "perceptual", "roles", "notes", "digest")}  # fmt: skip
    path = found.folder / "manifest.json"
    path.write_bytes(to_json({**manifest, "digest": json_digest(manifest)}))
    clip = fake_clip()
    again, report = cached(model=clip)
    assert (report.reused, clip.images_encoded) == (True, 0)
    records = again.records()
    assert (records.pixels, records.perceptual, records.roles) == (None, None, None)
    assert "decoding" not in found.fields


def test_ranges_of_16_bit_files_are_counted_and_part_of_the_key(cached, pictures, caplog):
    values = np.arange(0, 4096, 8, dtype=np.uint16).reshape(16, 32)
    Image.fromarray(values).save(pictures / "cat" / "a.png")
    Image.fromarray(values).save(pictures / "cat" / "b.tif")
    for _ in range(2):
        caplog.clear()
        found, _ = cached()
        assert "2 images of 12-bit range in 16-bit files are scaled by 4095" in caplog.text
    assert found.fields["decoding"] == ["16-bit"]


def test_images_of_other_formats_are_said_once(cached, pictures, caplog):
    for number in range(30):
        (pictures / "cat" / f"{number}.CR2").write_bytes(b"raw")
    for _ in range(2):
        caplog.clear()
        _, report = cached()
        assert len(report.skipped) == 30
        line = f"30 .cr2 files in 1 folder of {pictures} are not read: camera raw; convert them to"
        assert [record.message.startswith(line) for record in caplog.records] == [True]


def test_other_files_are_counted_quietly(cached, pictures, caplog):
    caplog.set_level(logging.INFO, "vtclip")
    (pictures / "cat" / "notes.txt").write_text("x")
    shutil.copy(pictures / "cat" / "notes.txt", pictures / "dog" / "a.json")
    cached()
    assert f"passed over in {pictures}: 1 .json, 1 .txt" in caplog.text
