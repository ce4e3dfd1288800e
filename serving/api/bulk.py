"""Routes of `/v1/bulk`: grade an archive or prefix in storage as a Ray job."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.responses import HTMLResponse, StreamingResponse

from scalp_core.results.formats import json_text
from serving.api.authorization import BULK_PATH as PATH
from serving.auth.scopes import Caller
from serving.bulk.rows import CSV, NDJSON, encode_rows
from serving.bulk.work import Bulk, is_id
from serving.http import request_context
from serving.http.openapi import problem_responses
from serving.http.problems import Refusal
from serving.replicas.ingress import Replica
from serving.schemas.bulk import BulkFiles, BulkList, BulkRequest, BulkResponse, BulkRows

# report.html has a stricter policy, which allows its style by hash; browsers enforce both.
_REPORT_POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; sandbox"
)

router = APIRouter(tags=["bulk"])


def require_bulk(replica: Replica) -> Bulk:
    """Dependency: bulk grading, if the operator has turned it on.

    Raises:
        Refusal: Bulk grading is off (404).
    """
    if replica.bulk is None:
        raise Refusal(
            404,
            "bulk_not_offered",
            "bulk grading is not turned on; start with scalp serve --bulk-source PREFIX --bulk-out PREFIX, "
            "or set bulk in the application's args",
        )
    return replica.bulk


RequiredBulk = Annotated[Bulk, Depends(require_bulk)]


async def caller() -> Caller:
    """Dependency: the caller, as the authorization identified it."""
    return request_context.current().caller


RequestCaller = Annotated[Caller, Depends(caller)]
RunId = Annotated[str, Path(description="id of the run")]
Cursor = Annotated[str | None, Query(max_length=200, description="`next` of the previous page")]


def _mark_for_audit(id: str) -> None:  # noqa: A002
    """Log the request in the audit log, also if it is refused; invalid ids are not logged."""
    request_context.current().owes_audit = True
    request_context.current().work = id if is_id(id) else None


def _root(request: Request) -> str:
    return str(request.scope.get("root_path", "")).rstrip("/")


@router.post(
    PATH,
    status_code=202,
    responses={
        200: {"model": BulkResponse, "description": "it has been graded already"},
        202: {"headers": {"Location": {"description": "path of the run", "schema": {"type": "string"}}}},
        **problem_responses(404, 409, 422),
    },
)
async def start(
    request: Request, response: Response, bulk: RequiredBulk, requester: RequestCaller, body: BulkRequest
) -> BulkResponse:
    """Start to grade an archive or prefix in storage; 200 if it has been graded already.

    The same source and model give the same id and one job; the caller becomes one of its owners.
    """
    run = await bulk.start(requester, body.source, _root(request))
    request_context.current().work, request_context.current().source = run.id, run.source
    response.headers["Location"] = run.links.work
    if run.status == "succeeded":
        response.status_code = 200
    return run


@router.get(PATH, responses=problem_responses(404, 422))
async def listing(
    request: Request,
    bulk: RequiredBulk,
    requester: RequestCaller,
    limit: Annotated[int, Query(ge=1, le=50, description="runs per page")] = 20,
    cursor: Cursor = None,
) -> BulkList:
    """List the bulk runs of the caller in the order of ids; with the scope admin, of all owners."""
    return await bulk.run(bulk.list, requester, _root(request), limit, cursor)


@router.get(f"{PATH}/{{id}}", responses=problem_responses(404))
async def progress(request: Request, bulk: RequiredBulk, requester: RequestCaller, id: RunId) -> BulkResponse:  # noqa: A002
    """Show the status and progress of a bulk run."""
    return await bulk.run(bulk.find, requester, id, _root(request))


@router.delete(f"{PATH}/{{id}}", status_code=202, responses=problem_responses(404))
async def stop(request: Request, bulk: RequiredBulk, requester: RequestCaller, id: RunId) -> BulkResponse:  # noqa: A002
    """Stop a bulk run for all its owners. Its results stay; the same POST resumes it."""
    _mark_for_audit(id)
    return await bulk.run(bulk.stop, requester, id, _root(request))


@router.get(
    f"{PATH}/{{id}}/report",
    response_class=HTMLResponse,
    responses=problem_responses(404),
)
async def report(bulk: RequiredBulk, requester: RequestCaller, id: RunId) -> HTMLResponse:  # noqa: A002
    """Get the report of a finished bulk run: a self-contained HTML page, written by `scalp grade`."""
    _mark_for_audit(id)
    content = await bulk.run(bulk.report, requester, id)
    return HTMLResponse(content, headers={"Content-Security-Policy": _REPORT_POLICY})


@router.get(
    f"{PATH}/{{id}}/results",
    response_model=BulkRows,
    responses={
        200: {
            "content": {NDJSON: {"schema": {"type": "string"}}, CSV: {"schema": {"type": "string"}}},
            "description": "a page of rows as JSON, or all rows if Accept names NDJSON or CSV",
        },
        **problem_responses(404, 422),
    },
)
async def results(
    bulk: RequiredBulk,
    requester: RequestCaller,
    id: RunId,  # noqa: A002
    limit: Annotated[int, Query(ge=1, le=1000, description="rows per page")] = 100,
    cursor: Cursor = None,
    accept: Annotated[str, Header(include_in_schema=False)] = "",
) -> Response:
    """Get the rows of a finished bulk run: a page of JSON, or by Accept all rows as NDJSON or CSV.

    The types are `application/x-ndjson` and `text/csv`. In CSV, lists are `a;b;c`, and a quote precedes texts
    that a spreadsheet would evaluate as a formula.
    """
    _mark_for_audit(id)
    if kind := _stream_type(accept):
        rows = await bulk.run(bulk.rows, requester, id)
        return StreamingResponse(encode_rows(rows.batches(), kind), media_type=f"{kind}; charset=utf-8")
    page = await bulk.run(bulk.page, requester, id, limit, cursor)
    text = json_text({"id": id, "rows": page.rows, "next": page.next})
    return Response(text, media_type="application/json")


@router.get(f"{PATH}/{{id}}/files", responses=problem_responses(404))
async def files(bulk: RequiredBulk, requester: RequestCaller, id: RunId) -> BulkFiles:  # noqa: A002
    """List the Parquet files with the rows, for a reader with access to the storage."""
    return await bulk.run(bulk.files, requester, id)


def _stream_type(accept: str) -> str | None:
    """First of NDJSON and CSV that an Accept header names; None if it names neither."""
    named = (part.partition(";")[0].strip().lower() for part in accept.split(","))
    return next((kind for kind in named if kind in (NDJSON, CSV)), None)
