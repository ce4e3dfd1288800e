"""HTTP routes of the endpoint, with its web page, and its ASGI application; the `Ingress` replica grades."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import APIRouter, FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import FileResponse
from starlette.routing import Route

from scalp_core.errors import ImageError
from serving.admission.limits import Load
from serving.api import batch, bulk, inference, review, single, web
from serving.api.middleware import install
from serving.api.single import GradeOptions
from serving.http import openapi, problems
from serving.observability.audit import AuditLog
from serving.replicas.ingress import Replica
from serving.schemas.grading import ExplainedResponse, GradeResponse, Health, ModelResponse
from serving.schemas.store import KeptResponse
from serving.settings import Settings

_BATCH_SIZE = {
    "description": "number of images in the forward pass; 0: cached answer",
    "schema": {"type": "integer"},
}

router = APIRouter()


@router.post(
    "/v1/grade",
    tags=["grade"],
    response_model=ExplainedResponse | KeptResponse | GradeResponse,
    openapi_extra=single.request_body(),
    responses={
        200: {"headers": {openapi.BATCH_SIZE: _BATCH_SIZE}},
        **openapi.problem_responses(415, 422),
    },
)
async def grade(request: Request, replica: Replica, options: Annotated[GradeOptions, Query()]) -> Response:
    """Grade one image (JPEG, PNG, WebP, BMP, TIFF, DICOM), sent as the body or as the field `file` of a form.

    The options are in the query, or fields of the form. The image is not stored, unless `keep` asks for it.
    """
    image, options = await single.read_image(request, options)
    if options.keep:
        single.check_keep(replica.settings.store)
    try:
        answer, batch_size = await replica.grade(image, options.heatmap, options.heatmap_grade)
    except ImageError as error:
        raise problems.refuse_image(error) from None
    if options.keep and replica.keeper:
        answer = await replica.keeper.keep(image, answer)
    # A ready response: FastAPI would validate the answer again.
    headers = {openapi.BATCH_SIZE: str(batch_size)}
    return Response(answer.model_dump_json(), headers=headers, media_type="application/json")


@router.get("/v1/model", tags=["grade"])
async def model(replica: Replica) -> ModelResponse:
    """Describe the current model and its intended use."""
    return await replica.describe()


@router.get("/healthz", tags=["probes"])
async def alive() -> Health:
    """Liveness probe: the process answers."""
    return Health(status="alive")


@router.get("/readyz", tags=["probes"])
async def ready(replica: Replica) -> Health:
    """Readiness probe: the model answers."""
    if not await replica.is_ready():
        raise problems.Refusal(503, "not_ready", "the model does not answer yet; try again in a few seconds")
    return Health(status="ready")


@router.get("/", include_in_schema=False)
async def page() -> FileResponse:
    """The web page to choose, drop or take photos, see their grades and compare two."""
    return FileResponse(web.PAGE)


@router.get("/page/{name}", include_in_schema=False)
async def file(name: str) -> FileResponse:
    """A style sheet or script of the page."""
    if name not in web.FILES:
        raise HTTPException(404)
    return FileResponse(web.FILES[name], media_type=web.TYPES[web.FILES[name].suffix])


ROUTERS = (router, batch.router, bulk.router, review.router, inference.router)
"""Routes of the endpoint."""


def create_api(settings: Settings, load: Load, audit: AuditLog | None) -> FastAPI:
    """Create the ASGI application of one replica.

    Raises:
        UserError: The keys cannot be read, or a review has none.
    """

    @asynccontextmanager
    async def lifespan(_api: FastAPI) -> AsyncIterator[None]:
        yield
        if audit is not None:
            audit.close()

    # Without FastAPI's documentation pages, which load scripts from another host; /openapi.json stays.
    api = FastAPI(
        title="scalp",
        version="1",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        # Its spans would have paths and queries, which may name persons. Ray Serve has a span per request.
        telemetry={"tracing": False, "metrics": False, "logs": False},
        redirect_slashes=False,  # a redirect would use the client's Host; `RequestMiddleware` drops the slash
        generate_unique_id_function=openapi.operation_id,
    )
    keys = install(api, settings, load, audit)
    review.check_readers(settings.review, keys)
    for group in ROUTERS:
        api.include_router(group)
    openapi.install(api, keys=bool(keys))
    problems.install(api, [route for group in ROUTERS for route in group.routes if isinstance(route, Route)])
    return api
