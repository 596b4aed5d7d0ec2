# SPDX-License-Identifier: Apache-2.0
"""Whether a run's head is fitted once more, on training and validation images, and what is said.

Validation images choose hyper-parameters, temperature and the weights of a pool. Once they have
chosen, a last fit with the same settings takes them for training images too, and is what the run
saves and tests. Everything that is said of validation images (predictions.csv, the temperature, the
scores behind `predict --unknown`) stays what the fit before said, which had not trained on them.

`FitRequest.refit` None decides by the source. It is on for images of one's own (folders, lists,
saved data sets, features folders) that have validation images, no more of them than training
images, and for a method that learns from images. It is off for data sets of the field, .npz tables
and exact shots, whose k shots are compared with others' k shots; for several labels per image; and
with base_to_new, pseudo_labels or train_encoders, with which it cannot be asked for either.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from vtclip.files import Json, several
from vtclip.names import option
from vtclip.train.fit_head import refit_rows
from vtclip.train.methods import fits_images

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from vtclip.data.records import Records
    from vtclip.data.splits import Split
    from vtclip.runs.request import FitRequest
    from vtclip.train.steps import TrainingRun

logger = logging.getLogger(__name__)
OWN_IMAGES = "features"  # Records.info["kind"] of images that went through a model
EXCLUDES = ("base_to_new", "pseudo_labels", "train_encoders")


def refits(request: FitRequest, records: Records, split: Split) -> bool:
    """Whether the request's head is fitted once more on training and validation rows.

    A ValueError where that is asked for and there are no validation rows, or several labels per
    image.
    """
    if request.refit is False or not fits_images(request.method):
        return False
    if any(getattr(request, name) for name in EXCLUDES):
        return False
    counts = split.counts()
    if records.targets is not None:
        if request.refit:
            raise ValueError(
                f"{option('refit')}: {request.source} has several labels per image, and it takes "
                "one only"
            )
        return False
    if request.refit:
        if not counts["val"]:
            raise no_validation_images(str(request.source))
        return True
    own = records.info.get("kind") == OWN_IMAGES and not request.exact_shots
    if not own or not counts["val"]:
        return False
    if counts["val"] > counts["train"]:
        logger.warning(
            "no fit on the validation images, whose number, %d, is above the %d training images "
            "that the settings are for; %s trains on them too",
            counts["val"], counts["train"], option("refit"),
        )  # fmt: skip
        return False
    return True


def no_validation_images(source: str) -> ValueError:
    """The error of a refit without images to add."""
    return ValueError(
        f"{option('refit')}: {source} gives no validation image, and there is nothing to add to "
        "the training images"
    )


def refit_split(split: Split) -> Split:
    """The split with its validation rows among the training rows; its digest stays."""
    return replace(split, train=refit_rows(split), val=split.val[:0])


def logged_as(run: TrainingRun, stage: str) -> TrainingRun:
    """The run, with `stage` in each row of its log."""
    return replace(run, log=partial(_log_stage, run.log, stage))


def _log_stage(
    log: Callable[[Mapping[str, object]], None], stage: str, row: Mapping[str, object]
) -> None:
    log({"stage": stage, **row})


def refit_line(result: Json) -> str:
    """What a run says of its last fit, with the numbers of images."""
    config, counts = result["config"], result["images"]
    each = {(row["train"], row["val"]) for row in result["images_per_class"].values()}
    if len(each) == 1:
        train, val = each.pop()
        what = f"{several(train, 'shot')} + {several(val, 'validation image')} per class"
    else:
        what = f"{several(counts['train'], 'training image')} + {counts['val']} validation images"
    more = ""
    if config.get("draw") == "exact" or str(config["source"]).endswith(".npz"):
        more = f", more than the {several(result['shots'], 'shot')} that it is compared by"
    images = several(result["refit"]["images"], "image")
    return (
        f"refit on {what} ({images}{more}) with the chosen settings; --no-refit keeps the first fit"
    )
