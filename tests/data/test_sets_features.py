# SPDX-License-Identifier: Apache-2.0
"""Records of data sets: roles, draws, caches, unreadable images, an untouched root."""

from __future__ import annotations

import logging
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from vtclip.data import open_source
from vtclip.data.coop_sampling import coop_picks
from vtclip.data.joined import JoinedStore
from vtclip.data.records import MemoryStore, Records
from vtclip.data.sets import SETS, SetError, as_source, open_listing
from vtclip.heads.config import FitConfig
from vtclip.train.rows import split_rows
from vtclip.train.rows import test_rows as rows_to_count


@pytest.fixture
def root(tmp_path: Path, trees: ModuleType) -> Path:
    """EuroSAT in small: 3 classes of 6 training, 3 validation and 4 test images."""
    made: Path = trees.make_split(tmp_path / "root", "eurosat")
    return made


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def opened(root: Path, cache: Path, clip: Any, name: str = "eurosat", **options: Any) -> Records:
    options = {"shots": 2, "seed": 1, **options}
    source = as_source(name, root)
    return open_source(source, model=clip, cache_dir=cache, progress=False, **options)


def test_rows_are_the_picks_and_the_test_list(root, cache, fake_clip, trees):
    before = trees.fingerprint(root)
    records = opened(root, cache, fake_clip())
    assert trees.fingerprint(root) == before
    listing = open_listing(SETS["eurosat"], root)
    assert listing.val is not None
    picks = coop_picks(listing.train.label, listing.val.label, shots=2, seed=1)
    split = split_rows(records, FitConfig(epochs=1), 2, 1, 0.5)

    def names(rows: torch.Tensor) -> list[str]:
        return [records.names[row] for row in rows.tolist()]

    assert names(split.train) == [listing.train.names[row] for row in picks.train]
    assert names(split.val) == [listing.val.names[row] for row in picks.val]
    assert names(split.test) == listing.test.names
    assert torch.equal(rows_to_count(records), split.test)
    assert records.label[split.test].tolist() == listing.test.label
    assert records.class_names == ["Annual Crop Land", "River", "Sea or Lake"]
    assert records.info["templates"] == ["a centered satellite photo of {}."]
    assert records.info["set"] == {
        "name": "eurosat",
        "lists": listing.digest(),
        "official": False,
        "shots": 2,
        "seed": 1,
        "val_from": "val",
        "repeated_in_test": 0,
    }
    assert records.info["digests"]["lists"] == listing.digest()


def test_features_are_those_of_the_files(root, cache, fake_clip):
    from vtclip.data.decode import open_image

    clip = fake_clip()
    records = opened(root, cache, clip)
    images = SETS["eurosat"].image_root(root)
    pixels = torch.stack([clip.preprocess(open_image(images / name)) for name in records.names])
    want = clip.encode_image(pixels)[0]
    got = records.batch(torch.arange(len(records)), 0)
    torch.testing.assert_close(got.image, want, rtol=1e-5, atol=1e-5)


def test_texts_of_each_template_come_along(root, cache, fake_clip):
    records = opened(root, cache, fake_clip(), templates="imagenet7")
    views = fake_clip().encode_text_views(records.class_names, "imagenet7")
    torch.testing.assert_close(records.text_views, views, rtol=0, atol=1e-6)


def test_another_draw_encodes_its_own_images_only(root, cache, fake_clip):
    clip = fake_clip()
    first = opened(root, cache, clip)
    assert clip.images_encoded == 6 + 6 + 12
    opened(root, cache, clip)
    assert clip.images_encoded == 24
    second = opened(root, cache, clip, seed=2)
    assert clip.images_encoded == 24 + 12
    digests = [records.info["digests"] for records in (first, second)]
    assert digests[0]["test_images"] == digests[1]["test_images"]
    assert digests[0]["images"] != digests[1]["images"]
    alone = opened(root, cache, clip, shots=0)
    assert clip.images_encoded == 36
    assert len(alone) == len(rows_to_count(alone)) == 12


def test_augmented_passes_belong_to_the_drawn_images(root, cache, fake_clip):
    clip = fake_clip()
    clip.augment = lambda image, generator: clip.preprocess(image).flip(-1)
    records = opened(root, cache, clip, augment_passes=2, need_spatial=True)
    split = split_rows(records, FitConfig(epochs=1), 2, 1, 0.5)
    assert clip.images_encoded - 12 == 12 * 3 + 2  # and one blank image per feature set
    assert records.num_passes == 2
    assert records.has_spatial
    plain, turned = (records.batch(split.train, number) for number in (0, 2))
    assert not torch.equal(plain.image, turned.image)
    assert plain.spatial is not None
    assert plain.spatial.shape == (6, 16, 12)
    with pytest.raises(ValueError, match="test images have no augmented pass 1"):
        records.batch(split.test, 1)


def test_roles_survive_selections(root, cache, fake_clip):
    records = opened(root, cache, fake_clip())
    half = records.subset_classes([2, 0])
    split = split_rows(half, FitConfig(epochs=1), 2, 1, 0.5)
    assert [len(split.train), len(split.val), len(split.test)] == [4, 4, 8]
    rows = torch.tensor([len(records) - 1, 0])
    picked = records.select(rows)
    assert picked.roles is not None
    assert picked.roles.tolist() == [2, 0]
    with pytest.raises(ValueError, match=r"roles must be \[2\], got \[3\]"):
        Records(
            MemoryStore(torch.ones(2, 4)),
            class_names=["a"],
            text=torch.ones(1, 4),
            label=torch.zeros(2, dtype=torch.long),
            names=["x", "y"],
            roles=torch.zeros(3, dtype=torch.int8),
        )


