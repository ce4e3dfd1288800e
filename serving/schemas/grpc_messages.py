"""Messages of the Open Inference Protocol over gRPC, and their tensor data, which is not copied.

They are compiled from a file of Protocol Buffers, by the package grpcio-tools, which is not in the lock:

    cd serving/schemas
    python -m grpc_tools.protoc -I. --descriptor_set_out=open_inference.binpb open_inference.proto
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass

SERVICE = "inference.GRPCInferenceService"

# Separate from the default pool, in which clients of Triton and KServe define the same names.
_pool = DescriptorPool()
(_file,) = FileDescriptorSet.FromString(Path(__file__).with_name("open_inference.binpb").read_bytes()).file
_pool.Add(_file)

# A parsed message takes up to 45 times the memory of its bytes (4 MiB of empty inputs: 179 MiB).
_MOST_BYTES = 64 * 1024
_VARINT, _EIGHT_BYTES, _WITH_LENGTH, _FOUR_BYTES = 0, 1, 2, 5  # kinds of fields


class InferMessage(NamedTuple):
    """A `ModelInferRequest`.

    Args:
        request: The message without its tensor data.
        raw: `raw_input_contents`.
        elements: `bytes_contents` of all inputs.
    """

    request: Any
    raw: list[memoryview]
    elements: list[memoryview]


def message_class(name: str) -> Any:
    """Class of the message `name`."""
    return GetMessageClass(_pool.FindMessageTypeByName(f"inference.{name}"))


def parse_message(name: str, data: bytes | bytearray) -> Any:
    """Parse the message `name`.

    Raises:
        ValueError: It is damaged, or has more than 64 KiB.
    """
    if len(data) > _MOST_BYTES:
        raise _too_long()
    try:
        return message_class(name).FromString(bytes(data))
    except DecodeError:
        raise _damaged() from None


def parse_infer_message(data: bytes) -> InferMessage:
    """Parse a `ModelInferRequest`.

    Raises:
        ValueError: It is damaged, or has more than 64 KiB in addition to tensor data.
    """
    raw: list[memoryview] = []
    elements: list[memoryview] = []
    # Numbers of fields: raw_input_contents, and inputs.contents.bytes_contents.
    rest, _ = _take_out(memoryview(data), {7: raw, 5: {5: {8: elements}}}, _MOST_BYTES)
    return InferMessage(parse_message("ModelInferRequest", rest), raw, elements)


def _take_out(data: memoryview, places: Mapping[int, Any], most: int) -> tuple[bytearray, int]:
    """Move the fields that `places` has lists for into these lists.

    Args:
        data: The message.
        places: A list, or the places of an inner message, by the number of a field.
        most: Most bytes of the other fields, and of the heads of all fields.

    Returns:
        The message without these fields, and what is left of `most`.

    Raises:
        ValueError: The message is damaged, or has more bytes.
    """
    rest, end = bytearray(), 0
    while end < len(data):
        begin = end
        tag, end = _read_varint(data, end)
        kind, size = tag & 7, 0
        if kind in (_VARINT, _WITH_LENGTH):
            size, end = _read_varint(data, end)
        head = end - begin
        end += {_VARINT: 0, _EIGHT_BYTES: 8, _WITH_LENGTH: size, _FOUR_BYTES: 4}.get(kind, len(data) + 1)
        if end > len(data):
            raise _damaged()
        place = places.get(tag >> 3) if kind == _WITH_LENGTH else None
        value = data[begin + head : end]
        if isinstance(place, list):
            place.append(value)
            most -= head
        elif place is not None:
            inner, most = _take_out(value, place, most - head)
            rest += _varint(tag) + _varint(len(inner)) + inner
        else:
            most -= end - begin
            if most >= 0:
                rest += data[begin:end]
        if most < 0:
            raise _too_long()
    return rest, most


def _read_varint(data: memoryview, place: int) -> tuple[int, int]:
    """Read the number at `place`, and return it with the place after it."""
    value = 0
    for number, byte in enumerate(data[place : place + 10]):
        value |= (byte & 127) << (7 * number)
        if byte < 128:
            return value, place + number + 1
    raise _damaged()


def _varint(value: int) -> bytes:
    written = bytearray()
    while value > 127:
        written.append(value & 127 | 128)
        value >>= 7
    return bytes([*written, value])


def _damaged() -> ValueError:
    return ValueError("the message is damaged")


def _too_long() -> ValueError:
    return ValueError(f"the message has more than {_MOST_BYTES:,} bytes in addition to images")
