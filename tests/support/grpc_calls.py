"""A gRPC server in front of routes with a stub of the model, and what a client sends to it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import tritonclient.grpc as triton
import uvicorn
from starlette.requests import Request
from tritonclient.grpc import service_pb2

from serving.admission.limits import Limits
from serving.api.grpc_server import GrpcServer, running
from serving.auth.keys import Keys, KeySettings
from serving.schemas import grpc_messages
from tests.serving.api.test_inference import Endpoint

LIMITS = Limits(grade_bytes=2**20, held_bytes=2**21)
NO_KEYS = KeySettings()
SERVICE = f"/{grpc_messages.SERVICE}/"


class Client:
    """Clients of one server, and the requests that it sent."""

    def __init__(self, address: str, sent: list[Request]) -> None:
        self.address = address
        self.sent = sent

    @contextmanager
    def triton(self) -> Iterator[triton.InferenceServerClient]:
        with triton.InferenceServerClient(self.address) as client:
            yield client

    def call(self, method: str, message: bytes, *metadata: tuple[str, str], **options: Any) -> bytes:
        with grpc.insecure_channel(self.address) as channel:
            return channel.unary_unary(SERVICE + method)(message, metadata=metadata, timeout=60, **options)

    def refused(
        self, method: str, message: bytes, *metadata: tuple[str, str], **options: Any
    ) -> grpc.RpcError:
        with pytest.raises(grpc.RpcError) as raised:
            self.call(method, message, *metadata, **options)
        return raised.value


class Requests:
    """ASGI application that notes the requests, and answers by `app`."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.sent: list[Request] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = Request(scope, receive)
        await request.body()
        self.sent.append(request)
        messages = [{"type": "http.request", "body": await request.body(), "more_body": False}]

        async def again() -> Any:
            return messages.pop() if messages else await receive()

        await self.app(scope, again, send)


@contextmanager
def serving(
    folder: Path, limits: Limits = LIMITS, keys: KeySettings = NO_KEYS, app: Any = None
) -> Iterator[Client]:
    """Run the server in front of the routes, or of another application."""
    requests = Requests(app or Endpoint(limits=limits, keys=keys).api)
    config = uvicorn.Config(requests, uds=str(folder / "http.sock"), lifespan="off", log_level="error")
    endpoint = uvicorn.Server(config)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "http.sock"))
        listener.listen()
        thread = threading.Thread(target=endpoint.run, args=([listener],))
        thread.start()
        try:
            address = f"unix:{folder}/grpc.sock"
            with running(GrpcServer(limits, Keys(keys), 30, str(folder / "http.sock")), address):
                yield Client(address, requests.sent)
        finally:
            endpoint.should_exit = True
            thread.join()


def infer(*images: bytes, **changes: Any) -> service_pb2.ModelInferRequest:
    """A request with its images as elements, not as raw data."""
    tensor = {
        "name": "image",
        "datatype": "BYTES",
        "shape": [len(images)],
        "contents": {"bytes_contents": images},
    }
    fields = {"model_name": "scalp", "inputs": [tensor | changes.pop("tensor", {})], **changes}
    return service_pb2.ModelInferRequest(**fields)
