"""`/v1/bulk`: an archive or prefix in storage, graded as a job beside the endpoint."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import StreamingResponse

from serving.bulk_schemas import BulkRequest, BulkResponse, BulkResults
from serving.bulk_work import Bulk
from serving.ingress import Replica
from serving.problems import Refusal, responses

PATH = "/v1/bulk"

# report.html brings its own policy, which allows its one style by a hash; both hold.
_REPORT_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; sandbox"
)

router = APIRouter()


def offered(replica: Replica) -> Bulk:
    """Bulk grading, where the operator has turned it on."""
    if replica.bulk is None:
        raise Refusal(
            404,
            "bulk_not_offered",
            "bulk grading is not turned on; start with scalp serve --bulk-source PREFIX --bulk-out PREFIX, "
            "or set bulk in the application's args",
        )
    return replica.bulk


Offered = Annotated[Bulk, Depends(offered)]


def _root(request: Request) -> str:
    return str(request.scope.get("root_path", "")).rstrip("/")


@router.post(PATH, status_code=202, responses=responses(404, 409, 422))
async def start(request: Request, response: Response, bulk: Offered, what: BulkRequest) -> BulkResponse:
    """Starts to grade an archive or prefix in storage; 200 if it has been graded already.

    The same source and model come to the same id, and to one job.
    """
    found = await bulk.start(what.source, _root(request))
    response.headers["Location"] = found.links.work
    if found.status == "succeeded":
        response.status_code = 200
    return found


@router.get(f"{PATH}/{{id}}", responses=responses(404))
async def progress(request: Request, bulk: Offered, id: str) -> BulkResponse:  # noqa: A002
    """How far it is."""
    return await bulk.find(id, _root(request))


@router.delete(f"{PATH}/{{id}}", status_code=202, responses=responses(404))
async def stop(request: Request, bulk: Offered, id: str) -> BulkResponse:  # noqa: A002
    """Stops it; what is graded stays, and the same POST goes on from there."""
    return await bulk.stop(id, _root(request))


@router.get(
    f"{PATH}/{{id}}/report",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/html": {}}}, **responses(404)},
)
async def report(bulk: Offered, id: str) -> StreamingResponse:  # noqa: A002
    """The report of one that has ended, as `scalp grade` wrote it: one HTML page that asks no host."""
    return StreamingResponse(
        await bulk.report(id),
        media_type="text/html; charset=utf-8",
        headers={"Content-Security-Policy": _REPORT_POLICY},
    )


@router.get(f"{PATH}/{{id}}/results", responses=responses(404))
async def results(bulk: Offered, id: str) -> BulkResults:  # noqa: A002
    """The names of the Parquet files with the rows."""
    return await bulk.results(id)
