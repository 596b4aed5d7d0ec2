# SPDX-License-Identifier: Apache-2.0
"""open_clip's architectures on meta tensors, which have shapes and no memory.

One of each family; all of them with --all-architectures.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from vtclip.clip import Clip, listing, model
from vtclip.clip.names import architectures

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
# prefix of the names -> the page's family; the first that fits
FAMILIES = {
    r"RN": "CLIP, ResNet",
    r"ViT-.*SigLIP": "SigLIP, SigLIP 2",
    r"ViT-": "CLIP, ViT (OpenAI, LAION, CLIPA, worldwide)",
    r"EVA": "EVA01, EVA02",
    r"MobileCLIP": "MobileCLIP, MobileCLIP 2",
    r"PE-Core": "PE-Core",
    r"ViTamin": "ViTamin",
    r"convnext": "ConvNeXt",
    r"coca": "CoCa",
    r"": "other trunks of timm",
}
ONE_OF_EACH = [
    *("RN50", "ViT-S-32", "ViT-B-16-SigLIP", "ViT-B-32-SigLIP2-256", "EVA02-B-16"),
    *("MobileCLIP-S1", "MobileCLIP2-S3", "PE-Core-T-16-384", "ViTamin-S", "convnext_tiny"),
    *("coca_base", "coca_ViT-B-32", "swin_base_patch4_window7_224"),
]


def family_of(name: str) -> str:
    return next(family for prefix, family in FAMILIES.items() if re.match(prefix, name))


def has_text_of_transformers(name: str) -> bool:
    import open_clip

    return "hf_model_name" in open_clip.get_model_config(name)["text_cfg"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "architecture" in metafunc.fixturenames:
        everything = metafunc.config.getoption("--all-architectures", default=False)
        known = [n for n in sorted(architectures().values()) if not has_text_of_transformers(n)]
        metafunc.parametrize("architecture", known if everything else ONE_OF_EACH)


@pytest.fixture
def clip(architecture, monkeypatch) -> Clip:
    network: Any = listing.build_on_meta(architecture)
    del network._parameters["logit_scale"]  # the only number that is read
    network.logit_scale = torch.zeros(())
    monkeypatch.setattr(model, "_digest", lambda _: "")
    import open_clip

    config = {"model_cfg": open_clip.get_model_config(architecture)}
    return Clip(network, SimpleNamespace(context_length=77), config, device="meta")


def test_features_have_the_sizes_that_are_named(clip, architecture):
    size = clip.preprocess_cfg["size"]
    height, width = (size, size) if isinstance(size, int) else size
    pixels = torch.zeros(2, 3, height, width, device="meta")
    image, spatial = clip.encode_image(pixels)
    assert (tuple(image.shape), spatial) == ((2, clip.width), None)
    for name, channels in clip.spatial_options.items():
        image, tokens = clip.encode_image(pixels, name)
        assert tuple(image.shape) == (2, clip.width)
        assert isinstance(tokens, Tensor)
        assert (tokens.shape[0], tokens.shape[2]) == (2, channels), name
        assert tokens.shape[1] >= 16
    context = clip.config["model_cfg"]["text_cfg"].get("context_length", 77)
    tokens = torch.zeros(3, context, dtype=torch.long, device="meta")
    assert tuple(clip.model.encode_text(tokens).shape) == (3, clip.width)
    assert listing.built(architecture).spatial == clip.spatial_options
    (options,) = re.findall(
        rf"^\| {re.escape(family_of(architecture))} \| .* \| (.*) \|$", PAGE, re.M
    )
    if clip.spatial_options:
        assert set(clip.spatial_options) <= set(
            re.findall(r"`(raw|pooled|value|projected)`", options)
        )
    else:
        assert "none" in options


def test_the_page_counts_every_architecture():
    names = [name for name in architectures().values() if not has_text_of_transformers(name)]
    counts = dict.fromkeys(FAMILIES.values(), 0)
    for name in names:
        counts[family_of(name)] += 1
    for family, count in counts.items():
        assert re.search(rf"^\| {re.escape(family)} \| {count}\b", PAGE, re.M), (family, count)
    assert f"{len(names)} of {len(architectures())} give" in PAGE
    assert {family_of(name) for name in ONE_OF_EACH} == set(counts)


def test_an_architecture_that_needs_more_is_refused_in_one_line():
    with pytest.raises(ValueError, match="roberta-ViT-B-32 cannot be built here: .*") as caught:
        listing.built("roberta-ViT-B-32")
    assert "\n" not in str(caught.value)
