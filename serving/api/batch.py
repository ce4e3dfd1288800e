"""`POST /v1/grade/batch`: stream one NDJSON line per image, in order, while the body is uploaded."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from cluster.haproxy import BATCH_PATH
from scalp_core.errors import ImageError
from serving.batch.unpack import NamedImage, unpack
from serving.batch.window import Batches
from serving.http import openapi, request_context
from serving.http.multipart import MEDIA_TYPE as FORM
from serving.http.multipart import Part, read_file, read_form
from serving.http.problems import Refusal
from serving.replicas.handles import hash_of
from serving.replicas.ingress import Replica
from serving.schemas.grading import EndLine, FailedLine, GradeResponse

MEDIA_TYPE = "application/x-ndjson"
ARCHIVES = ("application/zip", "application/x-tar", "application/gzip")

_WHAT_TO_SEND = "send images as fields `file`, or one zip or tar as `archive`"

_log = logging.getLogger("ray.serve")

_Line = tuple[str, str]
_Item = asyncio.Task["_Line | Exception"] | Exception | None

router = APIRouter()


def _request_body() -> dict[str, Any]:
    file = {"type": "string", "format": "binary"}
    files = {"type": "array", "items": file, "minItems": 1}
    form = {
        "type": "object",
        "properties": {"file": files, "archive": file},
        "oneOf": [{"required": ["file"]}, {"required": ["archive"]}],
    }
    content = {FORM: {"schema": form}} | {kind: {"schema": file} for kind in ARCHIVES}
    return {"requestBody": {"required": True, "content": content}}


def _response_lines() -> dict[str, Any]:
    kinds = [openapi.reference(model) for model in (GradeResponse, FailedLine, EndLine)]
    return {"description": "one JSON object per line", "content": {MEDIA_TYPE: {"schema": {"oneOf": kinds}}}}


@router.post(
    BATCH_PATH,
    tags=["grade"],
    openapi_extra=_request_body(),
    responses={200: _response_lines(), **openapi.problem_responses(415, 422)},
    response_class=Response,
)
async def grade_batch(request: Request, replica: Replica) -> Response:
    """Grade many images, or those in a zip or tar; the response has one NDJSON line per image, in order.

    `member` is the number of the `file` part, from 0, or the name in the archive. An image that cannot be
    graded has a line with the status `failed`. The last line has the status `done`, or `aborted` if the rest
    could not be read; a response without either was cut off. Images are not stored.
    """
    return BatchResponse(replica.batches, request.headers.get("content-type", ""))


class BatchResponse(Response):
    """Streaming response that reads the request's body itself, to begin before the body has ended."""

    def __init__(self, batches: Batches, content_type: str) -> None:
        super().__init__(media_type=MEDIA_TYPE, headers={"X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._batches = batches
        self._content_type = content_type
        self._model_version = ""
        self._items: asyncio.Queue[_Item] = asyncio.Queue()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = None
        try:
            with self._batches.requests.reserve(request_context.current().owner):
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._read(group, scope, receive))
                    refusal = await self._send(send)
                    raise _Answered  # cancels the reading, and images in progress after an abort
        except* (ClientDisconnect, _Answered):
            pass
        if refusal:
            raise refusal

    async def _read(self, group: asyncio.TaskGroup, scope: Scope, receive: Receive) -> None:
        """Start to grade the images of the body, within the window; then wait for a disconnect."""
        owner, megapixels = request_context.current().owner, 0.0
        end = None
        try:
            async with aclosing(self._images(Request(scope, receive).stream())) as images:
                async for member, data in images:
                    size = 0
                    if not isinstance(data, ImageError):
                        size = len(data)
                        megapixels = await self._batches.admit(data, megapixels)
                    await self._batches.window.enter(owner, size)
                    task = group.create_task(self._line(member, data))
                    # Not inside the task, which may be cancelled before it starts.
                    task.add_done_callback(partial(self._leave, owner, size))
                    self._items.put_nowait(task)
        except Refusal as refusal:
            end = refusal
        self._items.put_nowait(end)
        while (await receive())["type"] != "http.disconnect":
            pass
        raise ClientDisconnect

    def _leave(self, owner: str, size: int, _: asyncio.Task[_Line | Exception]) -> None:
        self._batches.window.leave(owner, size)

    async def _images(self, body: AsyncIterator[bytes]) -> AsyncGenerator[NamedImage, None]:
        kind = self._content_type.partition(";")[0].strip().lower()
        if kind in ARCHIVES:
            parts = _only_part("archive", body)
        elif kind == FORM:
            parts = read_form(body, self._content_type, self._batches.settings.photographs)
        else:
            raise Refusal(415, "unsupported_body", f"{_WHAT_TO_SEND} of {FORM}; or {', '.join(ARCHIVES)}")
        files = archives = 0
        async for field, data in parts:
            files, archives = files + (field == "file"), archives + (field == "archive")
            if archives and files + archives > 1:
                raise Refusal(422, "mixed_batch", f"{_WHAT_TO_SEND}, not both")
            if field == "file":
                yield str(files - 1), await read_file(data)
            elif field == "archive":
                with self._batches.archives.reserve(request_context.current().owner):
                    async with aclosing(unpack(data, self._batches.settings, self._batches.pool)) as images:
                        async for image in images:
                            yield image

    async def _line(self, member: str, data: bytes | ImageError) -> _Line | Exception:
        """Status and text of a line, or the error that aborts the batch: raised, it would end the group."""
        try:
            try:
                if isinstance(data, ImageError):
                    raise data
                graded = await self._batches.grade(data)
                return "graded", graded.model_copy(update={"member": member}).model_dump_json()
            except ImageError as error:
                sha256 = await asyncio.to_thread(hash_of, data) if isinstance(data, bytes) else None
                self._model_version = self._model_version or await self._batches.model_version()
                return "failed", FailedLine.of(member, sha256, error, self._model_version).model_dump_json()
        except Exception as error:
            return error

    async def _send(self, send: Send) -> Refusal | None:
        """Send the lines in order; return the refusal of a batch without any line."""
        counts: Counter[str] = Counter()
        while isinstance(item := await self._items.get(), asyncio.Task):
            line = await item
            if isinstance(line, Exception):
                item = line
                break
            status, text = line
            await self._send_line(send, text, first=not counts)
            counts[status] += 1
        end = _refusal(item)
        if not counts:
            return end or Refusal(422, "no_file", _WHAT_TO_SEND)
        last = EndLine(
            status="aborted" if end else "done",
            error_code=end and end.code,
            error=end and end.detail,
            graded=counts["graded"],
            failed=counts["failed"],
        )
        await self._send_line(send, last.model_dump_json(exclude_none=True))
        await send({"type": "http.response.body", "body": b""})
        return None

    async def _send_line(self, send: Send, text: str, first: bool = False) -> None:
        if first:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": f"{text}\n".encode(), "more_body": True})


class _Answered(Exception):  # noqa: N818
    """The last line was sent."""


async def _only_part(field: str, data: AsyncIterator[bytes]) -> AsyncGenerator[Part, None]:
    yield field, data


def _refusal(error: Exception | None) -> Refusal | None:
    if error is None or isinstance(error, Refusal):
        return error
    _log.error("a batch failed", exc_info=error)
    return Refusal(500, "internal", "the server failed; its log has the reason")
