"""The order of a review: as stored, or the least certain images first."""

import pyarrow as pa

from scalp_core.labels.queue import Queue
from scalp_core.results.schema import SCHEMA
from tests.support.result_rows import referred


def rows(**probabilities):
    made = []
    for name, values in probabilities.items():
        digest = name.ljust(64, "0")
        changes = {"sha256": digest, "image_id": digest[:20], "probabilities": values}
        changes["grade_set"] = [grade for grade, value in enumerate(values) if value > 0.2]
        made.append(referred(f"/data/{name}.jpg", "ambiguous_grade", **changes))
    return pa.Table.from_pylist(made, schema=SCHEMA)


def names(queue):
    found, image = [], queue.first(lambda _: True)
    while image:
        found.append(image.rstrip("0"))
        image = queue.neighbors(image)["next"]
    return found


ROWS = {
    "sure": [0.9, 0.1, 0.0, 0.0],
    "torn": [0.45, 0.45, 0.1, 0.0],
    "some": [0.6, 0.3, 0.1, 0.0],
    "lost": [0.25, 0.25, 0.25, 0.25],
}


def test_the_least_certain_images_come_first():
    assert names(Queue(rows(**ROWS), "referred")) == ["sure", "torn", "some", "lost"]
    assert names(Queue(rows(**ROWS), "informative")) == ["lost", "torn", "some", "sure"]


def test_equal_bytes_are_one_image():
    table = rows(**ROWS)
    queue = Queue(pa.concat_tables([table, table.slice(0, 2)]), "informative")
    assert len(queue) == 4 == len(names(queue))


def test_neighbors_and_the_first_open_image():
    queue = Queue(rows(**ROWS))
    first, second, *_, last = [name.ljust(20, "0") for name in names(queue)]
    assert queue.neighbors(first) == {"place": 1, "previous": None, "next": second}
    assert queue.neighbors(last)["next"] is None
    digests = {second.ljust(64, "0"), last.ljust(64, "0")}
    assert queue.first(digests.__contains__) == second
    assert queue.count(digests.__contains__) == 2
    assert queue.first(lambda _: False) is None
    kept = queue.keep(digests.__contains__)
    assert names(kept) == ["torn", "lost"] and first not in kept and second in kept
    assert queue.row(second)["uri"] == "/data/torn.jpg"
    assert kept.neighbors(last) == {"place": 2, "previous": second, "next": None}
    assert kept.rows["uri"].to_pylist() == ["/data/torn.jpg", "/data/lost.jpg"]
    assert names(kept.keep({last.ljust(64, "0")}.__contains__)) == ["lost"] and len(kept) == 2


def test_queues_of_many_readers_share_the_rows():
    queue = Queue(rows(**ROWS))
    before = pa.total_allocated_bytes()
    queues = [queue.keep(lambda _: True) for _ in range(20)]
    assert pa.total_allocated_bytes() == before and len(queues[-1]) == len(queue)


def test_an_empty_queue_has_no_image():
    queue = Queue(rows(), "informative")
    assert len(queue) == 0 and queue.first(lambda _: True) is None
