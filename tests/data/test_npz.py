# SPDX-License-Identifier: Apache-2.0
""".npz sources: real features against published accuracies, and files that are refused."""

from __future__ import annotations

import csv
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from vtclip.data import Records, open_source
from vtclip.data.npz import class_texts

RNG = np.random.default_rng(0)


def accuracy(records: Records) -> float:
    batch = records.batch(torch.arange(len(records)))
    return 100 * float(((batch.image @ records.text.T).argmax(1) == batch.label).float().mean())


def arrays(**change: Any) -> dict[str, Any]:
    out: dict[str, Any] = {
        "image": RNG.normal(size=(6, 4)).astype(np.float16),
        "label": np.array([0, 1, 2, 0, 1, 2]),
        "classname": np.array(["cat", "dog", "eel"]),
        "text": RNG.normal(size=(3, 4)).astype(np.float32),
    }
    out.update(change)
    return {key: value for key, value in out.items() if value is not None}


def save(tmp_path: Path, **change: Any) -> Path:
    path = tmp_path / "features.npz"
    np.savez(path, **arrays(**change))
    return path


@pytest.mark.parametrize(
    ("need_spatial", "rows", "classes", "expected"),
    [(False, 9583, 45, 88.98), (True, 1513, 18, 89.76)],
)
def test_fashion_zero_shot(shared_data, need_spatial, rows, classes, expected):
    records = open_source(shared_data / "mira_tinyclip_fashion.npz", need_spatial=need_spatial)
    assert (len(records), len(records.class_names), records.has_spatial) == (
        rows, classes, need_spatial,
    )  # fmt: skip
    assert accuracy(records) == pytest.approx(expected, abs=0.005)
    assert records.logit_scale == pytest.approx(18.33, abs=0.01)


def test_fashion_spatial_tokens_lie_in_text_space(shared_data):
    path = shared_data / "mira_tinyclip_fashion.npz"
    records = open_source(path, need_spatial=True)
    assert (records.spatial_tokens, records.spatial_width) == (256, 128)
    with np.load(path) as arrays:
        row = int(arrays["spatial_index"][7])
        assert records.names[7] == str(arrays["fname"][row])
        expected = arrays["spatial"][7].astype(np.float32) @ arrays["projection"]
        image = arrays["image"][row].astype(np.float32)
    batch = records.batch(torch.tensor([7]))
    assert batch.spatial is not None
    # 32 products of numbers around 1
    np.testing.assert_allclose(batch.spatial[0].numpy(), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(batch.image[0].numpy(), image)


@pytest.mark.parametrize(("backbone", "mean"), [("ViT-B-32", 81.29), ("RN50", 71.54)])
def test_published_accuracy_of_every_prompt(shared_data, backbone, mean):
    path = shared_data / f"whurs19_CLIP_{backbone}.npz"
    assert accuracy(open_source(path)) == pytest.approx(mean, abs=0.005)
    with open(shared_data / "whurs19_published_accuracies.csv", encoding="utf-8") as file:
        published = {
            row["text_prompt"]: float(row["acc_base_zs"])
            for row in csv.DictReader(file)
            if (row["model_name"], row["model_architecture"]) == ("CLIP", backbone)
        }
    with np.load(path) as stored:
        arrays = {key: stored[key] for key in ("text", "prompt")}
    assert {str(prompt) for prompt in arrays["prompt"]} - set(published) == {"averageprompt"}
    assert len(published) == 106
    records = open_source(path)
    batch = records.batch(torch.arange(len(records)))
    far = {}
    for prompt, wish in published.items():
        text, _, used = class_texts(path, arrays, prompt)
        assert used == [prompt]
        hits = (batch.image @ text.T).argmax(1) == batch.label
        # 1,005 images: one image is 0.0995 points, the features are rounded to float16
        if abs(100 * float(hits.float().mean()) - wish) > 0.3:
            far[prompt] = wish
    assert far == {}
    prompt = "a satellite photo of a"
    assert accuracy(open_source(path, prompt=prompt)) == pytest.approx(published[prompt], abs=0.3)


def test_mean_of_prompts_leaves_the_average_out(tmp_path):
    text = RNG.normal(size=(3, 3, 4)).astype(np.float32) * np.array([1, 10, 1])[:, None, None]
    path = save(tmp_path, text=text, prompt=np.array(["one", "two", "averageprompt"]))
    unit = text / np.linalg.norm(text, axis=-1, keepdims=True)
    mean = unit[:2].mean(0)
    records = open_source(path)
    np.testing.assert_allclose(
        records.text.numpy(), mean / np.linalg.norm(mean, axis=-1, keepdims=True), atol=1e-6
    )
    assert records.info["templates"] == ["one", "two"]
    np.testing.assert_allclose(open_source(path, prompt="two").text.numpy(), unit[1], atol=1e-6)
    with pytest.raises(ValueError, match="no prompt 'tow' among 3, e.g. 'two'"):
        open_source(path, prompt="tow")


def test_rows_and_classes_follow_spatial_index(tmp_path):
    spatial = RNG.normal(size=(2, 5, 7)).astype(np.float16)
    path = save(tmp_path, spatial=spatial, spatial_index=np.array([5, 3]))
    assert not open_source(path).has_spatial
    records = open_source(path, need_spatial=True)
    assert records.class_names == ["cat", "eel"]
    assert records.names == ["5", "3"]
    assert records.label.tolist() == [1, 0]
    batch = records.batch(torch.tensor([1]))
    assert batch.spatial is not None
    np.testing.assert_array_equal(batch.spatial[0].numpy(), spatial[1].astype(np.float32))


def test_spatial_of_all_rows_needs_no_index(tmp_path):
    records = open_source(save(tmp_path, spatial=np.ones((6, 2, 3), np.float16)))
    assert (records.spatial_tokens, records.spatial_width, len(records)) == (2, 3, 6)


def test_scale_defaults_to_100_and_temperature_is_its_log(tmp_path):
    assert open_source(save(tmp_path)).logit_scale == 100
    assert open_source(save(tmp_path, temperature=np.log(50.0))).logit_scale == pytest.approx(50)


def row_of(value: float) -> np.ndarray:
    """Image features whose row 4 is `value` throughout."""
    image = np.ones((6, 4))
    image[4] = value
    return image


NAN = np.full((6, 4), 1, np.float16)
NAN[2, 1] = np.nan


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"text": None}, "array 'text' is missing, got classname, image, label"),
        ({"image": NAN}, r"\.npz: records: image must be finite, got NaN .* in 1 rows: 2$"),
        ({"image": np.zeros((6, 4), np.float32)}, r"\.npz: records: image .* no zero rows, got 6"),
        # lengths that float32 cannot tell from 0 and from infinity
        ({"image": row_of(1e-30)}, r"\.npz: records: image must hold no zero rows, got 1: 4$"),
        ({"image": row_of(1e30)}, r"\.npz: records: image must hold no overlong rows, got 1: 4$"),
        ({"text": np.eye(4, 4)[[0, 1, 3]] * [1, 0, 1, 1]}, r"\.npz: records: text .* got 1: 1$"),
        ({"image": np.ones((6, 4), np.int32)}, "image must hold floats, got int32"),
        ({"image": np.ones((6, 4, 1), np.float32)}, "image must have 2 non-empty dimensions"),
        ({"label": np.array([1, 2, 3, 1, 2, 3])}, r"labels must lie in 0\.\.2 .* got 1\.\.3"),
        ({"label": np.zeros(5, int)}, "label must hold 6 entries, got 5"),
        ({"label": np.zeros(6)}, "label must be a row of integers, got float64"),
        ({"classname": np.array(["cat", "dog", "Cat"])}, "'cat' and 'Cat' are the same"),
        ({"classname": np.array([1, 2, 3])}, "classname must be a row of strings"),
        ({"classname": np.array(["a", "b"])}, "text must be"),
        ({"classname": np.array(["a", None, "c"])}, "holds Python objects, which are never loaded"),
        ({"text": np.ones((3, 5), np.float32)}, "share their width, got 5 and 4"),
        ({"text": np.ones((2, 3, 4)), "prompt": np.array(["a"])}, "name the 2 rows of text, got 1"),
        ({"spatial": np.ones((5, 2, 3))}, "spatial must hold 6 rows, got 5"),
        ({"spatial": np.ones((1, 2, 3)), "spatial_index": np.array([9])}, "different rows below 6"),
        (
            {"spatial": np.ones((6, 2, 3)), "projection": np.ones((2, 4))},
            r"projection must be \[3, C\]",
        ),
        ({"temperature": np.float64(1000)}, "must be one log of a scale"),
    ],
)
def test_bad_arrays_name_the_array(tmp_path, change, message):
    with pytest.raises((ValueError, TypeError), match=message):
        open_source(save(tmp_path, **change))


