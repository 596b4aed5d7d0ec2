# SPDX-License-Identifier: Apache-2.0
"""Features on disk: what the key depends on, what is reused, what is refused, what is reported."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import vtclip.data.extract as extract
import vtclip.data.shards as shards
from vtclip.data import Records, few_shot_split, open_source
from vtclip.data.decode import open_image
from vtclip.data.extract import extract_features
from vtclip.data.featureset import FeaturesDamaged, FeatureSet
from vtclip.files import default_cache, json_digest, to_json, write_atomic


def everything(records: Records) -> list[torch.Tensor]:
    batches = [records.batch(torch.arange(len(records)), p) for p in range(records.num_passes + 1)]
    tensors = [part for b in batches for part in (b.image, b.label, b.spatial) if part is not None]
    return [*tensors, records.text]


def same(one: Records, two: Records) -> bool:
    pairs = zip(everything(one), everything(two), strict=True)
    return one.names == two.names and all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def features(pictures: Path, tmp_path: Path, fake_clip: Any) -> Any:
    """`extract_features` of the pictures into a folder of tmp_path, with a FakeClip of its own."""

    def extracted(out: str | Path, **options: Any) -> Any:
        return extract_features(pictures, tmp_path / out, **{"model": fake_clip(), **options})

    return extracted


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD_ROWS", 4)


def test_rows_are_those_of_the_model(features, pictures, fake_clip):
    clip = fake_clip()
    found, report = features("out", model=clip, spatial="default")
    records = found.records()
    assert records.class_names == ["cat", "dog", "eel"]
    assert records.names[5] == "dog/0.png"
    assert (report.rows, report.skipped, report.reused, len(found)) == (15, [], False, 15)
    assert records.logit_scale == clip.logit_scale
    batch = records.batch(torch.tensor([7, 3]))
    pixels = torch.stack([clip.preprocess(open_image(pictures / records.names[i])) for i in (7, 3)])
    image, spatial = clip.encode_image(pixels, "raw")
    # float32 is stored as it is; the product may be summed in another order in another batch
    torch.testing.assert_close(batch.image, image, rtol=1e-5, atol=1e-5)
    assert batch.spatial is not None
    torch.testing.assert_close(batch.spatial, spatial.half().float(), rtol=0, atol=0)
    assert batch.label.tolist() == [1, 0]


def test_shards_do_not_change_rows(features, monkeypatch):
    options = {"spatial": "raw", "augment_passes": 2, "batch_size": 3}
    one, _ = features("one", **options)
    monkeypatch.setattr(shards, "SHARD_ROWS", 4)
    two, _ = features("two", **options)
    assert [entry["rows"] for entry in two.manifest["shards"]] == [4, 4, 4, 3]
    assert one.key == two.key
    assert same(one.records(), two.records())
    order = torch.tensor([14, 0, 5, 5, 9])
    assert torch.equal(
        two.records().batch(order, 1).image, one.records().batch(torch.arange(15), 1).image[order]
    )


@pytest.mark.parametrize("cores", [1, 2, 5])
def test_the_number_of_decoding_threads_changes_no_byte(features, tmp_path, monkeypatch, cores):
    options = {"spatial": "raw", "augment_passes": 2, "batch_size": 4}
    features("usual", **options)
    monkeypatch.setattr("vtclip.data.loading.num_cores", lambda: cores)
    monkeypatch.setattr("vtclip.data.threads.num_cores", lambda: cores)
    features("other", **options)
    for path in (tmp_path / "usual").iterdir():
        assert (tmp_path / "other" / path.name).read_bytes() == path.read_bytes()


def test_augmented_passes_differ_and_are_reproducible(features):
    options = {"augment_passes": 2}
    one, _ = features("one", **options)
    two, _ = features("two", **options)
    assert same(one.records(), two.records())
    plain, first, second = (one.records().batch(torch.arange(15), p).image for p in range(3))
    assert not torch.equal(plain, first)
    assert not torch.equal(first, second)


def test_finished_features_are_reused(cached, fake_clip):
    clip = fake_clip()
    cached(model=clip)
    before = clip.images_encoded
    _, report = cached(model=clip)
    assert report.reused
    assert report.rows == 15
    assert clip.images_encoded == before


def test_key_depends_on_everything_that_decides_a_number(cached, pictures, fake_clip):
    def key(**options: Any) -> str:
        return cached(**options)[0].key

    keys = {
        "plain": key(),
        "weights": key(model=fake_clip(seed=1)),
        "spatial": key(spatial="raw"),
        "dtype": key(spatial="raw", dtype="float32"),
        "passes": key(augment_passes=1),
        "templates": key(templates=["a drawing of a {}."]),
    }
    other = fake_clip()
    other.preprocess_cfg = {**other.preprocess_cfg, "mean": [0.4] * 3}
    keys["transform"] = key(model=other)
    other = fake_clip()
    other.config = {**other.config, "model_cfg": {"quick_gelu": True}}
    keys["config"] = key(model=other)
    (pictures / "cat" / "1.png").rename(pictures / "cat" / "one.png")
    keys["renamed"] = key()
    Image.new("RGB", (9, 9)).save(pictures / "cat" / "one.png")
    keys["changed"] = key()
    (pictures / "cat").rename(pictures / "bat")
    keys["class"] = key()
    assert len(set(keys.values())) == len(keys), keys


def test_touching_or_moving_files_changes_nothing(cached, pictures, tmp_path):
    one, _ = cached()
    os.utime(pictures / "cat" / "0.png", (1, 1))
    moved = tmp_path / "elsewhere"
    pictures.rename(moved)
    two, report = cached(source=moved)
    assert report.reused
    assert one.key == two.key


def test_changed_content_of_the_same_size_is_another_key(cached, pictures):
    path = pictures / "dog" / "2.png"
    status = path.stat()
    one, _ = cached()
    data = bytearray(path.read_bytes())
    data[-20] ^= 1  # within a checksum or the pixels; the size stays
    path.write_bytes(bytes(data))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    two, report = cached()
    assert not report.reused
    assert one.key != two.key


def test_other_features_in_out_are_named_and_kept(features, tmp_path, fake_clip):
    out = tmp_path / "out"
    features(out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ValueError, match="differ in weights; give another folder"):
        features(out, model=fake_clip(seed=1))
    with pytest.raises(ValueError, match="differ in templates, spatial, dtype;"):
        features(out, spatial="raw", templates="a drawing of a {}.")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_out_must_be_new_and_outside(features, pictures, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="holds other files; give a new or an empty folder"):
        features("full")
    for out in (pictures, pictures / "features"):
        with pytest.raises(ValueError, match="must lie outside the image folder"):
            features(out)
    assert sorted(path.name for path in pictures.iterdir()) == ["cat", "dog", "eel"]


def test_unreadable_files_have_no_row_and_are_reported(
    features, pictures, fake_clip, caplog, small_shards
):
    (pictures / "cat" / "0.png").write_bytes(b"")
    whole = (pictures / "dog" / "3.png").read_bytes()
    (pictures / "dog" / "3.png").write_bytes(whole[:-20])
    os.mkfifo(pictures / "eel" / "pipe.jpg")
    found, report = features("out")
    assert len(found) == report.rows == 13
    assert dict(report.skipped) == {
        "cat/0.png": "the file is empty",
        "dog/3.png": "damaged: the end of the PNG file is missing",
        "eel/pipe.jpg": "not a regular file but a pipe, socket or device",
    }
    assert report.lines()[0] == "13 of 16 images read"
    assert "unreadable: dog/3.png: damaged" in caplog.text
    records = found.records()
    assert len(records.info["skipped"]) == 3
    row = records.names.index("dog/4.png")
    clip = fake_clip()
    expected, _ = clip.encode_image(clip.preprocess(open_image(pictures / "dog/4.png"))[None])
    got = records.batch(torch.tensor([row])).image
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_class_with_unreadable_images_only(features, pictures, tmp_path):
    for path in (pictures / "eel").iterdir():
        path.write_text("<html>404</html>")
    with pytest.raises(ValueError, match="no image of these classes could be read: eel"):
        features("out")
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_repeated_content_is_counted(features, pictures, caplog):
    shutil.copy(pictures / "cat" / "0.png", pictures / "dog" / "copy.png")
    _, report = features("out")
    assert report.duplicates == [("cat/0.png", "dog/copy.png")]
    assert (
        "1 image has the same content as another one; 1 of them in another class, e.g. "
        "cat/0.png (cat) and dog/copy.png (dog)"
    ) in caplog.text


def test_repeated_content_of_one_class_is_counted_without_a_class(features, pictures, caplog):
    shutil.copy(pictures / "cat" / "0.png", pictures / "cat" / "copy.png")
    features("out")
    line = "1 image has the same content as another one, e.g. cat/0.png and cat/copy.png"
    assert line in caplog.text


def test_file_that_changes_while_features_are_made(features, pictures, monkeypatch):
    real = extract.hash_all

    def then_change(*args: Any) -> Any:
        hashed = real(*args)
        Image.new("RGB", (9, 9)).save(pictures / "cat" / "2.png")
        return hashed

    monkeypatch.setattr(extract, "hash_all", then_change)
    match = r"cat/2.png: the file changed while features were extracted"
    with pytest.raises(ValueError, match=match):
        features("out")


def test_non_finite_features_name_the_image(features, tmp_path, fake_clip):
    with pytest.raises(ValueError, match=r"image features of 1 images are not finite.*cat/0.png"):
        features("out", model=fake_clip(poison=True))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_overflow_of_float16_says_what_to_do(features, fake_clip):
    clip = fake_clip()
    plain = clip.preprocess
    clip.preprocess = lambda image: plain(image) * 1e6
    with pytest.raises(ValueError, match=r"spatial features .* not finite \(try dtype='float32'\)"):
        features("out", model=clip, spatial="raw")


def test_text_is_encoded_from_names_and_templates(features, fake_clip):
    found, _ = features("out", templates="imagenet7")
    records = found.records()
    assert len(records.info["templates"]) == 7
    torch.testing.assert_close(records.text.norm(dim=1), torch.ones(3))
    views = fake_clip().encode_text_views(records.class_names, "imagenet7")
    torch.testing.assert_close(records.text_views, views, rtol=0, atol=1e-6)
    mean = torch.nn.functional.normalize(views.mean(dim=1), dim=-1)
    torch.testing.assert_close(records.text, mean, rtol=0, atol=1e-6)
    chosen = records.subset_classes([2, 0])
    assert torch.equal(chosen.text_views, records.text_views[[2, 0]])


def test_one_template_is_kept_once(features, tmp_path):
    found, _ = features("out")
    assert list(load_file(tmp_path / "out" / "text.safetensors")) == ["text"]
    records = found.records()
    torch.testing.assert_close(records.text_views[:, 0], records.text, rtol=0, atol=1e-6)
    assert records.text_views.shape == (3, 1, 16)


def test_features_without_texts_of_each_template_still_load(features, tmp_path):
    """As they were written before each template's own texts were kept."""
    out = tmp_path / "out"
    found, _ = features(out, templates="imagenet7")
    text, manifest = found.records().text, dict(found.manifest)
    manifest["text"] = shards.write_tensors(out / "text.safetensors", {"text": text})
    body = {name: value for name, value in manifest.items() if name != "digest"}
    (out / "manifest.json").write_bytes(to_json({**body, "digest": json_digest(body)}))
    again, report = features(out, templates="imagenet7")
    assert report.reused
    records = again.records()
    assert torch.equal(records.text, text)
    assert records.text_views.shape == (3, 1, 16)


