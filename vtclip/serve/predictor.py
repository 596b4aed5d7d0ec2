# SPDX-License-Identifier: Apache-2.0
"""What the service says of images: the answers of the run, as values that JSON can hold.

Every method that takes a job looks at its clock between images. Images are decoded one after the
other, so that a request holds the pixels of one at a time, and computed under one lock.
"""

from __future__ import annotations

import base64
import contextlib
import io
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

from PIL import Image, ImageOps
from torch import Tensor

from vtclip import __version__
from vtclip.data.decode import ImageError, decode
from vtclip.data.formats import formats_of
from vtclip.data.image_cost import too_costly
from vtclip.files import Json, csv_lines
from vtclip.names import index_of
from vtclip.runs.answers import Answer, Rule
from vtclip.runs.classifier import Classifier
from vtclip.runs.pictures import Picture
from vtclip.runs.training_images import TrainingImages, training_images
from vtclip.runs.why import IMAGE, check_explainable, explain_choice, has_heat_map
from vtclip.serve.limits import API_VERSION, Limits, Refusal
from vtclip.serve.uploads import Upload
from vtclip.serve.work import Job

BATCH = 16  # images that are computed between two looks at the clock
THUMBNAIL = 240  # pixels of the longer side
RATES = (0.05, 0.1, 0.2)  # of "unknown" where none is named: the least that the run allows
COVERAGES = (0.95, 0.9, 0.8)  # of sets that the page asks for: the most that the run allows
CSV_COLUMNS = ("image", "rank", "label", "probability", "unknown", "in_set", "error")


class Asked(NamedTuple):
    """The rate of "unknown" and the coverage of sets; None where neither is wanted."""

    unknown: float | None
    coverage: float | None


Found = tuple[Upload, Answer | ImageError]


class Predictor:
    """A loaded run with what it can say beyond classes; several threads may call it.

    unknown: the rate of "unknown" where a request names none; None takes what the run allows, 0
    says it of no image. A ValueError where the run has no scores for it.
    """

    def __init__(
        self,
        folder: str | Path,
        classifier: Classifier,
        limits: Limits,
        unknown: float | None = None,
    ) -> None:
        self.folder, self.classifier, self.limits = Path(folder), classifier, limits
        self.adapter = classifier.adapter
        self._computing = threading.Lock()
        if unknown:
            Rule(self.adapter, unknown, None)
        named = () if unknown is not None else RATES
        self.unknown = unknown or self._allowed("unknown", named)
        self.coverage = self._allowed("coverage", COVERAGES)
        self.heat_map = has_heat_map(self.adapter)
        self.why_not = "" if self.heat_map else self._why_not()
        self._images: TrainingImages | None = None
        self._warm_up()

    def health(self) -> Json:
        return {
            "api_version": API_VERSION,
            "status": "ready",
            "version": __version__,
            "run": self.folder.resolve().name,
            "method": self.adapter.head.method,
            "classes": len(self.classifier.class_names),
            "model": self.classifier.clip.name,
            "device": str(self.classifier.device),
        }

    def classes(self) -> Json:
        limits = self.limits
        return {
            "api_version": API_VERSION,
            "classes": self.classifier.class_names,
            "several_labels": "multi_label" in self.adapter.features,
            "unknown": self.unknown,
            "coverage": self.coverage,
            "explain": "heat map" if self.heat_map else None if self.why_not else "training images",
            "max_upload": limits.max_upload,
            "max_images": limits.max_images,
            "max_pixels": limits.max_pixels,
            "timeout": limits.timeout,
        }

    def asked(self, unknown: float | None, coverage: float | None) -> Asked:
        """What a request asks for beyond classes, or the Refusal of what the run does not allow."""
        asked = Asked(self.unknown if unknown is None else unknown or None, coverage)
        try:
            Rule(self.adapter, *asked)
        except ValueError as error:
            raise Refusal(422, str(error)) from None
        return asked

    def answers(self, uploads: Sequence[Upload], topk: int, asked: Asked, job: Job) -> list[Found]:
        """Each image with what is said of it, or with the reason why it cannot be read."""
        pixels = []
        for upload in uploads:
            job.check()
            pixels.append(self._pixels(upload))
        found: list[Answer | ImageError] = []
        with job.holding(self._computing):
            for answer in self.classifier.answer_each(
                cast("list[Picture]", pixels),  # an ImageError passes through as it is
                topk,
                batch_size=BATCH,
                unknown=asked.unknown,
                coverage=asked.coverage,
            ):
                job.check()
                found.append(answer)
        return list(zip(uploads, found, strict=True))

    def explanation(self, upload: Upload, class_name: str | None, top: int, job: Job) -> Json:
        """Why a class and not another, or where it looks; of a named class or the predicted."""
        if self.why_not:
            raise Refusal(409, f"not available for this method: {self.why_not}")
        if class_name is not None:
            try:
                index_of(class_name, self.classifier.class_names)
            except ValueError as error:
                raise Refusal(422, str(error)) from None
        job.check()
        picture = self._picture(upload)
        if isinstance(picture, ImageError):
            raise Refusal(422, str(picture))
        with job.holding(self._computing):
            return {"api_version": API_VERSION, "image": upload.name,
                    **self._explained(picture, class_name, top)}  # fmt: skip

    def _explained(self, picture: Image.Image, class_name: str | None, top: int) -> Json:
        if self.heat_map:
            (best, *_) = found = self.classifier.predict(picture, len(self.classifier.class_names))
            chosen = next((one for one in found if one.label == class_name), best)
            about: Json = {"label": chosen.label, "probability": chosen.probability}
        else:
            why, _ = explain_choice(self.classifier, picture, self._images_of, class_name, top)
            about = why.to_json()
            for shown, row in zip(about["rows"], why.rows, strict=True):
                known = row.kind == IMAGE and self._has_pictures
                shown["training_image"] = row.number if known else None
        heat = self.classifier.heat_map(picture, about["label"])
        about["heat_map"] = None if heat is None else base64.b64encode(png(heat)).decode("ascii")
        return about

    def thumbnail(self, number: int, job: Job) -> bytes:
        """The training image of this number as a small PNG, or a Refusal with status 404."""
        count = len(self._images.names or []) if self._images else 0
        if not 0 <= number < count or self._images is None:
            raise Refusal(404, f"no training image {number}: the run lists {count}")
        job.check()
        picture = self._images.open(number)
        if picture is None:
            raise Refusal(404, f"training image {number} is gone, or is not that of the fit")
        picture.thumbnail((THUMBNAIL, THUMBNAIL))
        return png(picture)

    @property
    def _has_pictures(self) -> bool:
        return self._images is not None and self._images.names is not None

    def _images_of(self, labels: list[str]) -> TrainingImages:
        if self._images is None:
            self._images = training_images(self.folder, labels)
        return self._images

    def _warm_up(self) -> None:
        """One image through all of it, so that the first request finds everything in place."""
        blank = Image.new("RGB", (64, 64), "white")
        self.classifier.predict(blank)
        if not self.why_not:
            self._explained(blank, None, 1)

    def _allowed(self, name: str, values: Sequence[float]) -> float | None:
        """The first of `values` that the scores of the run allow."""
        for value in values:
            with contextlib.suppress(ValueError):
                Rule(self.adapter, *Asked(None, None)._replace(**{name: value}))
                return value
        return None

    def _why_not(self) -> str:
        try:
            check_explainable(self.adapter)
        except ValueError as error:
            return str(error)
        return ""

    def _picture(self, upload: Upload) -> Image.Image | ImageError:
        """The image in RGB; what is larger than this service takes is not decoded."""
        try:
            if not upload.data:
                raise ImageError(upload.name, "the file is empty")
            _check_pixels(upload, self.limits.max_pixels)
            return decode(upload.data, upload.name)
        except ImageError as error:
            return error

    def _pixels(self, upload: Upload) -> Tensor | ImageError:
        picture = self._picture(upload)
        if isinstance(picture, ImageError):
            return picture
        pixels: Tensor = self.classifier.clip.preprocess(picture)
        return pixels