def test_needs_that_a_file_cannot_meet(tmp_path):
    path = save(tmp_path)
    with pytest.raises(ValueError, match="there is no array 'spatial'"):
        open_source(path, need_spatial=True)
    with pytest.raises(ValueError, match="text is for one prompt"):
        open_source(path, prompt="x")
    with pytest.raises(ValueError, match="templates cannot be chosen"):
        open_source(path, templates=["a {}"])
    with pytest.raises(ValueError, match="no augmented passes, got 2"):
        open_source(path, augment_passes=2)


@pytest.mark.parametrize("size", [0, 1, 30, -200, -1])
def test_truncated_file(tmp_path, size):
    path = save(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: size if size >= 0 else len(data) + size])
    with pytest.raises(ValueError, match=r"features.npz: not a readable .npz file"):
        open_source(path)


def test_flipped_bits_in_stored_arrays_are_found_by_the_checksum(tmp_path):
    path = save(tmp_path)
    data = bytearray(path.read_bytes())
    position = data.index(b"\x93NUMPY") + 140  # within the first array's values
    data[position] ^= 4
    path.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="not a readable"):
        open_source(path)


def test_zip_bomb_is_refused_before_it_is_unpacked(tmp_path):
    path = tmp_path / "bomb.npz"
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("image.npy", "w") as member,
    ):
        for _ in range(65):
            member.write(bytes(2**20))
    with pytest.raises(ValueError, match=r"image.npy unpacks to 68157440 bytes from \d+; refused"):
        open_source(path)


def test_unknown_sources(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        open_source(tmp_path / "nothing.npz")
    (tmp_path / "table.txt").write_text("a,b")
    with pytest.raises(ValueError, match="must be a folder of class folders, a list"):
        open_source(tmp_path / "table.txt")


def test_a_header_of_python_2_is_read_without_a_warning(tmp_path):
    """Whole numbers end in L there, which NumPy mends and warns of."""
    path, other = save(tmp_path), tmp_path / "old.npz"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(other, "w") as target:
        for name in source.namelist():
            data = source.read(name)
            if name == "label.npy":
                data = re.sub(rb"\((\d+),\), \} {5}", rb"(\1L,), }    ", data, count=1)
                assert b"L,)" in data
            target.writestr(name, data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        old = open_source(other)
    assert torch.equal(old.label, open_source(path).label)