@pytest.mark.parametrize("option", [{"dtype": "int8"}, {"batch_size": 0}, {"augment_passes": -1}])
def test_bad_options(features, option):
    with pytest.raises(ValueError, match=f"features: {next(iter(option))} must be"):
        features("out", **option)


def test_interrupted_run_goes_on_after_its_last_shard(features, tmp_path, fake_clip, small_shards):
    whole, _ = features("whole", spatial="raw")
    clip = fake_clip()
    encode = clip.encode_image

    def stop(pixels: torch.Tensor, spatial: Any = None) -> Any:
        if clip.images_encoded >= 9:
            raise KeyboardInterrupt
        return encode(pixels, spatial)

    clip.encode_image = stop
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        features(out, model=clip, spatial="raw")
    assert not (out / "manifest.json").exists()
    with pytest.raises(ValueError, match="is unfinished; run the same command again"):
        FeatureSet.open(out)
    again = fake_clip()
    found, _ = features(out, model=again, spatial="raw")
    assert again.images_encoded == 7 + 1  # the last two shards, and a blank image for the shape
    assert same(found.records(), whole.records())
    for path in (tmp_path / "whole").iterdir():
        if path.name != "manifest.json":
            assert (out / path.name).read_bytes() == path.read_bytes()
    assert sorted(path.name for path in out.iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )


