"""Limits of the gRPC server on size, memory and time of messages, and its check of keys."""

from __future__ import annotations

import gc
import threading
import tracemalloc
from collections.abc import Iterator

import grpc
import pytest
from grpc import StatusCode

from serving.auth.keys import KeySettings
from tests.serving.api.test_inference import KEY
from tests.support.grpc_calls import LIMITS, SERVICE, Client, infer, serving


@pytest.fixture(scope="module")
def client(tmp_path_factory) -> Iterator[Client]:
    with serving(tmp_path_factory.mktemp("grpc")) as client:
        yield client


@pytest.fixture(scope="module")
def with_keys(tmp_path_factory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("keys")
    (folder / "keys").write_text(
        f"ann: {KEY}\nbob: {KEY}-of-bob scope=bulk:/data\ncy: {KEY}-of-cy expires=2020-01-01"
    )
    (folder / "keys").chmod(0o600)
    with serving(folder, keys=KeySettings(file=str(folder / "keys"))) as client:
        yield client


def field(number: int, *content: bytes) -> bytes:
    """A field with a length, of the message with these bytes."""
    data, size = b"".join(content), b""
    left = len(data)
    while left > 127:
        size, left = size + bytes([left & 127 | 128]), left >> 7
    return bytes([number << 3 | 2]) + size + bytes([left]) + data


@pytest.mark.medium
@pytest.mark.parametrize(
    ("message", "details"),
    [
        (b"\xff" * 20, "the message is damaged"),
        (b"\x2a\x05a", "the message is damaged"),  # ends within a field
        (b"\x08", "the message is damaged"),
        (b"\x0b\x0c", "the message is damaged"),  # a group
        (b"\x0a\x01\xff", "the message is damaged"),  # a name that is not UTF-8
        (b"\x2a\x00" * 400_000, "the message has more than 65,536 bytes in addition to images"),
        (field(5, b"\x2a\x00" * 400_000), "the message has more than 65,536 bytes"),
        (field(5, field(5, field(2, b"\x01" * 10**6))), "the message has more than 65,536 bytes"),  # integers
        (field(5, field(5, b"\x42\x00" * 400_000)), "the message has more than 65,536 bytes"),  # empty images
        (b"\x3a\x00" * 400_000, "the message has more than 65,536 bytes"),  # empty tensors
        (field(4, b"a" * 70_000), "the message has more than 65,536 bytes"),
        (field(15, b"a" * 70_000), "the message has more than 65,536 bytes"),  # an unknown field
    ],
)  # fmt: skip
def test_a_message_that_would_take_much_memory_is_not_parsed(client, message, details, monkeypatch):
    error = client.refused("ModelInfer", message)
    assert error.code() is StatusCode.INVALID_ARGUMENT
    assert error.details().startswith(f"bad_inference_request: {details}"), error.details()


def test_a_large_image_is_counted_as_an_image(client):
    for message in (
        infer(b"a" * 900_000),
        infer(b"", raw_input_contents=[(900_000).to_bytes(4, "little") + b"a" * 900_000]),
    ):
        client.call("ModelInfer", message.SerializeToString())


def test_a_refused_message_leaves_the_memory_with_its_call(client):
    """Without the garbage collector, which large messages do not wake."""
    message = infer(b"broken", tensor={"shape": [9]}, raw_input_contents=[bytes(900_000)]).SerializeToString()
    client.refused("ModelInfer", message)
    gc.disable()
    tracemalloc.start()
    try:
        for _ in range(8):
            client.refused("ModelInfer", message)
            client.sent.clear()
        assert tracemalloc.get_traced_memory()[0] < 4 * len(message)
    finally:
        tracemalloc.stop()
        gc.enable()


def test_a_message_beyond_the_limit_is_refused(client):
    error = client.refused("ModelInfer", infer(b"a" * LIMITS.grade_bytes).SerializeToString())
    assert error.code() is StatusCode.RESOURCE_EXHAUSTED


def test_a_compressed_message_is_refused(client):
    count = len(client.sent)
    message = infer(b"a" * 900_000).SerializeToString()
    error = client.refused("ModelInfer", message, compression=grpc.Compression.Gzip)
    assert error.code() is StatusCode.UNIMPLEMENTED and len(client.sent) == count


def test_a_key_is_checked_before_the_message_is_received(with_keys):
    message = infer(b"a").SerializeToString()
    for key, status, code in (
        (None, StatusCode.UNAUTHENTICATED, "no_key"),
        ("not-a-key-of-this-endpoint", StatusCode.UNAUTHENTICATED, "wrong_key"),
        (f"{KEY}-of-cy", StatusCode.UNAUTHENTICATED, "expired_key"),
        (f"{KEY}-of-bob", StatusCode.PERMISSION_DENIED, "forbidden"),
    ):
        metadata = [("authorization", f"Bearer {key}")] if key else []
        for method in ("ModelInfer", "ModelReady", "ModelMetadata"):
            error = with_keys.refused(
                method, message if method == "ModelInfer" else b"\x0a\x05scalp", *metadata
            )
            assert (error.code(), error.details().partition(": ")[0]) == (status, code)
            assert with_keys.sent[-1].method == "GET" or status is StatusCode.PERMISSION_DENIED
    with_keys.call("ModelInfer", message, ("authorization", f"Bearer {KEY}"))
    assert with_keys.sent[-1].url.path == "/v2/models/scalp/infer"
    assert with_keys.call("ServerReady", b"") == b"\x08\x01"  # needs no key


def test_without_a_key_a_message_is_not_waited_for(with_keys):
    """The refusal comes although the client sends no message."""
    with grpc.insecure_channel(with_keys.address) as channel:
        silent, end = threading.Event(), iter([])

        def nothing() -> Iterator[bytes]:
            silent.wait()
            yield from end

        try:
            with pytest.raises(grpc.RpcError) as raised:
                channel.stream_unary(f"{SERVICE}ModelInfer")(nothing(), timeout=60)
        finally:
            silent.set()
    assert raised.value.code() is StatusCode.UNAUTHENTICATED


def test_a_message_that_does_not_come_is_given_up(tmp_path):
    limits = LIMITS.model_copy(update={"grade_seconds": 0.01})
    silent = threading.Event()
    with serving(tmp_path, limits) as client, grpc.insecure_channel(client.address) as channel:

        def nothing() -> Iterator[bytes]:
            silent.wait()
            yield from ()

        call = channel.stream_unary(f"{SERVICE}ModelInfer").future(nothing(), timeout=60)
        assert call.exception().code() is StatusCode.DEADLINE_EXCEEDED
        assert call.details().startswith("slow_body: ")
        silent.set()


def test_a_call_without_a_message_is_refused(client):
    with grpc.insecure_channel(client.address) as channel, pytest.raises(grpc.RpcError) as raised:
        channel.stream_unary(f"{SERVICE}ModelInfer")(iter([]), timeout=60)
    assert raised.value.code() is StatusCode.INVALID_ARGUMENT


def test_messages_beyond_the_memory_are_refused_and_small_ones_received(tmp_path):
    """HAProxy reports the length of a message, and a call holds as much while its message comes."""
    with serving(tmp_path) as client, grpc.insecure_channel(client.address) as channel:
        silent, message = threading.Event(), infer(b"a").SerializeToString()

        def late() -> Iterator[bytes]:
            silent.wait()
            yield message

        method = channel.stream_unary(f"{SERVICE}ModelInfer")
        most = [("x-message-bytes", f"{LIMITS.grade_bytes - 1000:08X}")]
        held = [method.future(late(), metadata=most, timeout=60) for _ in range(2)]
        refused = None
        while refused is None:  # until both are held
            try:
                client.call("ModelInfer", message, *most)
            except grpc.RpcError as error:
                refused = error
            # This call may have come before one of them, which then was refused.
            for place, call in enumerate(held):
                if call.done():
                    held[place], refused = method.future(late(), metadata=most, timeout=60), None
        assert refused.code() is StatusCode.UNAVAILABLE and refused.details().startswith("overloaded: ")
        assert ("retry-after", "1") in [tuple(pair) for pair in refused.trailing_metadata()]
        client.call("ModelInfer", message, ("x-message-bytes", "000003E8"))
        silent.set()
        assert all(call.result() for call in held)
        client.call("ModelInfer", message, *most)
