import io
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from scalp_core.curation import near_duplicates
from scalp_core.curation.near_duplicates import MAX_BITS, find_pairs
from scalp_core.images.signature import THUMBNAIL_BYTES, compute_signature
from tests.support.sources import PLANS, picture


def saved(image, quality=85, **options):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, **options)
    return buffer.getvalue()


def with_orientation(image, value):
    exif = Image.Exif()
    exif[0x0112] = value
    return saved(image, exif=exif)


CHANGES = {
    "quality 30": lambda image: saved(image, 30),
    "half": lambda image: saved(image.resize((320, 240))),
    "larger": lambda image: saved(image.resize((960, 720))),
    "squashed": lambda image: saved(image.resize((224, 224))),
    "paler": lambda image: saved(ImageEnhance.Color(image).enhance(0.7)),
    "contrast": lambda image: saved(ImageEnhance.Contrast(image).enhance(1.15)),
    "mirrored": lambda image: saved(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
    "rotated by 90 degrees": lambda image: saved(image.transpose(Image.Transpose.ROTATE_90)),
    "rotated by 180 degrees": lambda image: saved(image.transpose(Image.Transpose.ROTATE_180)),
    "rotated pixels and EXIF": lambda image: with_orientation(image.transpose(Image.Transpose.ROTATE_90), 6),
}


signature = cache(compute_signature)


def find(files):
    signatures = [signature(data) for data in files]
    known = np.array([index for index, one in enumerate(signatures) if one.hash is not None])
    thumbnails = np.stack([np.frombuffer(signatures[index].thumbnail, np.uint8) for index in known])
    hashes, turned = (
        np.array([getattr(signatures[index], name) for index in known], np.uint64)
        for name in ("hash", "turned_hash")
    )
    found = find_pairs(hashes, turned, lambda positions: thumbnails[positions])
    assert not len(found.crowded)
    return known[found.pairs].tolist()


@pytest.mark.parametrize("change", CHANGES)
def test_the_same_picture_saved_otherwise_is_found_and_no_other(change):
    files = [picture(plan.index) for plan in PLANS]
    again = CHANGES[change](Image.open(io.BytesIO(files[7])))
    assert find([*files, again]) == [[7, len(files)]]


# --- masks and frames --------------------------------------------------------------------------------------

ROWS, COLUMNS = np.mgrid[:480, :640]


def round_field(pixels, across, down, radius):
    return pixels * (((COLUMNS - across) ** 2 + (ROWS - down) ** 2) < radius**2)[..., None]


def screenshot(pixels, left, top, width, height):
    frame = np.full((480, 640, 3), 30, np.uint8)
    frame[:40], frame[40:90, :200], frame[-60:], frame[100:400, 560:] = 200, 240, 15, 120
    small = Image.fromarray(pixels).resize((width, height))
    frame[top : top + height, left : left + width] = np.asarray(small)
    return frame


VIEWS = {
    "round field": lambda pixels: round_field(pixels, 320, 240, 225),
    "round field, 60 px off center": lambda pixels: round_field(pixels, 260, 260, 190),
    "small round field": lambda pixels: round_field(pixels, 320, 240, 130),
    "screenshot, image 39 %": lambda pixels: screenshot(pixels, 120, 110, 400, 300),
    "screenshot, image 14 %": lambda pixels: screenshot(pixels, 200, 150, 240, 180),
}


# The hardest of each kind; the others run in the night.
_HARDEST = {"small round field", "screenshot, image 14 %"}


@pytest.mark.medium
@pytest.mark.parametrize(
    "view", [pytest.param(view, marks=[] if view in _HARDEST else pytest.mark.slow) for view in VIEWS]
)
def test_masks_and_frames_make_no_two_images_alike_and_hide_no_copy(view):
    images = [
        Image.fromarray(VIEWS[view](np.asarray(Image.open(io.BytesIO(picture(plan.index))))).astype(np.uint8))
        for plan in PLANS
    ]
    files = [saved(image) for image in images]
    changes, copied = ("quality 30", "half", "paler"), range(0, 24, 2)
    copies = [CHANGES[change](images[index]) for change in changes for index in copied]
    origins = [*range(len(files)), *list(copied) * len(changes)]
    pairs = find([*files, *copies])
    assert all(origins[one] == origins[other] for one, other in pairs)  # no false pair
    groups = joined(pairs, len(origins))
    missed = [row for row in range(len(files), len(origins)) if groups[row] != groups[origins[row]]]
    assert len(missed) <= 0.1 * len(copies)


def test_an_image_of_one_color_has_no_hash_and_is_like_no_other():
    gray, black = (saved(Image.new("RGB", (640, 480), color)) for color in ("gray", "black"))
    assert find([gray, black, picture(0)]) == []
    assert compute_signature(gray).hash is compute_signature(gray).turned_hash is None


# --- search ------------------------------------------------------------------------------------------------


def textures(numbers):
    """One texture for each number."""
    drawn = {
        number: np.random.default_rng(number).integers(1, 256, THUMBNAIL_BYTES, dtype=np.uint8)
        for number in set(numbers)
    }
    table = np.stack([drawn[number] for number in numbers])
    return lambda positions: table[positions]


def joined(pairs, rows):
    groups = list(range(rows))
    for one, other in pairs:
        old, new = groups[other], groups[one]
        groups = [new if group == old else group for group in groups]
    return groups


def test_copies_are_found_behind_another_image_of_their_hash():
    hashes = np.array([5, 5, 5], np.uint64)
    assert find_pairs(hashes, hashes + np.uint64(1), textures([0, 1, 1])).pairs.tolist() == [[1, 2]]


@pytest.mark.medium
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000))
def test_images_are_joined_when_their_hashes_are_near_and_their_textures_alike(seed):
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**63, 60, dtype=np.uint64)
    shown = list(range(60))
    for index in range(30, 60):  # each with the hash of another, some bits of it turned
        origin = int(rng.integers(0, index))
        flips = rng.choice(64, rng.integers(0, MAX_BITS + 3), replace=False).astype(np.uint64)
        hashes[index] = hashes[origin] ^ np.bitwise_or.reduce(np.uint64(1) << flips, initial=0)
        shown[index] = shown[origin] if rng.random() < 0.7 else index
    far = rng.integers(0, 2**63, 60, dtype=np.uint64)
    found = find_pairs(hashes, far, textures(shown))
    bits = np.bitwise_count(hashes[:, None] ^ hashes[None])
    near = [
        (one, other)
        for one in range(60)
        for other in range(one + 1, 60)
        if shown[one] == shown[other] and bits[one, other] <= MAX_BITS
    ]
    assert joined(found.pairs.tolist(), 60) == joined(near, 60)
    assert {tuple(pair) for pair in found.pairs.tolist()} <= set(near)


