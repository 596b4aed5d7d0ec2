# SPDX-License-Identifier: Apache-2.0
"""The endpoints."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from vtclip import __version__
from vtclip.data.decode import ImageError
from vtclip.files import Json, several, to_json
from vtclip.machine import why_out_of_memory
from vtclip.serve import schema
from vtclip.serve.guard import SAID, error_body
from vtclip.serve.limits import API_VERSION, Refusal
from vtclip.serve.pages import FILES, describe, read_page
from vtclip.serve.predictor import Found, Predictor, entries, table
from vtclip.serve.uploads import Upload, boundary_of, check_length, images_of, read_body
from vtclip.serve.work import Desk, Job

Topk = Annotated[int, Query(ge=1, le=1000, description="classes of each image, best first")]
UNKNOWN = 'say "unknown" of images of no class, at this rate for others; 0: never'
Unknown = Annotated[float | None, Query(ge=0, le=1, description=UNKNOWN)]
COVERAGE = "also the set of classes that holds the true one this often"
Coverage = Annotated[float | None, Query(gt=0, le=1, description=COVERAGE)]
CLASS = "the class to explain; default: the predicted one"
ClassName = Annotated[str | None, Query(alias="class", max_length=1000, description=CLASS)]
Top = Annotated[int, Query(ge=1, le=100, description="rows for and rows against, each")]
Format = Annotated[Literal["json", "png"], Query(description="png: the heat map alone")]
Number = Annotated[int, Path(description="training_image of a row of an explanation")]
SHOWN = 3  # unreadable images that the log names
LEFT = "the client closed the connection"


class Endpoints:
    """One method per endpoint; FastAPI reads their parameters."""

    def __init__(self, predictor: Predictor, desk: Desk) -> None:
        self.predictor, self.desk = predictor, desk

    async def health(self) -> Response:
        """Whether the service is ready, and what runs in it."""
        return answer(self.predictor.health())

    async def classes(self) -> Response:
        """The classes, what else the run can say, and the limits of a request."""
        return answer(self.predictor.classes())

    async def predict(
        self,
        request: Request,
        topk: Topk = 5,
        unknown: Unknown = None,
        coverage: Coverage = None,
    ) -> Response:
        """Classes of one or more images; one that cannot be read has an error, others do not."""
        found = await self._found(request, topk, unknown, coverage)
        return answer({"api_version": API_VERSION, "images": entries(found)})

    async def batch(
        self,
        request: Request,
        topk: Topk = 1,
        unknown: Unknown = None,
        coverage: Coverage = None,
    ) -> Response:
        """The same as a CSV file, with text that no spreadsheet takes for a formula."""
        found = await self._found(request, topk, unknown, coverage)
        headers = {"content-disposition": 'attachment; filename="predictions.csv"'}
        return Response(table(found).encode("utf-8"), 200, headers, "text/csv; charset=utf-8")

    async def explain(
        self,
        request: Request,
        class_name: ClassName = None,
        top: Top = 5,
        format: Format = "json",
    ) -> Response:
        """Why a class: the training images that weigh most; the heat map of methods with one."""

        def work(uploads: list[Upload], job: Job) -> Json:
            if len(uploads) > 1:
                raise Refusal(422, f"one image is explained at a time, got {len(uploads)}")
            return self.predictor.explanation(uploads[0], class_name, top, job)

        about = await self._worked(request, work)
        if format == "json":
            return answer(about)
        if about["heat_map"] is None:
            raise Refusal(409, "not available for this method: it has no heat map")
        return Response(base64.b64decode(about["heat_map"]), media_type="image/png")

    async def training_image(self, number: Number) -> Response:
        """A training image of the run, small, by its number in an explanation."""
        with self.desk.place(self.predictor.limits.timeout) as job:
            data = await self.desk.run(job, lambda: self.predictor.thumbnail(number, job))
        return Response(data, media_type="image/png")

    async def _found(
        self, request: Request, topk: int, unknown: float | None, coverage: float | None
    ) -> list[Found]:
        asked = self.predictor.asked(unknown, coverage)
        found: list[Found] = await self._worked(
            request, lambda uploads, job: self.predictor.answers(uploads, topk, asked, job)
        )
        request.scope[SAID] += said_of(found)
        return found

    async def _worked(self, request: Request, work: Callable[[list[Upload], Job], Any]) -> Any:
        """What `work` makes of the images of a request, within its place and time."""
        limits, desk = self.predictor.limits, self.desk
        boundary = boundary_of(request.headers)
        check_length(request.headers, limits)
        with desk.place(limits.timeout) as job:
            body = await desk.read(job, read_body(request.stream(), limits))

            def parsed_and_worked() -> Any:
                try:
                    uploads = images_of(body, boundary, limits, job.check)
                    body.clear()
                    return work(uploads, job)
                except (MemoryError, RuntimeError) as error:
                    full = why_out_of_memory(error)
                    if not full:
                        raise
                    raise Refusal(503, "not enough memory", {"Retry-After": "10"}) from error

            return await desk.run(job, parsed_and_worked)


def said_of(found: Sequence[Found]) -> list[str]:
    """For the log: how many images, and the names of the first that cannot be read."""
    names = [upload.name for upload, one in found if isinstance(one, ImageError)]
    more = "" if len(names) <= SHOWN else ", ..."
    unread = [f"{len(names)} unreadable: {', '.join(map(ascii, names[:SHOWN]))}{more}"]
    return [several(len(found), "image"), *(unread if names else [])]


def answer(value: Json) -> Response:
    return Response(to_json(value), media_type="application/json")


def build_app(predictor: Predictor, desk: Desk | None = None) -> FastAPI:
    """The application without its guard (vtclip.serve.guard)."""
    app = FastAPI(
        title="vtclip serve",
        version=__version__,
        summary="A fitted run as a service",
        openapi_url="/api/openapi.json",
        docs_url=None,  # the framework's pages take scripts from another host
        redoc_url=None,
    )
    ends = Endpoints(predictor, desk or Desk())
    errors = schema.ERRORS
    for path, end, model in (
        ("/health", ends.health, schema.Health),
        ("/api/classes", ends.classes, schema.Classes),
    ):
        app.add_api_route(path, end, methods=["GET"], response_model=model)
    several_images, one_image = schema.upload_of(True), schema.upload_of(False)
    app.add_api_route("/api/predict", ends.predict, methods=["POST"], responses=errors,
                      response_model=schema.Images, openapi_extra=several_images)  # fmt: skip
    app.add_api_route("/api/explain", ends.explain, methods=["POST"],
                      responses={**errors, **schema.NOT_AVAILABLE},
                      response_model=schema.Explanation, openapi_extra=one_image)  # fmt: skip
    app.add_api_route("/api/batch", ends.batch, methods=["POST"], response_class=Response,
                      responses={200: {"content": {"text/csv": {}}}, **errors},
                      openapi_extra=several_images)  # fmt: skip
    app.add_api_route("/api/training-image/{number}", ends.training_image, methods=["GET"],
                      responses={200: {"content": {"image/png": {}}}, **schema.GONE},
                      response_class=Response)  # fmt: skip
    _add_pages(app)
    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(HTTPException, not_found)
    app.add_exception_handler(RequestValidationError, not_valid)
    app.add_exception_handler(ClientDisconnect, left)
    app.add_exception_handler(Exception, failed)
    return app


def _add_pages(app: FastAPI) -> None:
    def page(name: str) -> Callable[[], Any]:
        data, kind = read_page(name), FILES[name]

        async def send() -> Response:
            return Response(data, media_type=kind)

        return send

    async def docs() -> Response:
        return Response(describe(app.openapi()), media_type="text/html; charset=utf-8")

    app.add_api_route("/", page("index.html"), methods=["GET"], include_in_schema=False)
    app.add_api_route("/docs", docs, methods=["GET"], include_in_schema=False)
    for name in FILES:
        app.add_api_route(f"/page/{name}", page(name), methods=["GET"], include_in_schema=False)


def failure(request: Request, status: int, line: str, headers: Any = None) -> Response:
    request.scope.setdefault(SAID, []).append(line)
    return Response(error_body(line), status, headers, "application/json")


async def refused(request: Request, error: Any) -> Response:
    return failure(request, error.status, error.line, dict(error.headers))


async def not_found(request: Request, error: Any) -> Response:
    """Of the framework: an unknown path, or another method than an endpoint has."""
    return failure(request, error.status_code, str(error.detail).lower(), error.headers)


async def not_valid(request: Request, error: Any) -> Response:
    """The first parameter that is not what the endpoint takes."""
    first = error.errors()[0]
    name = str(first["loc"][-1])
    return failure(request, 422, f"{name}: {first['msg'].lower()}, got {str(first['input'])!a}")


async def left(request: Request, _error: Any) -> Response:
    return failure(request, 400, LEFT)


async def failed(_request: Request, _error: Any) -> Response:
    return Response(error_body("internal error"), 500, media_type="application/json")
