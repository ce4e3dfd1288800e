"""The HTTP interface: routes and nothing else. What they answer comes from the `Ingress` replica."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import APIRouter, FastAPI, Query, Request, Response
from starlette.routing import Route

from scalp_core.errors import ImageError
from serving.admission.limits import Load
from serving.api import batch, bulk, page, single
from serving.api.middleware import install
from serving.api.single import GradeOptions
from serving.batch.ndjson import EndLine, FailedLine
from serving.http import openapi, problems
from serving.observability.audit import AuditLog
from serving.observability.metrics import MetricsMiddleware
from serving.replicas.ingress import Replica
from serving.schemas.grading import ExplainedResponse, GradeResponse, Health, ModelResponse, Problem
from serving.settings import Settings

_BATCH_SIZE = "images in the forward pass of this one"

router = APIRouter()


@router.post(
    "/v1/grade",
    tags=["grade"],
    response_model=ExplainedResponse | GradeResponse,
    openapi_extra=single.documented(),
    responses={
        200: {"headers": {"X-Batch-Size": {"description": _BATCH_SIZE, "schema": {"type": "integer"}}}},
        **problems.responses(415, 422),
    },
)
async def grade(request: Request, replica: Replica, options: Annotated[GradeOptions, Query()]) -> Response:
    """Grades one image (JPEG, PNG, WebP, BMP or TIFF), as the body or as the field `file` of a form.

    It is not kept. The options are in the query, or fields of the form.
    """
    asked = await single.read_image(request, options)
    try:
        answer = await replica.grade(asked.data, asked.options.heatmap, asked.options.heatmap_grade)
    except ImageError as error:
        raise problems.refuse_image(error) from None
    # Words that are valid already: FastAPI would check them again.
    headers = {"X-Batch-Size": str(answer.batch_size)}
    return Response(answer.model_dump_json(), headers=headers, media_type="application/json")


@router.get("/v1/model", tags=["grade"])
async def model(replica: Replica) -> ModelResponse:
    """The model that answers, and what it is for."""
    return await replica.describe()


@router.get("/healthz", tags=["probes"])
async def alive() -> Health:
    """The process answers."""
    return Health(status="alive")


@router.get("/readyz", tags=["probes"])
async def ready(replica: Replica) -> Health:
    """The model answers."""
    if not await replica.is_ready():
        raise problems.Refusal(503, "not_ready", "the model does not answer yet; try again in a few seconds")
    return Health(status="ready")


def create_api(settings: Settings, load: Load, audit: AuditLog | None) -> FastAPI:
    """The ASGI application of one replica.

    Raises:
        UserError: the keys cannot be read.
    """

    @asynccontextmanager
    async def lifespan(_api: FastAPI) -> AsyncIterator[None]:
        yield
        if audit is not None:
            audit.close()

    # FastAPI's own documentation pages load scripts from another host; /openapi.json stays.
    api = FastAPI(
        title="scalp",
        version="1",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        redirect_slashes=False,  # to the host that the client named; `RequestMiddleware` drops the slash
        generate_unique_id_function=openapi.operation_id,
    )
    keys = install(api, settings, load, audit)
    api.add_middleware(MetricsMiddleware)
    routers = (router, batch.router, bulk.router, page.router)
    for each in routers:
        api.include_router(each)
    openapi.install(api, Problem, (FailedLine, EndLine), keys=bool(keys))
    problems.install(api, [route for each in routers for route in each.routes if isinstance(route, Route)])
    return api
