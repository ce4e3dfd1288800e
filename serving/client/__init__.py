"""Python client of the endpoint, sync and async: `Client("http://127.0.0.1:8000").grade("photo.jpg").grade_name`.

Calls are retried while a server is restarted, replaced or busy, within bounds. Grading is idempotent, so that
retries are safe. Needs neither Ray nor PyTorch.
"""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Generic, Literal, ParamSpec, Self, TypeVar, overload
from urllib.parse import quote

import httpx
import tenacity
from pydantic import AliasChoices, BaseModel, Field, TypeAdapter

from serving.client.retries import Attempts, Call, GradeError, Retries
from serving.schemas.bulk import BulkRow
from serving.schemas.grading import ExplainedResponse, GradeResponse, Health, ModelResponse
from serving.schemas.store import KeptResponse

P = ParamSpec("P")
T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)
H = TypeVar("H", httpx.Client, httpx.AsyncClient)
ImageInput = bytes | str | Path
"""Bytes of a file, or its path. The name is not sent."""
Photograph = ImageInput  # former name

# Limits of one request of `grade_batch`, which is held in memory and repeated after a lost connection.
_BATCH_IMAGES = 32
_BATCH_BYTES = 32 * 2**20
_PAGE_ROWS = 1_000


class FailedImage(BaseModel):
    """An image of a batch that could not be graded, with fields of a failed bulk row."""

    member: str
    status: Literal["failed"]
    error_code: str
    error: str


FailedPhotograph = FailedImage  # former name


class BulkRun(BaseModel, extra="allow"):
    """Status of a bulk run; further fields of the response are in `model_extra`."""

    id: str
    status: str
    source: str
    out: str
    links: dict[str, str | None]


class _Page(BaseModel, Generic[T]):
    """A page of runs or rows, and the cursor of the next page."""

    rows: list[T] = Field(validation_alias=AliasChoices("runs", "rows"))
    next: str | None


Row = GradeResponse | FailedImage
_row: TypeAdapter[Row] = TypeAdapter(Row)


