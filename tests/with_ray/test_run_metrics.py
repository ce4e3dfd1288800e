"""The metrics of a training and of a bulk run, and whether dashboards and alerts ask for what is exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.grade.driver import GradeOptions, grade
from jobs.grade.planning import PoolOptions
from tests.support.images import jpeg
from tests.support.metrics import (
    MetricsWatch,
    Sample,
    alert_queries,
    dashboard_queries,
    total,
    unanswered,
)

PHOTOGRAPHS, BROKEN = 60, 3
SHARD_SIZE = 16
SHARDS = -(-PHOTOGRAPHS // SHARD_SIZE)
# Exported on nodes that have one.
OF_GPUS = {"ray_node_gpus_utilization", "ray_node_gram_used", "ray_node_gram_available"}
# Exported once it has happened.
OF_ACCIDENTS = {"ray_node_manager_unexpected_worker_failure_total"}


@pytest.fixture(scope="module")
def graded(bundle, cluster, tmp_path_factory) -> tuple[dict, list[Sample]]:
    """The summary of a bulk run, and what was exported."""
    folder = tmp_path_factory.mktemp("graded")
    photographs, out = folder / "photographs", folder / "counted"
    photographs.mkdir()
    for number in range(PHOTOGRAPHS):
        data = jpeg(number % 8, (96, 96)) if number >= BROKEN else b"no photograph"
        Path(photographs, f"{number}.jpg").write_bytes(data)
    options = GradeOptions(pool=PoolOptions(shard_size=SHARD_SIZE), heatmaps=0)
    with MetricsWatch() as watch:
        summary = grade(str(bundle), str(photographs), str(out), options)
        # Counted one after another, so a report may lie between any two.
        for name, value in (("photographs", PHOTOGRAPHS), ("shards", SHARDS), ("failed", BROKEN)):
            watch.await_total(f"ray_scalp_grade_{name}_total", value, run="counted")
    return summary, watch.samples


def test_a_bulk_run_counts_what_its_summary_says(graded):
    summary, samples = graded
    assert summary["failed"] == BROKEN

    def counted(name: str, **labels: str) -> float:
        return total(samples, f"ray_scalp_grade_{name}", run="counted", **labels)

    assert counted("photographs_total") == counted("done") == counted("size") == PHOTOGRAPHS
    assert counted("failed_total", code="not_an_image") == counted("failed_total") == BROKEN
    assert counted("shards_total") == SHARDS
    for stage in ("fetch", "decode", "wait", "model", "commit"):
        assert 0 < counted("seconds_total", stage=stage) < 60, stage


def test_a_training_counts_what_its_history_says(pipeline):
    history = json.loads((pipeline.run / "summary.json").read_text())["history"]

    def counted(name: str, **labels: str) -> float:
        return total(pipeline.metrics, f"ray_scalp_train_{name}_total", run=pipeline.run.name, **labels)

    steps = sum(entry["steps"] for entry in history)
    assert counted("steps") == steps
    assert counted("photographs") == steps * pipeline.recipe.batch_size
    assert counted("checkpoints") == len(history)
    assert counted("seconds") == pytest.approx(sum(entry["seconds"] for entry in history), rel=0.05)
    assert 0 < counted("seconds", stage="data") < counted("seconds")
    # Gauges are those of the last time that they were handed over.
    said = {each.name: each.value for each in pipeline.metrics if each.labels.get("run") == pipeline.run.name}
    assert said["ray_scalp_train_val_qwk"] in [pytest.approx(entry["val_qwk"]) for entry in history]
    assert 1 <= said["ray_scalp_train_epoch"] <= said["ray_scalp_train_epochs"] == len(history)
    assert (said["ray_scalp_train_workers"], said["ray_scalp_train_restarts"]) == (2, 0)
    assert 0 < said["ray_scalp_train_loss"] < 3


def test_dashboards_and_alerts_ask_for_what_is_exported(graded, pipeline):
    names = ("training", "grading")
    questions = [each for name in names for each in dashboard_queries(name) + alert_queries(name)]
    questions += alert_queries("nodes")
    samples = graded[1] + pipeline.metrics
    missing = unanswered(questions, samples, OF_GPUS | OF_ACCIDENTS)
    assert not missing, "\n".join(missing)