def _check_pixels(upload: Upload, most: int) -> None:
    """By the header alone; whatever cannot be opened is left to `decode` and its reasons."""
    if too_costly(upload.data) is not None:
        return
    try:
        with Image.open(io.BytesIO(upload.data), formats=formats_of(upload.name)) as image:
            width, height = image.size
    except Exception:  # decoders raise many kinds for damaged data
        return
    if width * height > most:
        raise ImageError(upload.name, f"{width} x {height} is more than {most} pixels")


def png(picture: Image.Image) -> bytes:
    """The pixels alone: nothing that a file holds beside them."""
    plain = ImageOps.contain(picture.convert("RGB"), picture.size)
    plain.info.clear()
    data = io.BytesIO()
    plain.save(data, format="PNG")
    return data.getvalue()


def entries(found: Sequence[Found]) -> list[Json]:
    """As `vtclip predict --json` prints them."""
    rows: list[Json] = []
    for upload, answer in found:
        row: Json = {"image": upload.name}
        if isinstance(answer, ImageError):
            rows.append(row | {"error": answer.reason})
            continue
        row["predictions"] = [one._asdict() for one in answer.predictions]
        if answer.unknown is not None:
            row |= {"unknown": answer.unknown, "p_value": answer.p_value}
        if answer.set is not None:
            row["set"] = [one.label for one in answer.set]
        rows.append(row)
    return rows


def table(found: Sequence[Found]) -> str:
    """CSV_COLUMNS of every image and class; an image that cannot be read has one row with why.

    Text is as `vtclip.files.escape` has it. Of a set with more classes than were asked for all have
    rows.
    """
    rows: list[Sequence[object]] = [CSV_COLUMNS]
    for upload, answer in found:
        if isinstance(answer, ImageError):
            rows.append([upload.name, *[""] * (len(CSV_COLUMNS) - 2), answer.reason])
            continue
        inside = len(answer.set or [])
        classes = [*answer.predictions, *(answer.set or [])[len(answer.predictions) :]]
        unknown = "" if answer.unknown is None else str(answer.unknown).lower()
        for rank, one in enumerate(classes, start=1):
            in_set = "" if answer.set is None else str(rank <= inside).lower()
            rows.append([upload.name, rank, one.label, one.probability, unknown, in_set, ""])
    return csv_lines(rows)
