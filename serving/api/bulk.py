"""`/v1/bulk`: an archive or prefix in storage, graded as a job beside the endpoint."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.responses import StreamingResponse

from scalp_core.results.formats import json_text
from serving.api.authorization import BULK_PATH as PATH
from serving.auth.scopes import Caller
from serving.bulk.rows import CSV, NDJSON, streamed
from serving.bulk.work import Bulk, is_id
from serving.http import request_context
from serving.http.problems import Refusal, responses
from serving.replicas.ingress import Replica
from serving.schemas.bulk import BulkFiles, BulkList, BulkRequest, BulkResponse, BulkRows

# report.html brings its own policy, which allows its one style by a hash; both hold.
_REPORT_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; sandbox"
)

router = APIRouter(tags=["bulk"])


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


async def caller() -> Caller:
    """Who sent the request, as the gate found."""
    return request_context.current().caller


Asking = Annotated[Caller, Depends(caller)]
Cursor = Annotated[str | None, Query(max_length=200, description="`next` of the page before")]


def _audited(id: str) -> None:  # noqa: A002
    """The request gets a line in the audit log, also when it is refused; of other texts than ids nothing."""
    request_context.current().owes_audit = True
    request_context.current().work = id if is_id(id) else None


def _root(request: Request) -> str:
    return str(request.scope.get("root_path", "")).rstrip("/")


@router.post(
    PATH,
    status_code=202,
    responses={
        200: {"model": BulkResponse, "description": "it has been graded"},
        202: {"headers": {"Location": {"description": "path of the run", "schema": {"type": "string"}}}},
        **responses(404, 409, 422),
    },
)
async def start(
    request: Request, response: Response, bulk: Offered, asking: Asking, what: BulkRequest
) -> BulkResponse:
    """Starts to grade an archive or prefix in storage; 200 if it has been graded already.

    The same source and model come to the same id, and to one job; the caller becomes one of its owners.
    """
    found = await bulk.start(asking, what.source, _root(request))
    request_context.current().work, request_context.current().source = found.id, found.source
    response.headers["Location"] = found.links.work
    if found.status == "succeeded":
        response.status_code = 200
    return found


@router.get(PATH, responses=responses(404, 422))
async def listing(
    request: Request,
    bulk: Offered,
    asking: Asking,
    limit: Annotated[int, Query(ge=1, le=50, description="runs of a page")] = 20,
    cursor: Cursor = None,
) -> BulkList:
    """The bulk runs that the caller owns, in the order of their ids; with the scope admin those of all."""
    return await bulk.list(asking, _root(request), limit, cursor)


@router.get(f"{PATH}/{{id}}", responses=responses(404))
async def progress(request: Request, bulk: Offered, asking: Asking, id: str) -> BulkResponse:  # noqa: A002
    """How far it is."""
    return await bulk.find(asking, id, _root(request))


@router.delete(f"{PATH}/{{id}}", status_code=202, responses=responses(404))
async def stop(request: Request, bulk: Offered, asking: Asking, id: str) -> BulkResponse:  # noqa: A002
    """Stops it, for all owners; what is graded stays, and the same POST goes on from there."""
    _audited(id)
    return await bulk.stop(asking, id, _root(request))


@router.get(
    f"{PATH}/{{id}}/report",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/html": {}}}, **responses(404)},
)
async def report(bulk: Offered, asking: Asking, id: str) -> StreamingResponse:  # noqa: A002
    """The report of one that has ended, as `scalp grade` wrote it: one HTML page that asks no host."""
    _audited(id)
    return StreamingResponse(
        await bulk.report(asking, id),
        media_type="text/html; charset=utf-8",
        headers={"Content-Security-Policy": _REPORT_POLICY},
    )


@router.get(
    f"{PATH}/{{id}}/results",
    response_model=BulkRows,
    responses={
        200: {
            "content": {NDJSON: {"schema": {"type": "string"}}, CSV: {"schema": {"type": "string"}}},
            "description": "a page of rows as JSON, or all rows where Accept asks for NDJSON or CSV",
        },
        **responses(404, 422),
    },
)
async def results(
    bulk: Offered,
    asking: Asking,
    id: str,  # noqa: A002
    limit: Annotated[int, Query(ge=1, le=1000, description="rows of a page")] = 100,
    cursor: Cursor = None,
    accept: Annotated[str, Header(include_in_schema=False)] = "",
) -> Response:
    """The rows of one that has ended: a page of JSON; by Accept all, as `application/x-ndjson` or `text/csv`.

    In CSV lists are `a;b;c`, and a quote is put before a text that a spreadsheet would take for a formula.
    """
    _audited(id)
    if kind := _stream_of(accept):
        batches = await bulk.rows(asking, id)
        return StreamingResponse(streamed(batches, kind), media_type=f"{kind}; charset=utf-8")
    page = await bulk.page(asking, id, limit, cursor)
    text = json_text({"id": id, "rows": page.rows, "next": page.next})
    return Response(text, media_type="application/json")


@router.get(f"{PATH}/{{id}}/files", responses=responses(404))
async def files(bulk: Offered, asking: Asking, id: str) -> BulkFiles:  # noqa: A002
    """The names of the Parquet files with the rows, for a reader that reaches the storage itself."""
    return await bulk.files(asking, id)


def _stream_of(accept: str) -> str | None:
    """The stream that an Accept header asks for by name, the first of both."""
    named = (part.partition(";")[0].strip().lower() for part in accept.split(","))
    return next((kind for kind in named if kind in (NDJSON, CSV)), None)