PICTURE = ("pixels", "perceptual")


@pytest.mark.parametrize("taken", [True, False])
def test_damaged_shard_of_an_unfinished_run_is_made_again(
    features, tmp_path, fake_clip, small_shards, taken
):
    out = tmp_path / "out"
    found, _ = features(out)
    good = {path.name: path.read_bytes() for path in out.iterdir()}
    manifest = json.loads(good["manifest.json"])
    for n, rows in {0: [0, 1, 2, 3], 1: [4, 5, 6, 7]}.items():
        entry = {**manifest["shards"][n], "number": n, "kept": rows, "skipped": []}
        if taken:  # notes from before pixels had digests lack them
            entry["taken"] = [[manifest[key][row] for key in PICTURE] + [[]] for row in rows]
        body = {"key": found.key, "rows": [rows[0], rows[-1] + 1, 64], "entry": entry}
        note = {**body, "digest": json_digest(body)}
        (out / f"shard-{n:05d}.json").write_bytes(to_json(note))
    (out / "partial.json").write_bytes(to_json({"key": found.key}))
    (out / "manifest.json").unlink()
    broken = bytearray(good["shard-00001.safetensors"])
    broken[-1] ^= 1
    (out / "shard-00001.safetensors").write_bytes(bytes(broken))
    clip = fake_clip()
    again, _ = features(out, model=clip)
    assert clip.images_encoded == 15 - 4
    if not taken:
        assert again.records().pixels == [None] * 4 + found.records().pixels[4:]
        del good["manifest.json"]
    now = {path.name: path.read_bytes() for path in out.iterdir()}
    assert {name: now[name] for name in good} == good