@pytest.mark.medium
def test_a_source_of_one_hash_takes_bounded_work_and_is_reported(monkeypatch):
    rows, compared = 3_000, 0
    shows_same = near_duplicates.shows_same

    def counted(left, right, turns):
        nonlocal compared
        compared += len(left)
        return shows_same(left, right, turns)

    monkeypatch.setattr(near_duplicates, "shows_same", counted)
    rng = np.random.default_rng(0)
    hashes = np.full(rows, 0x9C3A5E71F00D1234, np.uint64)
    for _ in range(2):  # all within four bits of each other, and no two show the same
        hashes ^= np.uint64(1) << rng.integers(0, 64, rows, dtype=np.uint64)
    table = rng.integers(1, 256, (rows, THUMBNAIL_BYTES), dtype=np.uint8)
    found = find_pairs(hashes, rng.integers(0, 2**63, rows, dtype=np.uint64), lambda at: table[at])
    assert found.pairs.tolist() == []
    assert compared < 2.5 * near_duplicates.MAX_PARTNERS * rows
    assert len(found.crowded) > rows / 2


def test_a_thousand_copies_are_a_thousand_pairs():
    hashes = np.full(1_000, 7, np.uint64)
    found = find_pairs(hashes, hashes, textures([3] * 1_000))
    assert found.pairs.tolist() == [[0, other] for other in range(1, 1_000)]
    assert not len(found.crowded)
