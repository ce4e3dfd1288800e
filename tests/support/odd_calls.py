"""Calls of the Open Inference Protocol over gRPC as no client sends them, for Hypothesis."""

from __future__ import annotations

from typing import Any, NamedTuple

from hypothesis import strategies as st
from tritonclient.grpc import service_pb2

from serving.schemas.inference import OUTPUTS

_TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["..", "a/b", "%2f", "\n", "\0", "\N{BOM}", "\N{FACE WITH TEARS OF JOY}" * 800, "a" * 70_000]
    ),
)
_INT64 = st.integers(-(2**63), 2**63 - 1)
_SHAPES = st.one_of(
    st.lists(st.integers(0, 4), min_size=1, max_size=1),
    st.lists(st.one_of(st.integers(-1, 40), _INT64), max_size=3),
)
_PARAMETERS = st.dictionaries(
    st.one_of(st.sampled_from(["binary_data", "binary_data_size", "classification", "priority"]), _TEXTS),
    st.one_of(
        st.just({}),
        st.booleans().map(lambda value: {"bool_param": value}),
        _INT64.map(lambda value: {"int64_param": value}),
        _TEXTS.map(lambda value: {"string_param": value}),
    ),
    max_size=2,
)
_NUMBERS = st.fixed_dictionaries(
    {},
    optional={
        "bool_contents": st.lists(st.booleans(), max_size=3),
        "int_contents": st.lists(st.integers(-(2**31), 2**31 - 1), max_size=3),
        "int64_contents": st.lists(_INT64, max_size=3),
        "uint_contents": st.lists(st.integers(0, 2**32 - 1), max_size=3),
        "uint64_contents": st.lists(st.integers(0, 2**64 - 1), max_size=3),
        "fp32_contents": st.lists(st.floats(width=32), max_size=3),
        "fp64_contents": st.lists(st.floats(), max_size=3),
    },
)
_DATATYPES = st.one_of(st.just("BYTES"), st.sampled_from(["FP32", "INT64", "bytes", ""]), _TEXTS)


class Call(NamedTuple):
    """A call.

    Args:
        method: Method of the service.
        message: Bytes of the message, which may be damaged.
        metadata: Metadata in addition to the key.
    """

    method: str
    message: bytes
    metadata: tuple[tuple[str, str], ...]


def odd_calls(image: bytes) -> st.SearchStrategy[Call]:
    """Generate calls of all methods, some of which are valid.

    Args:
        image: An image that the model grades.
    """
    names = st.builds(
        lambda name, version: service_pb2.ModelReadyRequest(name=name, version=version).SerializeToString(),
        _mostly("scalp", _TEXTS),
        _mostly("", _TEXTS),
    )
    requests = _infer_requests(image).map(lambda request: request.SerializeToString())
    messages = {"ModelInfer": requests, "ModelReady": names, "ModelMetadata": names}
    messages |= dict.fromkeys(("ServerLive", "ServerReady", "ServerMetadata"), st.binary(max_size=99))
    metadata = st.lists(
        st.tuples(
            st.sampled_from(
                ["x-request-id", "traceparent", "tracestate", "x-forwarded-for", "x-message-bytes", "cookie"]
            ),
            st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=40),
        ),
        max_size=2,
    ).map(tuple)
    methods = _mostly("ModelInfer", st.sampled_from(sorted(messages)))
    return methods.flatmap(
        lambda method: st.builds(Call, st.just(method), _damaged(messages[method]), _mostly((), metadata))
    )


def _mostly(usual: Any, others: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Seven times of eight the usual value, or a value of the usual strategy."""
    usually = usual if isinstance(usual, st.SearchStrategy) else st.just(usual)
    return st.integers(0, 7).flatmap(lambda number: others if number == 7 else usually)


def _infer_requests(image: bytes) -> st.SearchStrategy[service_pb2.ModelInferRequest]:
    files = st.one_of(
        st.just(image),
        st.sampled_from([image[: len(image) // 2], image[:3], b"", b"text"]),
        st.binary(max_size=40),
    )
    images = st.one_of(
        st.lists(st.just(image), min_size=1, max_size=3),
        st.lists(files, max_size=4),
        st.integers(30, 40).map(lambda count: [image] * count),
    )
    return images.flatmap(_requests_with)


def _requests_with(images: list[bytes]) -> st.SearchStrategy[service_pb2.ModelInferRequest]:
    """Requests with these images, as elements or as raw data, and with other things."""
    framed = b"".join(len(image).to_bytes(4, "little") + image for image in images)
    raw = st.one_of(
        st.just([framed]),
        st.lists(
            st.one_of(
                st.just(framed), st.just(framed[:-1]), st.just(b"\xff" * 4 + framed), st.binary(max_size=9)
            ),
            max_size=2,
        ),
    )
    tensors = st.fixed_dictionaries(
        {
            "name": _mostly("image", _TEXTS),
            "datatype": _mostly("BYTES", _DATATYPES),
            "shape": _mostly([len(images)], _SHAPES),
            "parameters": _mostly({}, _PARAMETERS),
            "contents": _mostly({"bytes_contents": images}, _NUMBERS),
        }
    )
    outputs = st.lists(
        st.fixed_dictionaries(
            {"name": _mostly("grade", st.one_of(st.sampled_from(OUTPUTS), _TEXTS))},
            optional={"parameters": _PARAMETERS},
        ),
        max_size=3,
    )
    return st.builds(
        service_pb2.ModelInferRequest,
        model_name=_mostly("scalp", _TEXTS),
        model_version=_mostly("", _TEXTS),
        id=_mostly("", _TEXTS),
        parameters=_mostly({}, _PARAMETERS),
        inputs=_mostly(st.lists(tensors, min_size=1, max_size=1), st.lists(tensors, max_size=3)),
        outputs=_mostly([], outputs),
        raw_input_contents=_mostly([], raw),
    )


def _damaged(messages: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    """The messages, some of them cut, with other bytes in a place, or with a field that no one knows."""
    places, pieces = st.floats(0, 1), st.one_of(st.just(b"\xff"), st.binary(min_size=1, max_size=8))

    def replace(message: bytes, place: float, piece: bytes) -> bytes:
        begin = int(place * len(message))
        return message[:begin] + piece + message[begin + len(piece) :]

    damaged = st.one_of(
        st.builds(lambda message, place: message[: int(place * len(message))], messages, places),
        st.builds(replace, messages, places, pieces),
        st.builds(bytes.__add__, messages, pieces),
        st.binary(max_size=200),
    )
    return _mostly(messages, damaged)
