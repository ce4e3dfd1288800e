"""Training and evaluation load images by place, and refuse files that changed since they were prepared."""

import zipfile
from hashlib import sha256

import numpy as np
import pyarrow as pa
import pytest

from jobs.common.images import LoadForTraining, LoadImages, select_locations, without_nulls
from scalp_core import archives
from scalp_core.datasets import manifest
from scalp_core.errors import UserError
from scalp_core.images.codecs import MAX_BYTES
from scalp_core.images.preprocess import Preprocess
from tests.support.images import jpeg


@pytest.fixture
def rows(tmp_path):
    """Manifest rows of a file and of two members of a zip."""
    (tmp_path / "a.jpg").write_bytes(jpeg(0))
    uri = str(tmp_path / "b.zip")
    with zipfile.ZipFile(uri, "w", zipfile.ZIP_DEFLATED) as archive:
        for index in (1, 2):
            archive.writestr(f"{index}.jpg", jpeg(index))
    rows = [{"uri": str(tmp_path / "a.jpg"), "sha256": sha256(jpeg(0)).hexdigest(), "label": 0}]
    placed = archives.read_placed(uri, ["1.jpg", "2.jpg"], MAX_BYTES)
    for index, (data, place) in enumerate(placed, start=1):
        row = {"uri": uri, "member": f"{index}.jpg", "sha256": sha256(data).hexdigest(), "label": index}
        row |= {"byte_offset": place.offset, "byte_length": place.length, "compression": place.compression}
        rows.append(row)
    return pa.Table.from_pylist(rows, schema=manifest.SCHEMA)


def batch(table):
    table = without_nulls(select_locations(table, "label"))
    return {name: table[name].to_numpy(zero_copy_only=False) for name in table.column_names}


def test_images_are_the_same_by_place_and_by_name(rows, tmp_path, monkeypatch):
    spec = Preprocess(size=64)
    by_name = LoadImages(spec)(batch(rows.select(["uri", "member", "label"])))
    monkeypatch.setattr(archives, "_opened", None)
    by_place = LoadImages(spec)(batch(rows))
    assert np.array_equal(by_name["image"], by_place["image"])
    assert by_place["sha256"].tolist() == by_name["sha256"].tolist() == rows["sha256"].to_pylist()
    assert LoadForTraining(spec)(batch(rows))["label"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(("changed", "name"), [("a.jpg", "a.jpg"), ("b.zip", "b.zip!1.jpg")])
def test_a_file_that_changed_since_it_was_prepared_is_refused(rows, tmp_path, changed, name):
    data = (tmp_path / changed).read_bytes()
    (tmp_path / changed).write_bytes(data[:-9] + data[-5:] if changed == "a.jpg" else b"x" + data)
    with pytest.raises(UserError, match=rf"{name} has changed since it was prepared .*; restore it"):
        LoadForTraining(Preprocess(size=64))(batch(rows))
