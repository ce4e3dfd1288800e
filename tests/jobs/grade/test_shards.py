"""`GradeShard` computes a shard while the one before is committed."""

import threading

import numpy as np
import pyarrow.parquet as pq

from jobs.grade.files import graded_file
from jobs.grade.shards import GradeShard, LoadedShard
from scalp_core.bundles.loading import load_bundle
from scalp_core.images.statistics import STATISTICS
from scalp_core.results.schema import Signature
from scalp_core.storage import parquet

SIZE = 8


def shard(name: str, grades: list[int | None]) -> LoadedShard:
    """A shard whose images hold their grade in each pixel; None: an image that failed."""
    texts = {column: [""] * len(grades) for column in ("member", "notes", "error")}
    texts |= {"sha256": [f"{index:064x}" for index in range(len(grades))]}
    texts |= {
        column: [f"{name}/{index}" for index in range(len(grades))] for column in ("uri", "location_id")
    }
    texts["error_code"] = ["truncated" if grade is None else "" for grade in grades]
    columns = {column: np.array(values, object) for column, values in texts.items()}
    pixels = np.array([grade or 0 for grade in grades], np.uint8)
    columns["image"] = np.broadcast_to(pixels[:, None, None, None], (len(grades), SIZE, SIZE, 3))
    columns["statistics"] = np.zeros((len(grades), len(STATISTICS)), np.float32)
    return LoadedShard(name, columns, {})


class Reads:
    """A model that reads the grade off the pixels, and counts its callers."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self._lock = threading.Lock()

    def logits(self, images: np.ndarray) -> np.ndarray:
        assert self._lock.acquire(blocking=False)  # one caller at a time
        try:
            self.calls.append(len(images))
            return 20 * np.eye(4, dtype=np.float32)[images[:, 0, 0, 0]]
        finally:
            self._lock.release()


def make(tmp_path, bundle, model, batch_size=3) -> GradeShard:
    signature = Signature("version", "cpu")
    return GradeShard(str(tmp_path), load_bundle(str(bundle)).spec, signature, lambda: model, batch_size)


def test_rows_are_in_the_order_of_the_images_and_failed_ones_take_no_pass(tmp_path, bundle):
    model = Reads()
    done = make(tmp_path, bundle, model)(shard("a", [3, None, 0, 1, 2, 1]))
    rows = pq.read_table(graded_file(str(tmp_path), "a")).to_pylist()
    assert [row["grade"] for row in rows] == [3, None, 0, 1, 2, 1]
    assert [row["error_code"] for row in rows] == [None, "truncated", *[None] * 4]
    assert model.calls == [3, 2]  # batches of three at most
    assert done["rows"] == 6 and done["errors"] == {"truncated": 1}
    assert done["seconds"].keys() == {"wait", "model", "commit"}


def test_a_shard_of_failed_images_needs_no_model(tmp_path, bundle):
    model = Reads()
    assert make(tmp_path, bundle, model)(shard("a", [None, None]))["errors"] == {"truncated": 2}
    assert not model.calls


def test_the_model_computes_the_next_shard_during_a_commit(tmp_path, bundle, monkeypatch):
    model, write = Reads(), parquet.write
    begun, computed = threading.Event(), threading.Event()

    def write_late(uri, table):
        if uri == graded_file(str(tmp_path), "a"):
            begun.set()
            assert computed.wait(30)
        write(uri, table)

    monkeypatch.setattr(parquet, "write", write_late)
    actor = make(tmp_path, bundle, model)
    first = threading.Thread(target=actor, args=(shard("a", [1]),))
    first.start()
    assert begun.wait(30)
    actor(shard("b", [2]))  # would wait forever for the first commit
    assert model.calls == [1, 1]
    computed.set()
    first.join(30)
    assert pq.read_table(graded_file(str(tmp_path), "a"))["grade"].to_pylist() == [1]
