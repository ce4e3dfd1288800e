"""Audit of random sources: no image is lost, and splits do not share groups."""

import tempfile
from hashlib import sha256
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scalp_core.datasets import manifest, scan
from scalp_core.errors import UserError
from scalp_core.images.signature import THUMBNAIL_BYTES
from tests.support.examples import examples
from tests.support.sources import audited_rows

ROWS = st.integers(80, examples(150, 300))


def random_objects(rows, devices, seed):
    """Photographs with copies, near-copies, contradictions, several sessions a device, in both parts."""
    rng = np.random.default_rng(seed)
    objects = []
    for index in range(rows):
        copied = objects[rng.integers(len(objects))] if objects and rng.random() < 0.15 else None
        kind = rng.choice(["same", "near"]) if copied else "new"
        digest = sha256(f"{seed}.{index}".encode()).hexdigest()
        device, session = int(rng.integers(devices)), int(rng.integers(4))
        grade = int(rng.choice(4, p=[0.1, 0.3, 0.4, 0.2]))
        if copied and rng.random() < 0.8:
            grade = copied["folder_grade"]
        objects.append(
            {
                "uri": f"/source/{index}.jpg",
                "kind": "photograph",
                "stem": f"{device:04d}_{session}_{index}",
                "part": "Validation" if rng.random() < 0.3 else "Training",
                "symptom": 0 if rng.random() < 0.9 else 5,
                "folder_grade": grade,
                "site": "0001",
                "device": f"D{device}" if rng.random() < 0.9 else None,
                "session": str(session),
                "position": "TH",
                "sha256": copied["sha256"] if kind == "same" else digest,
                "width": 640,
                "height": 480,
                "hash": int(copied["hash"]) ^ (kind == "near") if copied else int(rng.integers(2**63)),
                "turned_hash": int(rng.integers(2**63)),
                "thumbnail": copied["thumbnail"] if copied else rng.bytes(THUMBNAIL_BYTES),
            }
        )
        if objects[-1]["device"] is None:
            objects[-1]["site"] = objects[-1]["session"] = None
    return pa.Table.from_pylist(objects, schema=scan.EXAMINED)


def parts_by(rows, key):
    found = {}
    for row in rows:
        if key(row) is not None:
            found.setdefault(key(row), set()).add(row["split"])
    return found


@pytest.mark.medium
@settings(max_examples=examples(10, 50), deadline=None)
@given(
    rows=ROWS,
    devices=st.integers(10, examples(16, 60)),
    seed=st.integers(0, 10_000),
    method=st.sampled_from(["group", "official", "random"]),
)
def test_what_is_kept_apart_stays_apart_and_nothing_is_lost(rows, devices, seed, method):
    examined = random_objects(rows, devices, seed)
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = audited_rows(examined, Path(folder), method=method, ratio="2:1:1")
        except UserError as error:
            assert "cannot be divided" in str(error)
            assume(False)
        kept, dropped, findings = found.table.to_pylist(), found.dropped, found.findings
        record = manifest.read_spec(found.data).split
    assert sorted(row["uri"] for row in kept + dropped) == sorted(examined["uri"].to_pylist())
    promised = {
        "content": lambda row: row["sha256"],
        **({"group": lambda row: row["group"]} if method != "random" else {}),
        **({"device": lambda row: row["device"]} if method == "group" else {}),
    }
    for key in promised.values():
        assert all(len(parts) == 1 for parts in parts_by(kept, key).values())
    known = {row["uri"]: row for row in examined.to_pylist()}
    sessions = parts_by(kept, lambda row: row["device"] and (row["device"], known[row["uri"]]["session"]))
    # An image that more than three microscopes (as delivered: sessions) have joins none of them.
    units = {}
    grouped = [row for row in dropped if row["reason"] in ("duplicate_content", "official_overlap")]
    for row in kept + grouped:
        each = known[row["uri"]]
        unit = (each["device"], each["session"] if method == "official" else None)
        units.setdefault(each["thumbnail"], set()).update({unit} if each["device"] else ())
    many = {thumbnail for thumbnail, found_in in units.items() if len(found_in) > 3}
    reported = [known[row["uri"]]["thumbnail"] for row in findings if row["finding"] == "joins_many_groups"]
    pictures = parts_by(kept, lambda row: known[row["uri"]]["thumbnail"])
    if method != "random":
        assert sorted(many) == sorted(reported)
        assert all(len(parts) == 1 for parts in sessions.values())
        assert all(len(parts) == 1 for thumbnail, parts in pictures.items() if thumbnail not in many)
        assert record.leaking_pairs["session"] == 0
        assert many or record.leaking_pairs["near_duplicate"] == 0
    else:
        assert (record.leaking_pairs["session"] > 0) == any(len(parts) > 1 for parts in sessions.values())
    labels = {}
    for row in kept:  # no content with two labels is kept
        assert labels.setdefault(row["sha256"], row["label"]) == row["label"]


@pytest.mark.medium
@settings(max_examples=examples(1, 10), deadline=None)
@given(seed=st.integers(0, 10_000))
def test_every_part_is_like_the_whole_where_groups_allow_it(seed):
    examined = random_objects(3000, 100, seed)
    with tempfile.TemporaryDirectory() as folder:
        found = audited_rows(examined, Path(folder), keys=("session",), ratio="7:2:1")
        table = found.table
    whole = np.bincount(table["label"].to_pylist(), minlength=4) / table.num_rows
    for name, share in zip(manifest.SPLITS, (0.7, 0.2, 0.1), strict=True):
        labels = manifest.select_split(table, name)["label"].to_pylist()
        assert abs(len(labels) / table.num_rows - share) < 0.03
        assert np.abs(np.bincount(labels, minlength=4) / len(labels) - whole).max() < 0.05