def test_a_split_of_roles_has_the_digest_of_its_names(root, cache, fake_clip):
    one, other = (opened(root, cache, fake_clip(), seed=seed) for seed in (1, 2))
    digests = [
        split_rows(records, FitConfig(epochs=1), 2, 1, 0.5).digest for records in (one, one, other)
    ]
    assert digests[0] == digests[1] != digests[2]


def test_imagenet_validates_on_training_images_that_were_left(tmp_path, cache, fake_clip, trees):
    root = trees.make_imagenet(tmp_path / "root")
    clip = fake_clip()
    records = opened(root, cache, clip, "imagenet")
    assert records.info["set"]["val_from"] == "train"
    assert records.roles is not None
    assert torch.bincount(records.roles.long()).tolist() == [8, 8, 12]
    assert clip.images_encoded == 8 + 8 + 12  # not the other 16 training images
    assert torch.equal(records.text[1], records.text[2])  # both are a "missile"
    assert len(set(records.class_names)) == 4


def test_test_sets_have_no_shots(tmp_path, cache, fake_clip, trees):
    root = trees.make_set(tmp_path / "root", "imagenet_a")
    with pytest.raises(SetError, match="fit imagenet, then evaluate the run on this one"):
        opened(root, cache, fake_clip(), "imagenet_a")
    records = opened(root, cache, fake_clip(), "imagenet_a", shots=0)
    assert records.class_names == ["tench", "missile (n04008634)"]


def test_images_that_are_absent_or_unreadable(root, cache, fake_clip, trees):
    rows, images = trees.read_rows(root, "eurosat"), SETS["eurosat"].image_root(root)
    (images / rows["test"][0][0]).write_bytes(b"<html>gone</html>")
    records = opened(root, cache, fake_clip())
    assert len(rows_to_count(records)) == 11
    assert [name for name, _ in records.info["skipped"]] == [rows["test"][0][0]]
    listing = open_listing(SETS["eurosat"], root)
    drawn = listing.train.names[coop_picks(listing.train.label, None, shots=2, seed=1).train[0]]
    data = (images / drawn).read_bytes()
    (images / drawn).write_bytes(data[: len(data) // 2])
    with pytest.raises(SetError, match=rf"the drawn image {drawn} cannot be read: damaged"):
        opened(root, cache, fake_clip())
    (images / drawn).unlink()
    with pytest.raises(SetError, match=rf"1 listed images are not there, first {drawn} \(no such"):
        opened(root, cache, fake_clip())


def test_a_test_image_among_the_drawn_ones_is_reported(root, cache, fake_clip, trees, caplog):
    rows, images = trees.read_rows(root, "eurosat"), SETS["eurosat"].image_root(root)
    listing = open_listing(SETS["eurosat"], root)
    row = coop_picks(listing.train.label, None, shots=2, seed=1).train[0]
    (images / rows["test"][0][0]).write_bytes((images / listing.train.names[row]).read_bytes())
    with caplog.at_level(logging.WARNING):
        records = opened(root, cache, fake_clip())
    assert records.info["set"]["repeated_in_test"] == 1
    assert "1 drawn images have the same content as a test image" in caplog.text


def test_what_cannot_be_asked_of_a_set(root, cache, fake_clip, trees):
    before = trees.fingerprint(root)
    with pytest.raises(
        SetError, match=r"eurosat: shots = 7 needs 7 .* the smallest has 6: class 'Sea or Lake'"
    ):
        opened(root, cache, fake_clip(), shots=7)
    with pytest.raises(SetError, match="prompt must be left out with a data set, got 'x'"):
        opened(root, cache, fake_clip(), prompt="x")
    for place in (root, root / "eurosat" / "cache"):
        with pytest.raises(SetError, match="nothing is written below the data root"):
            opened(root, place, fake_clip())
    assert trees.fingerprint(root) == before
    assert not cache.exists()


def test_another_template_and_other_lists_make_other_features(root, cache, fake_clip, trees):
    first = opened(root, cache, fake_clip())
    other = opened(root, cache, fake_clip(), templates="a {}.")
    assert first.info["digests"]["features"] != other.info["digests"]["features"]
    rows = trees.read_rows(root, "eurosat")
    rows["test"].pop()
    trees.write_split(root, "eurosat", rows)
    less = opened(root, cache, fake_clip())
    assert len(rows_to_count(less)) == 11
    assert less.info["digests"]["test_images"] != first.info["digests"]["test_images"]


def test_joined_stores_return_rows():
    first = MemoryStore(torch.arange(12.0).reshape(3, 1, 4).expand(3, 2, 4), None)
    second = MemoryStore(100 + torch.arange(8.0).reshape(2, 4), None)
    store = JoinedStore([first, second], [3, 2])
    rows = torch.tensor([4, 0, 3, 2])
    assert store.image(rows, 0)[:, 0].tolist() == [104.0, 0.0, 100.0, 8.0]
    assert store.num_passes == 1
    with pytest.raises(ValueError, match="no spatial features"):
        store.spatial(rows, 0)
    with pytest.raises(ValueError, match="one shape"):
        JoinedStore([first, MemoryStore(torch.ones(2, 5))], [3, 2])