def test_moved_features_open_and_hold_no_absolute_path(features, pictures, tmp_path):
    out = tmp_path / "out"
    features(out)
    moved = tmp_path / "moved"
    out.rename(moved)
    pictures.rename(tmp_path / "gone")
    records = open_source(moved)
    assert len(records) == 15
    assert str(tmp_path) not in (moved / "manifest.json").read_text()


def test_replacing_features_that_are_mapped(features, tmp_path):
    out = tmp_path / "out"
    found, _ = features(out)
    records = found.records()
    before = everything(records)
    for path in list(out.iterdir()):
        data = path.read_bytes()
        write_atomic(path, bytes(len(data)))
    assert all(torch.equal(a, b) for a, b in zip(before, everything(records), strict=True))


def test_batches_read_their_rows_only(features, tmp_path, small_shards, monkeypatch):
    features("out")
    opened: list[str] = []
    real = extract.FeatureSet.open.__func__.__globals__["file_digest"]  # type: ignore[attr-defined]

    def note(path: Path) -> str:
        opened.append(path.name)
        return str(real(path))

    monkeypatch.setattr("vtclip.data.featureset.file_digest", note)
    records = FeatureSet.open(tmp_path / "out").records()
    records.batch(torch.tensor([5, 6]))
    records.batch(torch.tensor([4]))
    assert opened == ["text.safetensors", "shard-00001.safetensors"]


