from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalp_core import manifest
from scalp_core.errors import UserError
from scalp_core.split import parse_ratio, split_by_group


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(10, 40),
    rows=st.integers(60, 300),
    seed=st.integers(0, 1000),
)
def test_no_group_is_ever_in_two_parts(groups, rows, seed):
    rng = np.random.default_rng(seed)
    # Every group occurs; their sizes differ.
    of_row = np.concatenate([np.arange(groups), rng.integers(0, groups, rows)])
    labels = rng.choice(4, len(of_row), p=[0.1, 0.3, 0.4, 0.2])
    parts = split_by_group(labels, of_row.astype(str), (7, 2, 1), seed)
    assert set(parts) == {"train", "val", "test"}
    for group in range(groups):
        assert len(set(parts[of_row == group])) == 1


def test_parts_have_their_shares_of_rows_and_of_every_grade():
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 60, 6000)
    labels = rng.choice(4, 6000, p=[0.042, 0.348, 0.431, 0.179])
    parts = split_by_group(labels, groups.astype(str), (7, 2, 1), 0)
    counts = Counter(parts)
    for name, share in (("train", 0.7), ("val", 0.2), ("test", 0.1)):
        assert counts[name] / 6000 == pytest.approx(share, abs=0.03)
        for grade in range(4):
            expected = np.mean(labels == grade)
            assert np.mean(labels[parts == name] == grade) == pytest.approx(expected, abs=0.05)


def test_the_same_seed_gives_the_same_split_and_another_another():
    rng = np.random.default_rng(0)
    groups, labels = rng.integers(0, 30, 500).astype(str), rng.integers(0, 4, 500)
    first = split_by_group(labels, groups, (7, 2, 1), 1)
    assert (first == split_by_group(labels, groups, (7, 2, 1), 1)).all()
    assert (first != split_by_group(labels, groups, (7, 2, 1), 2)).any()


def test_too_few_groups_are_refused_with_a_way_out():
    with pytest.raises(UserError, match="at least 10 are needed"):
        split_by_group(np.zeros(9, int), np.arange(9).astype(str), (7, 2, 1), 0)


@pytest.mark.parametrize("text", ["7:2", "a:b:c", "7:0:1", "70:20:11"])
def test_a_ratio_that_is_none_is_refused(text):
    with pytest.raises(UserError, match=text):
        parse_ratio(text)


def rows(**changes):
    base = [
        {
            "image_id": str(index),
            "uri": f"/{index}.jpg",
            "sha256": f"{index}",
            "group": f"g{index}",
            "label": 1,
        }
        for index in range(3)
    ]
    for row, part in zip(base, manifest.PARTS, strict=True):
        row["split"] = part
    base[1] |= changes
    return base


def test_a_manifest_that_was_edited_into_leaking_is_refused(tmp_path):
    manifest.write_manifest(str(tmp_path), rows())
    assert manifest.read_manifest(str(tmp_path)).num_rows == 3
    manifest.write_manifest(str(tmp_path), rows(group="g0"))
    with pytest.raises(UserError, match="group g0 is in both train and val"):
        manifest.read_manifest(str(tmp_path))
    manifest.write_manifest(str(tmp_path), rows(sha256="0"))
    with pytest.raises(UserError, match="content hash 0 is in both train and val"):
        manifest.read_manifest(str(tmp_path))
