"""The HTTP interface: routes and nothing else. What they answer comes from the `Ingress` replica."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import APIRouter, FastAPI, Form, Response, UploadFile
from starlette.formparsers import MultiPartParser
from starlette.routing import Route

from scalp_core.errors import ImageError
from serving import batch, bulk, page, problems
from serving.audit import AuditLog
from serving.ingress import Replica
from serving.limits import MAX_BODY_BYTES, Load
from serving.metrics import Metered
from serving.middleware import install
from serving.schemas import ExplainedResponse, GradeResponse, Health, ModelResponse
from serving.settings import Settings

# No photograph is written to disk, not even to the form parser's temporary file.
MultiPartParser.spool_max_size = MAX_BODY_BYTES

router = APIRouter()


@router.post(
    "/v1/grade",
    response_model=ExplainedResponse | GradeResponse,
    responses=problems.responses(415, 422),
)
async def grade(
    replica: Replica,
    file: UploadFile,
    heatmap: Annotated[bool, Form(description="also what spoke for the grade")] = False,
    heatmap_grade: Annotated[
        int | None, Form(ge=0, le=3, description="to explain; without it the likeliest")
    ] = None,
) -> Response:
    """Grades one photograph (JPEG, PNG, WebP, BMP or TIFF). It is not kept."""
    try:
        answer = await replica.grade(await file.read(), heatmap, heatmap_grade)
    except ImageError as error:
        raise problems.refuse_image(error) from None
    # Words that are valid already: FastAPI would check them again.
    headers = {"X-Batch-Size": str(answer.batch_size)}
    return Response(answer.model_dump_json(), headers=headers, media_type="application/json")


@router.get("/v1/model")
async def model(replica: Replica) -> ModelResponse:
    """The model that answers, and what it is for."""
    return await replica.describe()


@router.get("/healthz")
async def alive() -> Health:
    """The process answers."""
    return Health(status="alive")


@router.get("/readyz")
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
        responses=problems.responses(*problems.EVERYWHERE),
    )
    install(api, settings, load, audit)
    api.add_middleware(Metered)
    routers = (router, batch.router, bulk.router, page.router)
    for each in routers:
        api.include_router(each)
    problems.install(api, [route for each in routers for route in each.routes if isinstance(route, Route)])
    return api
