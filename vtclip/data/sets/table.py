# SPDX-License-Identifier: Apache-2.0
"""The data sets of the protocol: folders, templates, counts, official lists, where to get them."""

from __future__ import annotations

from typing import Any

from vtclip.data.sets import aircraft, class_folders, imagenet, zhou
from vtclip.data.sets.known import SETS
from vtclip.data.sets.listing import Spec
from vtclip.names import nearest

GUIDE = "https://github.com/KaiyangZhou/CoOp/blob/main/DATASETS.md"
SPLITS = f"{GUIDE} and https://github.com/linzhiqiu/cross_modal_adaptation (splits/)"
PHOTO = "a photo of a {}."


def _split(name: str, title: str, file: str, **fields: Any) -> Spec:
    """A set with a split file split_zhou_FILE.json."""
    fields = {"template": PHOTO, "lists": SPLITS, **fields}
    return Spec(name, title, files=(f"split_zhou_{file}.json",), read=zhou.read_split, **fields)


def _variant(name: str, title: str, **fields: Any) -> Spec:
    """A test set over ImageNet's classes."""
    lists = f"{GUIDE} (a copy of imagenet/classnames.txt)"
    fields = {"read": imagenet.read_synsets, "classes": 1000, **fields}
    return Spec(name, title, template=PHOTO, files=(imagenet.CLASSNAMES,), lists=lists, **fields)


