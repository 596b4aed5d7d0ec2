# SPDX-License-Identifier: Apache-2.0
"""What an export traces, and the input on which its numbers are compared with the run's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vtclip.data.decode import ImageError, open_image
from vtclip.data.listed import list_images
from vtclip.data.sets import SetSource, as_source, open_listing
from vtclip.data.sources import source_kind
from vtclip.files import Json
from vtclip.heads import Head
from vtclip.runs.adapter import Adapter, load_adapter
from vtclip.runs.classifier import Classifier
from vtclip.runs.result import Run
from vtclip.runs.sources import RunSources

BATCHES = (1, 3)
Case = dict[str, tuple[Tensor, ...]]
"""Name of a check to the inputs it runs on."""


class ImageProgram(nn.Module):
    """Pixels [B, 3, H, W] -> probabilities [B, K]."""

    inputs, output = ("pixels",), "probabilities"

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier
        self.visual = classifier.clip.model.visual  # of the model only this is in the graph
        self.head = classifier.adapter.head

    def forward(self, pixels: Tensor) -> Tensor:
        image, spatial = self.classifier.encode(pixels)
        logits = self.head(image, spatial)
        return (logits / (self.classifier.adapter.temperature or 1.0)).softmax(dim=1)


class FeatureProgram(nn.Module):
    """Image features [B, C], and spatial ones [B, L, Cs] -> logits [B, K]."""

    output = "logits"

    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head
        self.inputs = ("image", "spatial") if head.needs_spatial else ("image",)

    def forward(self, image: Tensor, spatial: Tensor | None = None) -> Tensor:
        return self.head(image, spatial)


@dataclass
class ExportJob:
    """One export: what is traced, on what, and the same numbers by the run itself."""

    run: Run
    adapter: Adapter
    program: Any
    cases: Case
    expected: Callable[..., Tensor]
    preprocess: Json | None


def image_job(run: Run, model: str | Path | None) -> ExportJob:
    classifier = Classifier.load(run.folder, model=model, device="cpu")
    cfg = classifier.clip.preprocess_cfg
    height, width = (cfg["size"],) * 2 if isinstance(cfg["size"], int) else cfg["size"]
    cases: Case = {"random": (random_input(max(BATCHES), 3, height, width),)}
    real = real_pixels(run, classifier)
    if real is not None:
        cases["real"] = (real,)
    program = ImageProgram(classifier)
    return ExportJob(run, classifier.adapter, program, cases, classifier.probabilities, cfg)


def feature_job(run: Run, model: str | Path | None, cache_dir: str | Path | None) -> ExportJob:
    adapter = load_adapter(run.folder, result=run.result)
    features = adapter.features
    if features.get("weights_digest") is not None:
        images = image_job(run, model)
        adapter, preprocess = images.adapter, images.preprocess
        encode = images.program.classifier.encode
        cases: Case = {
            name: tuple(feature for feature in encode(*inputs) if feature is not None)
            for name, inputs in images.cases.items()
        }
    else:
        sources = RunSources(run, adapter, torch.device("cpu"), cache_dir=cache_dir)
        records = sources.opened(sources.own_source()).records
        rows = records.batch(torch.arange(min(max(BATCHES), len(records))))
        tokens = [rows.spatial] if adapter.head.needs_spatial and rows.spatial is not None else []
        cases, preprocess = {"real": (rows.image, *tokens)}, None
    shapes = [feature.shape[1:] for feature in next(iter(cases.values()))]
    cases["random"] = tuple(random_input(max(BATCHES), *shape) for shape in shapes)
    return ExportJob(run, adapter, FeatureProgram(adapter.head), cases, adapter.head, preprocess)


def real_pixels(run: Run, classifier: Classifier) -> Tensor | None:
    """Some images of the run's source, preprocessed [3, 3, H, W]; None where there are none."""
    pixels: list[Tensor] = []
    for path in real_paths(run):
        try:
            pixels.append(classifier.clip.preprocess(open_image(path)))
        except ImageError:
            continue
        if len(pixels) == max(BATCHES):
            break
    return torch.stack(pixels) if pixels else None


def real_paths(run: Run) -> list[Path]:
    options = run.result["config"]
    try:
        source = as_source(options["source"], options.get("data"))
        if isinstance(source, SetSource):
            listing = open_listing(source.spec, source.root)
            return [listing.image_root / name for name in listing.test.names[:8]]
        if source_kind(source) != "folder":
            return []
        folder = list_images(source, follow_links=bool(options.get("follow_links")))
    except (ValueError, OSError):  # moved or changed since: random input has to do
        return []
    step = max(1, len(folder.names) // max(BATCHES))
    return [folder.path(name) for name in folder.names[::step]]


def random_input(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def of_batches(cases: Case, sizes: tuple[int, ...]) -> Case:
    """Each case at each batch size, its rows repeated where it has too few."""
    batches: Case = {}
    for size in sizes:
        for name, inputs in cases.items():
            rows = torch.arange(size) % len(inputs[0])
            batches[f"{name}, batch {size}"] = tuple(x[rows].contiguous() for x in inputs)
    return batches
