"""gRPC server of the Open Inference Protocol: each call becomes a request over HTTP, through HAProxy.

It listens on a Unix socket, to which HAProxy sends the calls of clients. Requests take another Unix socket of
HAProxy, with the client's address and key: limits, keys, audit log and metrics are those of HTTP.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from functools import partial
from threading import Thread
from typing import Any

import aiohttp
import grpc
from grpc import StatusCode
from yarl import URL

from cluster.haproxy import MESSAGE_BYTES
from serving.admission.fairness import OwnerQuota
from serving.admission.limits import Limits
from serving.api import grpc_calls
from serving.api.grpc_calls import CallError, HttpAnswer, HttpRequest
from serving.auth.keys import Keys
from serving.auth.network import client_network
from serving.schemas.grpc_messages import SERVICE, message_class
from serving.schemas.inference import MODEL_NAME

_MARGIN_SECONDS = 30.0  # for the upload to the replica, in addition to `answer_seconds`
_CONNECT_SECONDS = 5.0
_STOP_SECONDS = 2.0  # for open calls
_PIECE_BYTES = 64 * 1024
_IDENTITY = 1  # bit of the only compression that is accepted: others could grow to any size
_LATER = (("retry-after", "1"),)

_log = logging.getLogger("ray.serve")


class _Call:
    """One call: its headers, and its message, which is received only when a method asks for it."""

    def __init__(self, context: grpc.aio.ServicerContext) -> None:
        self.context = context
        metadata = tuple(context.invocation_metadata() or ())
        self.headers = grpc_calls.request_headers(metadata)
        address = self.headers.get("x-forwarded-for")
        self.owner = client_network({"client": (address, 0)}) if address else ""
        self.size = dict(metadata).get(MESSAGE_BYTES)
        self.held_bytes: int | None = None


class GrpcServer:
    """Answer calls of gRPC by requests over HTTP.

    Args:
        limits: Limits of the endpoint. A message has at most `grade_bytes`, and all messages `held_bytes`.
        keys: Keys of the endpoint. A message is received only if the key of its call is valid.
        answer_seconds: Longest time that the endpoint takes for an answer.
        socket: Unix socket for requests over HTTP.
    """

    def __init__(self, limits: Limits, keys: Keys, answer_seconds: float, socket: str) -> None:
        self._limits = limits
        self._keys = keys
        self._seconds = answer_seconds + _MARGIN_SECONDS
        self._socket = socket
        self._calls = OwnerQuota(limits.uploads)
        # One owner may hold half of it, which must be a message.
        self._held_bytes = OwnerQuota(max(limits.held_bytes, 2 * limits.grade_bytes))

    def create(self) -> grpc.aio.Server:
        """Create the server of the running event loop; the caller adds an address and starts it."""
        # A new connection per request: a replaced HAProxy closes those that are idle.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.UnixConnector(self._socket, force_close=True, limit=0),
            timeout=aiohttp.ClientTimeout(self._seconds, connect=_CONNECT_SECONDS),
            auto_decompress=False,
        )
        server = grpc.aio.server(
            # Messages that do not come leave as many places for other calls.
            maximum_concurrent_rpcs=2 * self._limits.uploads,
            options=[
                ("grpc.max_receive_message_length", self._limits.grade_bytes),
                ("grpc.compression_enabled_algorithms_bitset", _IDENTITY),
                # Otherwise a stream buffers megabytes of a message that nobody receives yet.
                ("grpc.http2.bdp_probe", 0),
            ],
        )
        answers: dict[str, Callable[[_Call], Awaitable[Any]]] = {
            "ServerLive": self._server_live,
            "ServerReady": self._server_ready,
            "ServerMetadata": self._server_metadata,
            "ModelReady": self._model_ready,
            "ModelMetadata": self._model_metadata,
            "ModelInfer": self._model_infer,
        }
        handlers = {
            # As a stream of messages: gRPC receives the only one when the method asks for it.
            name: grpc.stream_unary_rpc_method_handler(
                partial(self._handle, answer),
                response_serializer=message_class(f"{name}Response").SerializeToString,
            )
            for name, answer in answers.items()
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        return server

    async def _handle(
        self,
        answer: Callable[[_Call], Awaitable[Any]],
        _messages: AsyncIterator[bytes],  # a generator of gRPC, which keeps its last message
        context: grpc.aio.ServicerContext,
    ) -> Any:
        call = _Call(context)
        try:
            return await answer(call)
        except CallError as error:
            # Without the exception, whose traceback would keep the message.
            end = error.status, error.details, error.trailers
        except Exception:
            _log.exception("call failed")
            end = StatusCode.INTERNAL, "internal: the server failed; its log has the reason", ()
        finally:
            if call.held_bytes is not None:
                self._calls.release(call.owner)
                self._held_bytes.release(call.owner, call.held_bytes)
        return await context.abort(*end)

    async def _server_live(self, call: _Call) -> Any:
        return message_class("ServerLiveResponse")(live=await self._is_ready(call, "/v2/health/live"))

    async def _server_ready(self, call: _Call) -> Any:
        return message_class("ServerReadyResponse")(ready=await self._is_ready(call, "/v2/health/ready"))

    async def _server_metadata(self, call: _Call) -> Any:
        return message_class("ServerMetadataResponse")(**(await self._get(call, "/v2")))

    async def _model_ready(self, call: _Call) -> Any:
        path = grpc_calls.model_path("ModelReadyRequest", await self._receive(call))
        return message_class("ModelReadyResponse")(ready=await self._is_ready(call, f"{path}/ready"))

    async def _model_metadata(self, call: _Call) -> Any:
        path = grpc_calls.model_path("ModelMetadataRequest", await self._receive(call))
        return message_class("ModelMetadataResponse")(**(await self._get(call, path)))

    async def _model_infer(self, call: _Call) -> Any:
        request = grpc_calls.infer_request(await self._receive(call))
        return grpc_calls.infer_answer(await self._send(call, request))

    async def _is_ready(self, call: _Call, path: str) -> bool:
        try:
            await self._get(call, path)
        except CallError as error:
            if error.status is StatusCode.UNAVAILABLE:
                return False
            raise
        return True

    async def _get(self, call: _Call, path: str) -> dict[str, Any]:
        answer = await self._send(call, HttpRequest("GET", path))
        described: dict[str, Any] = json.loads(answer.body)
        return described

    async def _send(self, call: _Call, request: HttpRequest) -> HttpAnswer:
        """Send a request with the headers of the call.

        Raises:
            CallError: It was refused, or the endpoint did not answer.
        """
        url = URL(f"http://localhost{request.path}", encoded=True)
        headers = {**call.headers, **request.headers}
        body = _pieces(request.body) if request.body else None
        # Sent after `100 Continue`: otherwise a refusal may be lost when HAProxy closes the connection.
        is_large = int(request.headers.get("content-length", 0)) > _PIECE_BYTES
        try:
            async with self._session.request(
                request.method, url, headers=headers, data=body, expect100=is_large
            ) as response:
                answer = HttpAnswer(response.status, response.headers, await response.read())
        except TimeoutError:
            raise CallError(StatusCode.DEADLINE_EXCEEDED, "too_slow: no answer in time; try again") from None
        except aiohttp.ClientError:
            raise CallError(
                StatusCode.UNAVAILABLE, "not_ready: the endpoint does not answer; try again in a few seconds"
            ) from None
        if answer.status >= 400:
            raise grpc_calls.call_error(answer)
        call.context.set_trailing_metadata(grpc_calls.trailers(answer.headers))
        return answer

    async def _receive(self, call: _Call) -> bytes:
        """Receive the message of a call, if its key is valid. Its bytes are held until the call ends.

        Raises:
            CallError: The key is not valid, too many messages are held, or the message is missing or slow.
        """
        if self._keys:
            key = self._keys.identify(call.headers.get("authorization"))
            if key is None or key.is_expired:
                await self._get(call, f"/v2/models/{MODEL_NAME}")  # refuses it, unless the key is a new one
            else:
                call.owner = key.id
        most, seconds = self._limits.grade_bytes, self._limits.grade_seconds
        size = min(most, int(call.size or "0", 16)) if call.size is not None else most
        # Not delayed: HAProxy reads no other call of a connection while a message on it is not received.
        if not (self._calls.can_take(call.owner) and self._held_bytes.can_take(call.owner, size)):
            raise CallError(
                StatusCode.UNAVAILABLE, "overloaded: too many messages are received; try again in 1 s", _LATER
            )
        self._calls.take(call.owner)
        self._held_bytes.take(call.owner, size)
        call.held_bytes = size
        try:
            async with asyncio.timeout(seconds):
                data = await call.context.read()
        except TimeoutError:
            raise CallError(
                StatusCode.DEADLINE_EXCEEDED, f"slow_body: the message did not come within {seconds:g} s"
            ) from None
        if data is grpc.aio.EOF:
            raise CallError(StatusCode.INVALID_ARGUMENT, "bad_inference_request: the message is missing")
        message: bytes = data
        return message

    async def close(self) -> None:
        """Close the connections to the endpoint."""
        await self._session.close()


async def _pieces(body: Sequence[bytes | memoryview]) -> AsyncIterator[bytes | memoryview]:
    """Pieces that a connection buffers without a copy of the rest."""
    for part in body:
        for begin in range(0, len(part), _PIECE_BYTES):
            yield part[begin : begin + _PIECE_BYTES]


@contextmanager
def running(server: GrpcServer, address: str) -> Iterator[Thread]:
    """Run `server` at an address of gRPC, such as `unix:FILE`, in a thread while the block runs.

    The thread ends earlier only if the server fails. Another server in this process would miss calls now and
    then, because gRPC has one poller for all event loops (grpcio 1.85).

    Raises:
        RuntimeError: The address is not available.
    """
    started: Future[Callable[[], object]] = Future()

    async def serve() -> None:
        listener = server.create()
        listener.add_insecure_port(address)
        await listener.start()
        stop, loop = asyncio.Event(), asyncio.get_running_loop()
        started.set_result(lambda: loop.call_soon_threadsafe(stop.set))
        try:
            await stop.wait()
        finally:  # also after a failure: otherwise threads of gRPC keep this process
            await listener.stop(_STOP_SECONDS)
            await server.close()

    def run() -> None:
        try:
            asyncio.run(serve())
        except BaseException as error:  # also SystemExit of a library, which would end the thread in silence
            if not started.done():
                started.set_exception(error)
            else:
                _log.error("the gRPC server has failed", exc_info=error)

    thread = Thread(target=run, name="grpc", daemon=True)
    thread.start()
    stop = started.result()
    try:
        yield thread
    finally:
        with suppress(RuntimeError):  # the event loop of a server that has failed
            stop()
        thread.join()
