import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance

from scalp_core.near_duplicates import MAX_BITS, candidates, confirmed, signature
from tests.sources import PLANS, picture


def saved(image, quality=85):
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


CHANGES = {
    "quality 30": lambda image: saved(image, 30),
    "half": lambda image: saved(image.resize((320, 240))),
    "larger": lambda image: saved(image.resize((960, 720))),
    "squashed": lambda image: saved(image.resize((224, 224))),
    "paler": lambda image: saved(ImageEnhance.Color(image).enhance(0.7)),
    "contrast": lambda image: saved(ImageEnhance.Contrast(image).enhance(1.15)),
}


def found(files):
    signatures = [signature(data) for data in files]
    thumbnails = np.stack([np.frombuffer(thumbnail, np.uint8) for _, thumbnail in signatures])
    pairs = candidates(np.array([hash_ for hash_, _ in signatures], np.uint64))
    return pairs[confirmed(pairs, lambda index: thumbnails[index])].tolist()


@pytest.mark.parametrize("change", CHANGES)
def test_the_same_picture_saved_otherwise_is_found_and_no_other(change):
    files = [picture(plan.index) for plan in PLANS]
    again = CHANGES[change](Image.open(io.BytesIO(files[7])))
    assert found([*files, again]) == [[7, len(files)]]


def test_pictures_of_one_colour_are_alike():
    grey, black = (saved(Image.new("RGB", (640, 480), colour)) for colour in ("grey", "black"))
    assert found([grey, black, picture(0)]) == [[0, 1]]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_every_pair_of_near_hashes_is_a_candidate_or_leads_to_one(seed):
    rng = np.random.default_rng(seed)
    hashes = rng.integers(0, 2**63, 60, dtype=np.uint64)
    for index in range(30, 60):  # each a copy of another with some bits turned
        flips = rng.choice(64, rng.integers(0, MAX_BITS + 3), replace=False).astype(np.uint64)
        hashes[index] = hashes[rng.integers(0, index)] ^ np.bitwise_or.reduce(
            np.uint64(1) << flips, initial=0
        )
    pairs = {tuple(pair) for pair in candidates(hashes).tolist()}
    firsts = {value: index for index, value in reversed(list(enumerate(hashes.tolist())))}
    for one in range(60):
        for other in range(one):
            bits = int(np.bitwise_count(hashes[one] ^ hashes[other]))
            ends = tuple(sorted(firsts[int(hashes[index])] for index in (one, other)))
            if bits == 0:  # copies are tied to the first of them
                assert ends[0] == ends[1]
                assert one == ends[0] or (ends[0], one) in pairs
            else:
                assert (bits <= MAX_BITS) == (ends in pairs)
