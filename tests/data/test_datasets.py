# SPDX-License-Identifier: Apache-2.0
"""Python objects as sources: data sets of torchvision's kind, Hugging Face's, tables and pairs."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pictures import noise
from PIL import Image

from vtclip.data.image_files import InMemory
from vtclip.data.listed import list_images
from vtclip.data.sets import as_source
from vtclip.data.sources import open_source, source_kind

HUGGING_FACE = "needs the library datasets, which the extra of that name brings"


@pytest.fixture
def images(tmp_path):
    """15 pictures of 3 classes."""
    return noise(tmp_path / "images")


def listed(source, **options):
    return list_images(as_source(source, None), **options)


def image_folder(root, keep=lambda name: True):
    """What has the attributes of torchvision's ImageFolder."""
    classes = sorted(path.name for path in root.iterdir())
    samples = [
        (str(path), k)
        for k, name in enumerate(classes)
        for path in sorted((root / name).iterdir())
        if keep(f"{name}/{path.name}")
    ]
    return SimpleNamespace(root=str(root), classes=classes, samples=samples, transform=None)


class Pictures:
    """Items (PIL image, class number), as of torchvision's CIFAR10."""

    classes = ("cat", "dog", "ant", "never seen")

    def __init__(self, count=7, **attributes):
        self.seen = []
        self.count = count
        vars(self).update(attributes)

    def __len__(self):
        return self.count

    def __getitem__(self, row):
        self.seen.append(row)
        draw = np.random.default_rng(row)
        pixels = draw.integers(0, 256, (12, 14, 3)).astype(np.uint8)
        return Image.fromarray(pixels), row % 3


def test_an_image_folder_is_its_folder(images):
    assert as_source(image_folder(images), None) == images


def test_part_of_an_image_folder_is_what_it_lists(images):
    source = as_source(image_folder(images, lambda name: name != "cat/0.png"), None)
    assert isinstance(source, InMemory)
    assert source_kind(source) == "folder"
    found = list_images(source)
    assert found.root == images
    assert len(found.names) == 14
    assert "cat/0.png" not in found.names
    assert found.read("cat/1.png") == (images / "cat" / "1.png").read_bytes()
    subset = torch.utils.data.Subset(image_folder(images), [0, 6, 7])
    assert listed(subset).names == ["cat/0.png", "dog/1.png", "dog/2.png"]
    assert listed(subset).class_names == ["cat", "dog"]


def test_torchvision_agrees(images):
    torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
    assert as_source(torchvision.datasets.ImageFolder(images), None) == images


def test_items_are_images_with_the_classes_that_occur(images):
    data = Pictures()
    found = listed(data)
    assert found.class_names == ["cat", "dog", "ant"]
    assert found.label == [row % 3 for row in range(7)]
    assert found.names == [f"{row:06d}" for row in range(7)]
    pixels = np.asarray(Image.open(io.BytesIO(found.read("000004"))))
    assert (pixels == np.asarray(data[4][0])).all()
    assert found.size("000004") == len(found.read("000004"))
    named = listed(data, class_names={"cat": "a", "dog": "b", "ant": "c"})
    assert named.class_names == ["a", "b", "c"]


def test_targets_spare_reading_the_images():
    data = Pictures(targets=torch.arange(7) % 2)
    assert listed(data).label == [0, 1, 0, 1, 0, 1, 0]
    assert data.seen == [0]
    changed = Pictures(targets=[0] * 7, target_transform=lambda k: k)
    assert listed(changed).label == [row % 3 for row in range(7)]


def test_a_subset_keeps_the_numbers_of_its_items():
    subset = torch.utils.data.Subset(Pictures(), [5, 1, 3])
    inner = torch.utils.data.Subset(subset, [0, 2])
    found = listed(inner)
    assert found.names == ["000005", "000003"]
    assert found.class_names == ["cat", "ant"]
    assert found.label == [1, 0]


def test_pairs_and_tables_list_files(images, monkeypatch):
    monkeypatch.chdir(images)
    paths = ["cat/0.png", Path("dog/0.png"), str(images / "dog" / "1.png")]
    for labels in ([4, 10, 10], np.array([4, 10, 10]), torch.tensor([4, 10, 10])):
        found = listed((paths, labels))
        assert found.root == images
        assert found.names == ["cat/0.png", "dog/0.png", "dog/1.png"]
        assert found.class_names == ["4", "10"]
    pandas = pytest.importorskip("pandas", reason="needs pandas, which the extra tables brings")
    table = pandas.DataFrame({"path": map(str, paths), "label": ["a", "b", "b"], "other": 1})
    assert listed(table).label == [0, 1, 1]
    table.loc[1, "label"] = None
    with pytest.raises(ValueError, match="DataFrame row 1, column label: the label is empty"):
        as_source(table, None)


def test_a_dictionary_of_splits_has_roles(images):
    parts = {"train": Pictures(7), "val": Pictures(4), "test": Pictures(2)}
    found = listed(parts)
    assert found.roles == [0] * 7 + [1] * 4 + [2] * 2
    assert found.names[-1] == "test/000001"
    assert found.read("test/000001") == found.read("train/000001")
    folders = {"train": image_folder(images), "test": Pictures(3)}
    found = listed(folders)
    assert found.class_names == ["cat", "dog", "eel", "ant"]
    assert found.read("train/dog/0.png") == (images / "dog" / "0.png").read_bytes()
    with pytest.raises(ValueError, match="splits must be called train, .*, got 'all'"):
        as_source({"all": Pictures()}, None)


