"""The actor of a grading run that holds the model, called as Ray calls it."""

from types import SimpleNamespace

import numpy as np
import pytest

from jobs.grade.files import STARTED
from jobs.grade.shards import GradeShard, pack_shard
from scalp_core.bundles.loading import load_bundle
from scalp_core.errors import UserError
from scalp_core.images.statistics import STATISTICS
from scalp_core.results.schema import Signature
from scalp_core.storage import parquet
from tests.support.sizes import SMALL


class Model:
    def logits(self, images: np.ndarray) -> np.ndarray:
        return np.zeros((len(images), 4), np.float32)


def shard(name: str):
    text = np.array(["a"], object)
    columns = ("location_id", "uri", "member", "sha256", "error", "notes")
    rows = dict.fromkeys(columns, text) | {"error_code": np.array([""], object)}
    rows |= {"image": np.zeros((1, SMALL, SMALL, 3), np.uint8), "statistics": np.zeros((1, len(STATISTICS)))}
    return pack_shard(name, rows, {})


def test_a_model_that_could_not_commit_begins_nothing_more(bundle, tmp_path, monkeypatch):
    spec = load_bundle(str(bundle)).spec
    guard = SimpleNamespace(check=lambda: None)
    model = GradeShard(str(tmp_path), guard, spec, Signature(spec.model_version, "cpu"), Model, 8)
    monkeypatch.setattr("jobs.grade.shards.result_table", lambda *_: None)

    def full(uri, _):
        raise UserError(f"cannot write {uri}: the disk is full")

    monkeypatch.setattr(parquet, "write", full)
    for name in ("0000/0000", "0000/0001"):
        with pytest.raises(UserError, match="the disk is full"):
            list(model(shard(name)))
    begun = [each.name for each in (tmp_path / STARTED).rglob("*") if each.is_file()]
    assert len(begun) == 1 and begun[0].startswith("0000.")
