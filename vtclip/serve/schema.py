# SPDX-License-Identifier: Apache-2.0
"""The shapes of the answers and of the requests, for the OpenAPI description.

Pictures of a request are parsed by vtclip.serve.uploads and answers are written as they are; these
classes say what they hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vtclip.serve.uploads import FIELD


@dataclass
class Health:
    """What runs here; the service answers as soon as it is ready."""

    api_version: int
    status: str
    version: str
    run: str
    method: str
    classes: int
    model: str
    device: str


@dataclass
class Classes:
    """The classes in the order of the run, what else it can say, and the limits of a request.

    unknown: the rate of "unknown" where a request names none; null: it is not said.
    coverage: of prediction sets, the largest of 0.95, 0.9, 0.8 that may be asked for; null: none.
    explain: "heat map", "training images" or null.
    """

    api_version: int
    classes: list[str]
    several_labels: bool
    unknown: float | None
    coverage: float | None
    explain: str | None
    max_upload: int
    max_images: int
    max_pixels: int
    timeout: float


@dataclass
class Prediction:
    """probability: calibrated by the run's temperature."""

    label: str
    probability: float


@dataclass
class Image:
    """One image: its predictions, best first, or why it cannot be read.

    unknown and p_value: where they are asked for. set: the classes that hold the true one with the
    coverage that was asked for; it may be empty.
    """

    image: str
    predictions: list[Prediction] | None = None
    unknown: bool | None = None
    p_value: float | None = None
    set: list[str] | None = None
    error: str | None = None


@dataclass
class Images:
    """The images in the order in which they were sent."""

    api_version: int
    images: list[Image]


@dataclass
class Row:
    """A training image or the prompts of a class: what it adds to the log-odds.

    training_image: its number for GET /api/training-image/ID; null of prompts.
    """

    kind: str
    name: str
    label: str
    cosine: float
    log_odds: float
    training_image: int | None = None


@dataclass
class Explanation:
    """Why `label` and not `other`, or where `label` looks.

    heat_map: a PNG file in base64, of methods with attention; the fields after it are null of
    method vtclip, which has the heat map alone.
    """

    api_version: int
    image: str
    label: str
    probability: float
    heat_map: str | None = None
    other: str | None = None
    other_probability: float | None = None
    log_odds: float | None = None
    temperature: float | None = None
    terms: dict[str, float] | None = None
    rows: list[Row] | None = None
    rest: dict[str, float] | None = None
    notes: list[str] | None = None


@dataclass
class Error:
    """One line."""

    error: str


def upload_of(several: bool) -> dict[str, Any]:
    """The body of a request with one or more images, for FastAPI's openapi_extra."""
    image = {"type": "string", "format": "binary"}
    images = {"type": "array", "items": image, "minItems": 1} if several else image
    form = {"type": "object", "required": [FIELD], "properties": {FIELD: images}}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form}}}}


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": Error, "description": text}
    for status, text in {
        400: "the body is not a form, or the request has no one Host",
        403: "a page of another site sent it",
        408: "the body came too slowly",
        413: "too many bytes or images",
        415: "not multipart/form-data",
        421: "another Host than the service's",
        422: "a value or an image cannot be used",
        503: "too many requests; come again after Retry-After seconds",
        504: "the time limit passed",
    }.items()
}
GONE: dict[int | str, dict[str, Any]] = {
    404: {"model": Error, "description": "no such number, or the file is gone or has changed"}
}
NOT_AVAILABLE: dict[int | str, dict[str, Any]] = {
    409: {"model": Error, "description": "not available for this method"}
}
