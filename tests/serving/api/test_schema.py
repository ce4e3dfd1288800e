"""Answers are as they are described, whatever schemathesis sends over HTTP and Hypothesis over gRPC."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import numpy as np
import pytest
import uvicorn
from grpc import StatusCode
from hypothesis import event, given, settings
from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from cluster.haproxy import BATCH_PATH, Grpc, Policy
from scalp_core.errors import IMAGE_CODES
from serving.api.grpc_server import GrpcServer
from serving.api.grpc_server import running as running_grpc
from serving.auth.keys import Keys, KeySettings, new_key
from serving.auth.scopes import Rights
from serving.http.problems import CODES
from serving.schemas.bulk import BulkSettings
from serving.schemas.review import ReviewSettings
from serving.settings import Settings
from tests.serving.api.test_bulk import Client, replace_ray
from tests.support.examples import examples
from tests.support.grpc_calls import SERVICE, infer
from tests.support.haproxy_process import Proxy, running
from tests.support.images import jpeg
from tests.support.odd_calls import Call, odd_calls
from tests.support.replica import serve
from tests.support.reviewing import write_run

# Refused requests would say nothing of the routes.
UNLIMITED = Policy(
    requests_per_minute=10**6, burst=10**6, wrong_keys_per_minute=10**6, open_requests_per_minute=10**6
)
# That a file must be a photograph, and a source lie below an allowed prefix, no schema can say.
NOT_SAID = "positive_data_acceptance"
# In a batch a bad photograph is a line of the answer.
A_LINE = "negative_data_rejection"
PHOTOGRAPH = jpeg(0, (64, 48))
# Of a call that is not as it is described. The others mean that the endpoint failed, or is away.
REFUSALS = {
    StatusCode.INVALID_ARGUMENT,
    StatusCode.NOT_FOUND,
    StatusCode.PERMISSION_DENIED,
    StatusCode.RESOURCE_EXHAUSTED,
}


@pytest.fixture(scope="module")
def key() -> tuple[str, str]:
    """A key that may do everything, and its line in the file."""
    return new_key("root", Rights(admin=True))


@pytest.fixture(scope="module")
def proxy(bundle: Path, key: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    """HAProxy in front of the application and of the gRPC server."""
    folder = tmp_path_factory.mktemp("schema")
    (folder / "source").mkdir()
    bulk = BulkSettings(sources=[str(folder / "source")], out=str(folder / "out"))
    review = ReviewSettings(graded=write_run(folder / "run", 4), labels=str(folder / "labels"))
    (folder / "keys").write_text(key[1])
    (folder / "keys").chmod(0o600)
    keys = KeySettings(file=str(folder / "keys"))
    settings = Settings(device="cpu", precision="fp32", bulk=bulk, keys=keys, review=review)
    servers: list[uvicorn.Server] = []
    with pytest.MonkeyPatch.context() as patch, socket.create_server(("127.0.0.1", 0)) as listener:
        replace_ray(patch, Client())
        thread = threading.Thread(target=lambda: asyncio.run(serve(bundle, settings, listener, servers)))
        thread.start()
        sockets = Grpc.of(folder, "127.0.0.1", 8001)
        server = GrpcServer(settings.limits, Keys(keys), 60, str(sockets.requests))
        with (
            running_grpc(server, f"unix:{sockets.calls}"),
            running(folder, UNLIMITED, listener.getsockname()[1], grpc=True) as proxy,
        ):
            yield proxy
        servers[0].should_exit = True
        thread.join()


@pytest.mark.medium
@pytest.mark.parametrize(
    ("which", "left_out"),
    [("--exclude-path", NOT_SAID), ("--include-path", f"{NOT_SAID},{A_LINE}")],
    ids=["one answer", "a batch"],
)
def test_every_answer_is_as_it_is_described(proxy, key, which, left_out, tmp_path):
    address = f"http://127.0.0.1:{proxy.port}/openapi.json"
    assert {"/v1/grade", "/v2/models/{name}/infer"} <= httpx.get(address).json()["paths"].keys()
    command = [str(Path(sys.executable).with_name("st")), "run", address, which, BATCH_PATH]
    command += ["--header", f"Authorization: Bearer {key[0]}"]
    command += ["--exclude-checks", left_out, "--seed", "1", "--no-color"]
    command += ["--max-examples", str(examples(5, 100))]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def channel(proxy: Proxy) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{proxy.grpc_port}") as channel:
        yield channel


@pytest.mark.medium
@settings(deadline=None, max_examples=examples(40, 2000))
@given(data=st.data())
def test_every_call_gets_an_answer_or_a_code_that_is_described(channel, key, data):
    call = data.draw(odd_calls(PHOTOGRAPH))
    try:
        answer = send(channel, key[0], call)
    except grpc.RpcError as error:
        code, _, text = error.details().partition(": ")
        event(f"{call.method}: {code}")
        assert error.code() in REFUSALS and text and (code in CODES or code in IMAGE_CODES), error
    else:
        event(f"{call.method}: answered")
        if call.method == "ModelInfer":
            check_tensors(answer)
    good = Call("ModelInfer", infer(PHOTOGRAPH).SerializeToString(), ())
    check_tensors(send(channel, key[0], good))


def send(channel: grpc.Channel, key: str, call: Call) -> bytes:
    metadata = (*call.metadata, ("authorization", f"Bearer {key}"))
    return channel.unary_unary(SERVICE + call.method)(call.message, metadata=metadata, timeout=60)


def check_tensors(message: bytes) -> None:
    """Each output has as many bytes as its shape says, and a row per image."""
    answer = service_pb2.ModelInferResponse.FromString(message)
    sizes = {"INT32": 4, "FP64": 8, "BOOL": 1}
    rows = {output.shape[0] for output in answer.outputs}
    assert len(rows) == 1 and rows.pop() > 0
    for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True):
        assert len(raw) == np.prod(output.shape) * sizes[output.datatype]