_TABLE = (
    Spec(
        "imagenet",
        "ImageNet",
        folder="imagenet",
        images="images",
        template=PHOTO,
        classes=1000,
        counts=(1_281_167, None, 50_000),
        files=(imagenet.CLASSNAMES,),
        read=imagenet.read_imagenet,
        home="https://www.image-net.org (asks for an account)",
        lists=GUIDE,
        aliases=("ilsvrc2012", "imagenet1k"),
    ),
    _split(
        "caltech101",
        "Caltech101",
        "Caltech101",
        folder="caltech-101",
        images="101_ObjectCategories",
        classes=100,
        counts=(4128, 1649, 2465),
        home="https://data.caltech.edu/records/mzrjq-6wc02 (www.vision.caltech.edu/Image_Datasets "
        "is gone)",
        list_sha256="52ce83205ff8ff8a1a18119aad6376120ae35c36e783a984bc560cbf10e73fa5",
        list_digest="e9d97dcf9ccf2a304e629752a7fe97d3d41e480836b99c09dd74463887aba9e3",
        folder_of=class_folders.folder,
        name_of=class_folders.caltech_name,
    ),
    _split(
        "oxford_pets",
        "OxfordPets",
        "OxfordPets",
        folder="oxford_pets",
        images="images",
        template="a photo of a {}, a type of pet.",
        classes=37,
        counts=(2944, 736, 3669),
        home="https://www.robots.ox.ac.uk/~vgg/data/pets/",
        aliases=("pets",),
        list_sha256="d7f3ffe65b3919f95132e51422894ae18686b83c331fd8c0adcdc3dc2de6301e",
        list_digest="cbd1d731ea0a5991d7e19d2db6e49257558ea8ace9d3d63d05e31bf64e2158c9",
        folder_of=class_folders.pets_folder,
        name_of=class_folders.pets_name,
    ),
    _split(
        "stanford_cars",
        "StanfordCars",
        "StanfordCars",
        folder="stanford_cars",
        images="",
        classes=196,
        counts=(6509, 1635, 8041),
        home="the original page (ai.stanford.edu/~jkrause/cars) is gone; copies: "
        "https://www.kaggle.com/datasets/jessicali9530/stanford-cars-dataset, "
        "https://github.com/zhengli97/PromptKD (docs/DATASETS.md)",
        aliases=("cars",),
    ),
    _split(
        "oxford_flowers",
        "Flowers102",
        "OxfordFlowers",
        folder="oxford_flowers",
        images="jpg",
        template="a photo of a {}, a type of flower.",
        classes=102,
        counts=(4093, 1633, 2463),
        home="https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        aliases=("flowers102", "flowers"),
        list_sha256="2f50c42fc1a17ca13c271cb4269b1347bdb43d2be672e34f74a4e4cbfbcca794",
        list_digest="e2a921f69ed8bc1a9c429e322ba52d50046394d6979ad96927976c07f8ba407b",
    ),
    _split(
        "food101",
        "Food101",
        "Food101",
        folder="food-101",
        images="images",
        template="a photo of {}, a type of food.",
        classes=101,
        counts=(50_500, 20_200, 30_300),
        home="https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/",
        lists=GUIDE,
        aliases=("food",),
        folder_of=class_folders.folder,
        name_of=class_folders.folder,
    ),
    Spec(
        "fgvc_aircraft",
        "FGVCAircraft",
        folder="fgvc_aircraft",
        images="images",
        template="a photo of a {}, a type of aircraft.",
        classes=100,
        counts=(3334, 3333, 3333),
        files=aircraft.FILES,
        read=aircraft.read_variants,
        home="https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/",
        lists="the data/ folder of the same archive",
        aliases=("aircraft", "fgvc"),
    ),
    _split(
        "sun397",
        "SUN397",
        "SUN397",
        folder="sun397",
        images="SUN397",
        classes=397,
        counts=(15_880, 3970, 19_850),
        home="https://vision.princeton.edu/projects/2010/SUN/ (its download fails since 2025); "
        "a copy: https://github.com/zhengli97/PromptKD (docs/DATASETS.md)",
        lists=GUIDE,
        aliases=("sun",),
        folder_of=class_folders.folder,
        name_of=class_folders.sun_name,
    ),
    _split(
        "dtd",
        "DTD",
        "DescribableTextures",
        folder="dtd",
        images="images",
        template="{} texture.",
        classes=47,
        counts=(2820, 1128, 1692),
        home="https://www.robots.ox.ac.uk/~vgg/data/dtd/",
        aliases=("describabletextures", "textures"),
        list_sha256="f26ebeccd2b58e68d70f07a0dc39fe49bf7b69024bac34396b954dfd87969c38",
        list_digest="883e303a5c12a388580cd231d60194f6b2d6ef3def499cd5cbef54a7fa5337ab",
        folder_of=class_folders.folder,
        name_of=class_folders.folder,
    ),
    _split(
        "eurosat",
        "EuroSAT",
        "EuroSAT",
        folder="eurosat",
        images="2750",
        template="a centered satellite photo of {}.",
        classes=10,
        counts=(13_500, 5400, 8100),
        home="https://github.com/phelber/EuroSAT (EuroSAT.zip, RGB; madm.dfki.de often fails, "
        "https://zenodo.org/records/7711810 has it)",
        list_sha256="541503a77d0b26b735d85ec7a3e672804fe0aa466c2e5f07da772cc6c0af8ad2",
        list_digest="a235b36ab77385a3082bd06dde4e2b34685c5ab089e09cfc85d9160a1bb5da9e",
        folder_of=class_folders.folder,
        name_of=class_folders.eurosat_name,
    ),
    _split(
        "ucf101",
        "UCF101",
        "UCF101",
        folder="ucf101",
        images="UCF-101-midframes",
        template="a photo of a person doing {}.",
        classes=101,
        counts=(7639, 1898, 3783),
        home=f"UCF-101-midframes.zip by way of {GUIDE} (videos: "
        "https://www.crcv.ucf.edu/data/UCF101.php)",
        list_sha256="d78cb834f7c5792ceaff2c5ee2d7c76a9e4086e48a3a6b01232989d29cbefdd8",
        list_digest="de05ce255872fbe8f981490f1bb0f1497dcb4e229bc661d922649ad143e8a333",
        folder_of=class_folders.folder,
        name_of=class_folders.ucf_name,
    ),
    _variant(
        "imagenetv2",
        "ImageNetV2",
        folder="imagenetv2",
        images="imagenetv2-matched-frequency-format-val",
        counts=(None, None, 10_000),
        read=imagenet.read_numbered,
        home="https://github.com/modestyachts/ImageNetV2 (matched-frequency; its S3 links have "
        "failed, https://huggingface.co/datasets/vaishaal/ImageNetV2 has it)",
        aliases=("imagenet_v2",),
    ),
    _variant(
        "imagenet_sketch",
        "ImageNet-Sketch",
        folder="imagenet-sketch",
        images="images",
        counts=(None, None, 50_889),
        home="https://github.com/HaohanWang/ImageNet-Sketch",
    ),
    _variant(
        "imagenet_a",
        "ImageNet-A",
        folder="imagenet-adversarial",
        images="imagenet-a",
        classes=200,
        counts=(None, None, 7500),
        home="https://github.com/hendrycks/natural-adv-examples",
    ),
    _variant(
        "imagenet_r",
        "ImageNet-R",
        folder="imagenet-rendition",
        images="imagenet-r",
        classes=200,
        counts=(None, None, 30_000),
        home="https://github.com/hendrycks/imagenet-r",
    ),
)

SETS.builtin.update({spec.name: spec for spec in _TABLE})


def _key(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())


def _spellings(spec: Spec) -> set[str]:
    return {_key(known) for known in (spec.name, spec.title, spec.folder, *spec.aliases)}


_KNOWN = {key: spec for spec in _TABLE for key in _spellings(spec)}


def known_as(name: str) -> Spec | None:
    """The data set of that spelling; those of others are looked at where none here has it."""
    key = _key(name)
    if key in _KNOWN:
        return _KNOWN[key]
    if name in SETS:
        return SETS[name]
    return next((spec for spec in SETS.values() if key in _spellings(spec)), None)


def find_set(name: str) -> Spec:
    """The data set of that name, title, folder or usual short name; case is ignored."""
    spec = known_as(name)
    if spec is None:
        raise ValueError(f"data: unknown data set {name!a}{nearest(name.casefold(), SETS)}")
    return spec