def _accept_former_keyword(former: str, present: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Decorator: accept the keyword argument `present` under its former name, too."""

    def decorate(method: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(method)
        def call(*arguments: Any, **keywords: Any) -> T:
            if former in keywords and present not in keywords:
                keywords[present] = keywords.pop(former)
            return method(*arguments, **keywords)

        return call

    return decorate


class _Settings(Generic[H]):
    """Constructor of both clients."""

    _connect: Callable[..., H]

    def __init__(
        self,
        url: str,
        key: str | None = None,
        timeout: float = 30,
        retries: Retries = Retries(),  # noqa: B008
    ) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http: H = self._connect(base_url=url, headers=headers)
        self._timeout, self._retries = timeout, retries

    def _attempts(self, call: Call[T], retries: Retries | None) -> Attempts[T]:
        return Attempts(call, retries or self._retries, self._timeout)


class Client(_Settings[httpx.Client]):
    """Client of the endpoint; thread-safe.

    Args:
        url: URL of the endpoint, such as `http://127.0.0.1:8000`.
        key: Bearer key, if the endpoint needs one.
        timeout: Seconds without a byte after which an attempt fails.
        retries: Bounds of the retries of a call.

    Every method raises `GradeError`.
    """

    _connect = httpx.Client

    @overload
    def grade(self, image: ImageInput, heatmap: Literal[False] = False) -> GradeResponse: ...
    @overload
    def grade(
        self, image: ImageInput, heatmap: Literal[True], heatmap_grade: int | None = None
    ) -> ExplainedResponse: ...
    @overload
    def grade(
        self,
        image: ImageInput,
        heatmap: bool = False,
        heatmap_grade: int | None = None,
        *,
        keep: Literal[True],
    ) -> KeptResponse: ...
    @_accept_former_keyword("photograph", "image")
    def grade(
        self,
        image: ImageInput,
        heatmap: bool = False,
        heatmap_grade: int | None = None,
        *,
        keep: bool = False,
    ) -> GradeResponse:
        """Grade one image; the heatmap explains `heatmap_grade`, by default the likeliest grade.

        `keep` asks the endpoint to keep the image in its store: the person must have agreed.
        """
        return self._run(_grade(_bytes(image), heatmap, heatmap_grade, keep))

    @_accept_former_keyword("photographs", "images")
    def grade_batch(self, images: Iterable[ImageInput]) -> Iterator[Row]:
        """Grade many images, in requests of at most 32; yields one row per image, `member` is its index."""
        for start, part in _split_requests(images):
            yield from self._run(_batch(start, part))

    def model(self) -> ModelResponse:
        """Describe the current model."""
        return self._run(_MODEL)

    def ready(self) -> bool:
        """Whether the model is ready; without retries."""
        with suppress(GradeError):
            self._run(_READY, Retries(attempts=1))
            return True
        return False

    def bulk(self, source: str) -> BulkRun:
        """Start a bulk run on an `s3://` prefix or archive that the endpoint allows."""
        return self._run(_bulk(source))

    def bulk_status(self, run: str) -> BulkRun:
        """Status and progress of a bulk run, by its id."""
        return self._run(_bulk_run("GET", run))

    def bulk_cancel(self, run: str) -> BulkRun:
        """Stop a bulk run; its committed results stay."""
        return self._run(_bulk_run("DELETE", run))

    def bulk_list(self) -> Iterator[BulkRun]:
        """Yield the bulk runs of the key, one page per request."""
        return self._rows(_runs)

    def bulk_rows(self, run: str) -> Iterator[BulkRow]:
        """Yield the result rows of a finished bulk run, one page per request."""
        return self._rows(partial(_bulk_rows, run))

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _rows(self, call: Callable[[str], Call[_Page[T]]]) -> Iterator[T]:
        cursor: str | None = ""
        while cursor is not None:
            page = self._run(call(cursor))
            yield from page.rows
            cursor = page.next

    def _run(self, call: Call[T], retries: Retries | None = None) -> T:
        attempts = self._attempts(call, retries)

        def once() -> T:
            try:
                response = self._http.request(**attempts.request())
            except httpx.TransportError as error:
                raise attempts.transport_error(error) from error
            return attempts.read(response)

        return tenacity.Retrying(**attempts.plan)(once)


class AsyncClient(_Settings[httpx.AsyncClient]):
    """`Client` for asyncio, with the same arguments and methods."""

    # The caller bounds the concurrency; the connection pool must not queue calls as well.
    _connect = partial(
        httpx.AsyncClient, limits=httpx.Limits(max_connections=None, max_keepalive_connections=100)
    )

    @overload
    async def grade(self, image: ImageInput, heatmap: Literal[False] = False) -> GradeResponse: ...
    @overload
    async def grade(
        self, image: ImageInput, heatmap: Literal[True], heatmap_grade: int | None = None
    ) -> ExplainedResponse: ...
    @overload
    async def grade(
        self,
        image: ImageInput,
        heatmap: bool = False,
        heatmap_grade: int | None = None,
        *,
        keep: Literal[True],
    ) -> KeptResponse: ...
    @_accept_former_keyword("photograph", "image")
    async def grade(
        self,
        image: ImageInput,
        heatmap: bool = False,
        heatmap_grade: int | None = None,
        *,
        keep: bool = False,
    ) -> GradeResponse:
        data = await asyncio.to_thread(_bytes, image)
        return await self._run(_grade(data, heatmap, heatmap_grade, keep))

    @_accept_former_keyword("photographs", "images")
    async def grade_batch(self, images: Iterable[ImageInput]) -> AsyncIterator[Row]:
        parts = _split_requests(images)
        while part := await asyncio.to_thread(next, parts, None):
            for row in await self._run(_batch(*part)):
                yield row

    async def model(self) -> ModelResponse:
        return await self._run(_MODEL)

    async def ready(self) -> bool:
        with suppress(GradeError):
            await self._run(_READY, Retries(attempts=1))
            return True
        return False

    async def bulk(self, source: str) -> BulkRun:
        return await self._run(_bulk(source))

    async def bulk_status(self, run: str) -> BulkRun:
        return await self._run(_bulk_run("GET", run))

    async def bulk_cancel(self, run: str) -> BulkRun:
        return await self._run(_bulk_run("DELETE", run))

    def bulk_list(self) -> AsyncIterator[BulkRun]:
        return self._rows(_runs)

    def bulk_rows(self, run: str) -> AsyncIterator[BulkRow]:
        return self._rows(partial(_bulk_rows, run))

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    async def _rows(self, call: Callable[[str], Call[_Page[T]]]) -> AsyncIterator[T]:
        cursor: str | None = ""
        while cursor is not None:
            page = await self._run(call(cursor))
            for row in page.rows:
                yield row
            cursor = page.next

    async def _run(self, call: Call[T], retries: Retries | None = None) -> T:
        attempts = self._attempts(call, retries)

        async def once() -> T:
            try:
                response = await self._http.request(**attempts.request())
            except httpx.TransportError as error:
                raise attempts.transport_error(error) from error
            return attempts.read(response)

        return await tenacity.AsyncRetrying(**attempts.plan)(once)


def _json(model: type[M]) -> Callable[[httpx.Response], M]:
    return lambda response: model.model_validate_json(response.content)


def _grade(data: bytes, heatmap: bool, heatmap_grade: int | None, keep: bool) -> Call[GradeResponse]:
    form = {"heatmap": "true"} if heatmap else {}
    if keep:
        form["keep"] = "true"
    if heatmap_grade is not None:
        form["heatmap_grade"] = str(heatmap_grade)
    body = {"files": [_file(data)], "data": form}
    model = KeptResponse if keep else ExplainedResponse if heatmap else GradeResponse
    return Call("POST", "/v1/grade", _json(model), body=body)


def _batch(start: int, part: list[bytes]) -> Call[list[Row]]:
    def read(response: httpx.Response) -> list[Row]:
        *lines, end = map(json.loads, response.content.splitlines())
        if end["status"] != "done":
            raise ValueError(f"the batch was aborted: {end.get('error')}")
        rows = [_row.validate_python(line) for line in lines]
        by_index = {int(row.member or ""): row for row in rows}
        if len(rows) != len(part) or by_index.keys() != set(range(len(part))):
            raise ValueError("rows are missing")
        return [
            by_index[index].model_copy(update={"member": str(start + index)}) for index in range(len(part))
        ]

    return Call("POST", "/v1/grade/batch", read, body={"files": [_file(data) for data in part]})


def _bulk(source: str) -> Call[BulkRun]:
    return Call("POST", "/v1/bulk", _json(BulkRun), idempotent=False, body={"json": {"source": source}})


def _bulk_run(method: str, run: str) -> Call[BulkRun]:
    return Call(method, f"/v1/bulk/{quote(run, safe='')}", _json(BulkRun))


def _runs(cursor: str) -> Call[_Page[BulkRun]]:
    return Call("GET", "/v1/bulk", _json(_Page[BulkRun]), body={"params": _after(cursor)})


def _bulk_rows(run: str, cursor: str) -> Call[_Page[BulkRow]]:
    path = f"/v1/bulk/{quote(run, safe='')}/results"
    return Call("GET", path, _json(_Page[BulkRow]), body={"params": {"limit": _PAGE_ROWS} | _after(cursor)})


def _after(cursor: str) -> dict[str, str]:
    return {"cursor": cursor} if cursor else {}


_MODEL = Call("GET", "/v1/model", _json(ModelResponse))
_READY = Call("GET", "/readyz", _json(Health))


def _file(data: bytes) -> tuple[str, tuple[str, bytes]]:
    return "file", ("photograph", data)


def _bytes(image: ImageInput) -> bytes:
    return image if isinstance(image, bytes) else Path(image).read_bytes()


def _split_requests(images: Iterable[ImageInput]) -> Iterator[tuple[int, list[bytes]]]:
    """Split images into requests, each with the index of its first image."""
    start, part, size = 0, list[bytes](), 0
    for data in map(_bytes, images):
        if part and (len(part) == _BATCH_IMAGES or size + len(data) > _BATCH_BYTES):
            yield start, part
            start, part, size = start + len(part), [], 0
        part.append(data)
        size += len(data)
    if part:
        yield start, part
