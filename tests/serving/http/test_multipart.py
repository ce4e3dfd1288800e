"""Streaming forms: any chunking gives the same parts, and malformed forms are refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.http.multipart import read_form
from serving.http.problems import Refusal

BOUNDARY = b"x-7d"
CONTENT_TYPE = f"multipart/form-data; boundary={BOUNDARY.decode()}"
HEADER = b'Content-Disposition: form-data; name="%b"; filename="%b"\r\n'


def part(data: bytes, name: bytes = b"file", filename: bytes = b"a.jpg", more: bytes = b"") -> bytes:
    return b"--" + BOUNDARY + b"\r\n" + HEADER % (name, filename) + more + b"\r\n" + data + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--" + BOUNDARY + b"--\r\n"


def taken(body: bytes, sizes: list[int], content_type: str = CONTENT_TYPE, max_parts: int = 10):
    """Parse a body in pieces; return its parts as (field, bytes, whole) and the refusal."""
    parts: list[list] = []

    async def pieces() -> AsyncIterator[bytes]:
        at = 0
        for size in [*sizes, len(body)]:
            yield body[at : at + size]
            at += size

    async def parse() -> None:
        async for field, data in read_form(pieces(), content_type, max_parts):
            parts.append([field, b"", False])
            async for piece in data:
                parts[-1][1] += piece
            parts[-1][2] = True

    try:
        asyncio.run(parse())
    except Refusal as refusal:
        return parts, refusal.code
    return parts, None


# Data that looks like boundaries, or nearly.
ALPHABET = [b"\r", b"\n", b"-", b"--", BOUNDARY, b"\r\n--" + BOUNDARY[:-1], b"\0", b"abc", b"\xff\xd8"]
DATA = st.lists(st.sampled_from(ALPHABET), max_size=12).map(b"".join)
SIZES = st.lists(st.integers(1, 40), max_size=60)


@pytest.mark.medium
@settings(deadline=None, max_examples=300)
@given(st.lists(DATA, max_size=4), SIZES)
def test_any_chunking_gives_the_same_parts(datas, sizes):
    datas = [data for data in datas if b"\r\n--" + BOUNDARY not in b"\r\n" + data + b"\r\n"]
    parts, refused = taken(form(*map(part, datas)), sizes)
    assert refused is None
    assert parts == [["file", data, True] for data in datas]


@pytest.mark.medium
@settings(deadline=None, max_examples=200)
@given(st.lists(DATA, min_size=1, max_size=3), st.integers(0, 200), st.integers(0, 255), SIZES)
def test_damage_ends_the_same_way_in_any_chunking(datas, place, byte, sizes):
    body = bytearray(form(*map(part, datas)))
    body[place % len(body)] = byte
    whole, refused = taken(bytes(body), [])
    pieces, also = taken(bytes(body), sizes)
    assert also == refused
    assert [each for each in pieces if each[2]] == [each for each in whole if each[2]]


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 10_000), SIZES)
def test_a_form_that_is_cut_is_not_whole(place, sizes):
    body = form(part(b"one"), part(b"two")).removesuffix(b"\r\n")
    parts, refused = taken(body[: place % len(body)], sizes)
    assert refused == "bad_form"
    assert all(each == ["file", data, True] for each, data in zip(parts[:-1], [b"one", b"two"], strict=False))


@pytest.mark.parametrize(
    "content_type",
    [
        "",
        "multipart/form-data",
        "multipart/form-data; boundary=",
        "multipart/mixed; boundary=x",
        "application/json",
        f"multipart/form-data; boundary={'x' * 300}",
    ],
)
def test_refuses_a_content_type_without_a_boundary(content_type):
    assert taken(b"", [], content_type) == ([], "bad_form")


@pytest.mark.parametrize(
    "body",
    [
        b"--other\r\n\r\n",  # another boundary than was said
        b"no form at all",
        b"--x-7d\r\nContent-Type: image/jpeg\r\n\r\n",  # of no field
        b'--x-7d\r\nContent-Disposition: attachment; name="file"\r\n\r\n',
        b"--x-7d\r\nContent-Disposition: form-data\r\n\r\n",
        b"--x-7d\r\nno header\r\n\r\n",
        b"--x-7d\r\n: empty\r\n\r\n",
        b"--x-7d\r\n" + b"A: b\r\n" * 100 + b"\r\n",  # headers without end
        b"--x-7d\r\nA: " + b"b" * 100_000,
        b"--x-7d\r\n" + b"A" * 100_000,
    ],
)
def test_refuses_what_is_no_form(body):
    assert taken(body, [3] * 10) == ([], "bad_form")


def test_refuses_one_part_too_many_after_those_before_it():
    parts, refused = taken(form(*[part(b"a")] * 11), [])
    assert (len(parts), refused) == (10, "too_many_photographs")


NAMES = [
    (b"file\"; filename*=utf-8''..%2f", "file"),
    (b"../../etc/passwd", "../../etc/passwd"),
    (b"\xeb\x91\x90\xed\x94\xbc", "두피"),
    (b"\xff\xfe", "\ufffd\ufffd"),
    (b"a\0b", "a\0b"),
]


@pytest.mark.parametrize(("name", "field"), NAMES)
def test_names_are_labels(name, field):
    """File names are not read, and names of fields are compared only."""
    parts, refused = taken(form(part(b"data", name, b"../../x.jpg")), [])
    assert (parts, refused) == ([[field, b"data", True]], None)


def test_what_follows_the_end_is_no_part():
    parts, refused = taken(form(part(b"one")) + part(b"two"), [5] * 20)
    assert (parts, refused) == ([["file", b"one", True]], None)