def test_wishes_that_features_cannot_meet(features, tmp_path):
    out = tmp_path / "out"
    features(out, augment_passes=1)
    for wish, message in (
        ({"need_spatial": True}, "holds no spatial features"),
        ({"spatial": "pooled"}, "holds spatial None, asked for 'pooled'"),
        ({"augment_passes": 2}, "holds 1 augmented passes, asked for 2"),
        ({"templates": ["a {}"]}, "was made with 1 templates, e.g. 'a photo of a {}.'"),
        ({"prompt": "x"}, "for .npz files only"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(out, **wish)  # type: ignore[arg-type]
    assert open_source(out, augment_passes=1, templates=["a photo of a {}."]).num_passes == 1


def test_open_source_of_a_folder_takes_the_default_spatial_option(pictures, tmp_path, fake_clip):
    cache = tmp_path / "cache"
    records = open_source(pictures, model=fake_clip(), need_spatial=True, cache_dir=cache)
    assert records.info["spatial"] == "raw"
    assert (records.spatial_tokens, records.spatial_width) == (16, 12)
    split = few_shot_split(records.label, records.names, shots=1, seed=1)
    assert len(split.test) == 6
    with pytest.raises(ValueError, match="spatial: fake offers raw, got 'pooled'"):
        open_source(pictures, model=fake_clip(), spatial="pooled", cache_dir=cache)


def test_two_writers_give_one_set(cached, fake_clip):
    clips = [fake_clip() for _ in range(4)]
    out: list[Any] = [None] * 4
    gate = threading.Barrier(4)

    def build(number: int) -> None:
        gate.wait()
        out[number] = cached(model=clips[number])

    threads = [threading.Thread(target=build, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(report.reused for _, report in out) == [False, True, True, True]
    assert sum(clip.images_encoded for clip in clips) == 15
    assert len({found.key for found, _ in out}) == 1


def test_cache_folder_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("VTCLIP_CACHE", str(tmp_path / "here"))
    assert default_cache() == tmp_path / "here"
    monkeypatch.delenv("VTCLIP_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache() == tmp_path / ".cache" / "vtclip"


def test_cache_that_cannot_be_written_costs_a_warning_only(cached, tmp_path, caplog):
    (tmp_path / "file").write_text("not a folder")
    found, report = cached(cache_dir=tmp_path / "file")
    assert len(found) == 15
    assert not report.reused
    assert caplog.text.count("the cache cannot be written") == 1


def test_finished_cache_that_cannot_be_written_is_read(cached, fake_clip, monkeypatch):
    one, _ = cached()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    monkeypatch.setattr(extract, "only_writer", None)
    clip = fake_clip()
    two, report = cached(model=clip)
    assert report.reused
    assert clip.images_encoded == 0
    assert two.folder == one.folder


def test_size_is_told_before_writing(features, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    features("out")
    assert "features: 15 images, about 0.0 MB in" in caplog.text
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match="needs about 960 bytes, 100 are free"):
        features("other")


def test_nothing_is_printed(features, capfd):
    features("out", progress=True)
    assert capfd.readouterr() == ("", "")


def test_newer_and_foreign_manifests(features, tmp_path):
    out = tmp_path / "out"
    features(out)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps({**manifest, "version": 9}))
    with pytest.raises(ValueError, match="has format version 9, this vtclip reads version 1"):
        FeatureSet.open(out)
    (out / "manifest.json").write_text(json.dumps({**manifest, "width": 3}))
    with pytest.raises(FeaturesDamaged, match="does not match its own digest"):
        FeatureSet.open(out)
    (out / "manifest.json").write_text("{}")
    with pytest.raises(FeaturesDamaged, match="is not a manifest of vtclip-features"):
        FeatureSet.open(out)


def test_float16_spatial_error_is_one_rounding(features):
    rows = [
        features(d, spatial="raw", dtype=d)[0].records().batch(torch.arange(15))
        for d in ("float16", "float32")
    ]
    assert torch.equal(rows[0].image, rows[1].image)
    half, full = (row.spatial.numpy() for row in rows if row.spatial is not None)
    np.testing.assert_allclose(half, full, rtol=2**-11, atol=2**-25)
