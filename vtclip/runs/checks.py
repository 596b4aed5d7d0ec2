# SPDX-License-Identifier: Apache-2.0
"""Everything that can be refused of a fit without decoding an image, in one place, before the work.

Listing a folder takes milliseconds, extracting its features minutes: what the list of files, the
names of classes and options say is wrong is said first, and nothing has been written then.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from vtclip.clip import load_clip, resolve_templates
from vtclip.clip.texts import templates_of
from vtclip.data.featureset import FeatureSet
from vtclip.data.image_files import ImageFiles
from vtclip.data.joined import labels_among
from vtclip.data.listed import list_images
from vtclip.data.records import Records
from vtclip.data.sets import AnySource, SetSource, open_listing
from vtclip.data.sources import source_kind
from vtclip.data.splits import check_counts, dealt
from vtclip.files import Json, cache_folder, is_below
from vtclip.heads import HEADS
from vtclip.names import option
from vtclip.runs.folder import can_return_finished, check_run_folder, run_folder, source_folders
from vtclip.runs.opening import NUMBERS, check_no_own, named_as
from vtclip.runs.refit import no_validation_images
from vtclip.runs.request import FitRequest
from vtclip.runs.together import list_of
from vtclip.train.lora import check_peft
from vtclip.train.rows import no_test_images

WIDTH = 480  # of the features that a head's options are tried on


def check_before_work(request: FitRequest, records: Records | None = None) -> dict[str, ImageFiles]:
    """Raise what is wrong with a request; the files of its sources, as they were listed.

    records: the rows of the source, where they are open already and nothing is listed.
    The files are those of "source", "val" and "test", of sources that hold images.
    """
    folder = run_folder(request)
    check_run_folder(folder, request)
    if can_return_finished(folder, request):
        return {}
    check_options(request)
    if records is not None:
        return {}
    check_cache(request)
    sources: dict[str, AnySource | None] = {
        "source": request.source, "val": request.val, "test": request.test
    }  # fmt: skip
    listed = {}
    for role, source in sources.items():
        with named_as(role):
            files = None if source is None else files_of(source, request)
        if files is not None:
            listed[role] = files
    unlabelled = list_of(request.unlabelled, request.follow_links)
    class_names = class_names_of(request, listed)
    for role in NUMBERS:
        if role in listed and "source" in listed:
            check_no_own(role, listed["source"].roles or [], request.source)
        if role in listed and class_names:
            labels_among(role, class_names, listed[role].class_names)
    if "source" in listed and not request.pseudo_labels:
        check_images(request, listed)
    if "source" in listed:
        check_sentences(request, class_names)
    if class_names:
        check_names(request, class_names)
    if unlabelled is not None:
        listed["unlabelled"] = unlabelled
    return listed


def check_options(request: FitRequest) -> None:
    """Refuse templates that are none, and options of the head that it does not take."""
    if request.templates is not None:
        resolve_templates(list(request.templates))
    if request.lora:
        check_peft()
    if request.train_encoders:
        return
    shots = request.known_shots
    options: Json = {**request.settings(16 if isinstance(shots, str) else shots).head}
    kind = HEADS[request.method]
    if kind.needs_spatial:
        options.setdefault("spatial_dim", WIDTH)
    try:
        kind(torch.eye(2, WIDTH), **options)
    except ValueError as error:
        if str(WIDTH) not in str(error):  # else of the width, which the features will say
            raise


def check_sentences(request: FitRequest, class_names: Sequence[str]) -> None:
    """Refuse sentences per class that leave out a class of the images."""
    if request.templates is not None:
        templates_of(resolve_templates(list(request.templates)), class_names)


def check_cache(request: FitRequest) -> None:
    """Refuse a cache that would be written among the images."""
    cache = cache_folder(request.cache_dir)
    for what, place in source_folders(request).items():
        if not isinstance(request.source, SetSource) and is_below(cache, place):
            raise ValueError(f"{option('cache_dir')} {cache} lies inside the {what} {place}")


def files_of(source: AnySource, request: FitRequest) -> ImageFiles | None:
    """The image files of a source; None of a data set and of features that exist already."""
    if isinstance(source, SetSource) or source_kind(source) in ("npz", "features"):
        return None
    return list_images(source, follow_links=request.follow_links, class_names=request.class_names)


def class_names_of(request: FitRequest, listed: dict[str, ImageFiles]) -> list[str]:
    """The classes of the training source; none where only opening it says them."""
    source = request.source
    if "source" in listed:
        return listed["source"].class_names
    if isinstance(source, SetSource):
        return list(open_listing(source.spec, source.root).class_names)
    if isinstance(source, Path) and source_kind(source) == "features":
        return list(FeatureSet.open(source).fields["class_names"])
    return []


def check_images(request: FitRequest, listed: dict[str, ImageFiles]) -> None:
    """Refuse classes with too few images for the shots, and a source without test images."""
    files, learns = listed["source"], request.learns
    roles = files.roles or [0] * len(files.label)
    own = {*roles, *(number for role, number in NUMBERS.items() if getattr(request, role))}
    counts = [0] * len(files.class_names)
    for label, role in zip(files.label, roles, strict=True):
        counts[label] += role == 0
    fraction = 0.0 if 2 in own else request.test_fraction
    shots = request.known_shots
    if shots == 0 and learns:
        raise ValueError(f"{option('shots')} must be at least 1 to train, got 0")
    if not learns and fraction == 1:
        shots = 0
    if 2 not in own and not any(int(n * fraction) for n in counts):
        raise ValueError(no_test_images(fraction))
    if request.base_to_new:  # the other half of the classes is not trained on
        counts = counts[: (len(counts) + 1) // 2]
    check_counts(counts, shots, fraction, request.rule, files.class_names)
    pools = [n - int(n * fraction) for n in counts]
    if request.refit and 1 not in own and not any(dealt(n, shots, request.rule)[1] for n in pools):
        raise no_validation_images(str(request.source))


def check_names(request: FitRequest, class_names: Sequence[str]) -> None:
    """Refuse class names that leave learned prompts no room in the text encoder."""
    if not HEADS[request.method].needs_text_encoder:
        return
    model: str | Path = request.model
    if isinstance(request.source, Path) and source_kind(request.source) == "features":
        model = FeatureSet.open(request.source).manifest["model_name"]
    clip = load_clip(model, request.device)
    options: Json = {**request.settings(1).head}
    head = HEADS[request.method](torch.zeros(len(class_names), clip.width), **options)
    head.check_names(clip, class_names)