@pytest.mark.parametrize(
    "source", [np.zeros((3, 4)), torch.zeros(3), 7, None, [], ["a"], object(), b"x", (1, 2, 3)]
)
def test_anything_else_is_refused_with_what_is_accepted(source):
    with pytest.raises(TypeError, match="source: must be a folder of class folders, a list") as e:
        as_source(source, None)
    assert f"got {type(source).__name__}" in str(e.value)


@pytest.mark.parametrize(
    ("source", "error", "match"),
    [
        ({}, ValueError, "the dict holds no splits"),
        (([], []), ValueError, "the pair lists no images"),
        ((["a"], ["x", "y"]), ValueError, "1 paths need as many labels, got 2"),
        (([1.5], ["x"]), TypeError, "a pair must be .paths, labels., got floats"),
        ((3, 4), TypeError, "a pair must be .paths, labels., got int and int"),
        ((["a.png"], ["x"]), ValueError, "the pair: 1 of 1 listed images cannot be read"),
        (Pictures(0), ValueError, "the Pictures holds no images"),
        (Pictures(targets=[9] * 7), ValueError, "item 0: label 9 is none of the 4 classes"),
        (Pictures(targets=[None] * 7), ValueError, "item 0: must be a class or its number"),
    ],
)
def test_bad_objects_are_refused_in_one_line(source, error, match):
    with pytest.raises(error, match=match) as caught:
        as_source(source, None)
    assert "\n" not in str(caught.value)


def test_items_that_are_no_pictures_are_refused():
    data = [(torch.zeros(3, 4, 4), 0)]
    kind = type("Tensors", (list,), {"classes": ["a"]})
    with pytest.raises(TypeError, match="item 0 must hold a PIL image, got Tensor; leave out"):
        as_source(kind(data), None)
    with pytest.raises(TypeError, match="item 0 must be .image, class., got 3"):
        as_source(kind([3]), None)


def test_images_in_memory_have_features_and_no_path(fake_clip, tmp_path):
    records = open_source(Pictures(), model=fake_clip(), cache_dir=tmp_path, progress=False)
    assert len(records) == 7
    source = as_source(Pictures(), None)
    assert str(source) == "in memory: 7 images of a Pictures"
    assert source.resolve() is source
    with pytest.raises(ValueError, match="on no disk and cannot be listed again; give a source"):
        as_source(str(source), None)


@pytest.fixture
def hugging_face(images):
    """The 15 pictures as a data set, their bytes in it."""
    datasets = pytest.importorskip("datasets", reason=HUGGING_FACE)
    names = ["dog", "cat", "eel", "none"]
    cells = [
        ({"bytes": path.read_bytes(), "path": None}, names.index(path.parent.name))
        for path in sorted(images.glob("*/*.png"))
    ]
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=names)}
    )
    columns = {"image": [cell[0] for cell in cells], "label": [cell[1] for cell in cells]}
    return datasets.Dataset.from_dict(columns, features=features)


def test_a_dataset_is_read_without_decoding(hugging_face, images):
    found = listed(hugging_face)
    assert found.class_names == ["dog", "cat", "eel"]
    assert found.names[6] == "000006"
    assert found.read("000006") == (images / "dog" / "1.png").read_bytes()
    shuffled = hugging_face.shuffle(seed=0).select(range(4)).with_format("numpy")
    assert len(listed(shuffled).names) == 4


def test_a_saved_dataset_is_a_folder_source(hugging_face, images, tmp_path):
    hugging_face.save_to_disk(tmp_path / "saved")
    assert source_kind(tmp_path / "saved") == "folder"
    found = list_images(tmp_path / "saved")
    assert found.root == tmp_path / "saved"
    assert found.read("000000") == (images / "cat" / "0.png").read_bytes()
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(ValueError, match="saved is not a readable saved dataset"):
        list_images(tmp_path / "saved")


def test_splits_of_a_saved_dataset_are_roles(hugging_face, tmp_path):
    import datasets

    parts = datasets.DatasetDict(train=hugging_face, test=hugging_face.select(range(3)))
    parts.save_to_disk(tmp_path / "saved")
    found = list_images(tmp_path / "saved")
    assert found.roles == [0] * 15 + [2] * 3
    assert found.names[0] == "train/000000"
    assert found.names[-1] == "test/000002"


def test_other_columns_of_a_dataset(images, monkeypatch):
    datasets = pytest.importorskip("datasets", reason=HUGGING_FACE)
    path = str(images / "cat" / "0.png")
    found = listed(datasets.Dataset.from_dict({"file": [path], "class": ["x"]}))
    assert found.read(found.names[0]) == Path(path).read_bytes()
    assert found.class_names == ["x"]
    image, words = datasets.Image(), datasets.Value("string")
    both = datasets.Features({"a": image, "b": image, "label": words})
    with pytest.raises(ValueError, match="must have one column of images, got a, b"):
        listed(datasets.Dataset.from_dict({"a": [path], "b": [path], "label": ["x"]}, both))
    several = datasets.Sequence(datasets.ClassLabel(names=["x", "y"]))
    lists = datasets.Features({"image": image, "label": several})
    found = listed(datasets.Dataset.from_dict({"image": [path], "label": [[1, 0]]}, lists))
    assert found.labels == [[1, 0]]
    assert found.read("000000") == Path(path).read_bytes()
    unlabelled = datasets.Features({"image": image, "label": datasets.ClassLabel(names=["x"])})
    with pytest.raises(ValueError, match="row 0, column label: label -1 is none of the 1 classes"):
        listed(datasets.Dataset.from_dict({"image": [path], "label": [-1]}, unlabelled))
