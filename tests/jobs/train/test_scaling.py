"""Scaling of a training, and the message while workers wait for resources."""

import pytest
import ray

from cluster.resources import Cluster
from jobs.common.prometheus import TrainMetrics
from jobs.train import progress
from jobs.train import scaling as scaling_module
from jobs.train.progress import Follower
from jobs.train.scaling import ElasticScaling, plan_scaling, plan_side_by_side
from scalp_core.errors import UserError


def cluster(cpus: int, gpus: int = 0) -> Cluster:
    return Cluster(cpus=cpus, gpus=gpus, nodes=1, cores_per_node=cpus)


def resources(monkeypatch, cpus: int, gpus: int = 0) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": float(cpus), "GPU": float(gpus)})


@pytest.mark.parametrize(
    ("cpus", "gpus", "most"),
    [
        (3, 0, 1),
        (6, 0, 4),
        (64, 0, 8),
        (16, 2, 8),
        (4, 4, 2),
    ],  # the last: a CPU for each of its GPUs, and no more
)
def test_elastic_run_reserves_two_cpus_for_data(monkeypatch, cpus, gpus, most):
    resources(monkeypatch, cpus, gpus)
    scaling = plan_scaling(cluster(cpus, gpus), (1, 8), "auto")
    assert isinstance(scaling, ElasticScaling)
    assert (scaling.min_workers, scaling.max_workers) == (1, most)
    resources(monkeypatch, 128, gpus)  # nodes have joined
    assert scaling.max_workers == 8
    monkeypatch.setattr(scaling_module, "_RETRY_PAUSE_S", 0.0)
    resources(monkeypatch, 2, gpus)  # nodes are lost: rather no worker than one without data
    assert scaling.max_workers < scaling.min_workers


def test_too_many_workers_are_refused_with_the_possible_number():
    with pytest.raises(UserError, match="use --workers 4"):
        plan_scaling(cluster(6), (5, 8), "cpu")


@pytest.mark.parametrize(
    ("machine", "workers", "cores"),
    [
        (Cluster(cpus=6, gpus=0, nodes=1, cores_per_node=2), 1, 2),  # a local Ray, with logical CPUs
        (Cluster(cpus=6, gpus=0, nodes=1, cores_per_node=2), 2, 1),
        (Cluster(cpus=6, gpus=0, nodes=1, cores_per_node=2), 3, 1),
        (Cluster(cpus=6, gpus=0, nodes=1, cores_per_node=2), None, 2),
        (cluster(8), 1, 6),  # two stay for the data
        (cluster(8), 2, 3),
        (Cluster(cpus=16, gpus=0, nodes=2, cores_per_node=8), 2, 3),  # both fit on the node that is left
        (cluster(8, gpus=1), None, 1),
    ],
)
def test_workers_of_a_run_divide_the_cores_of_a_node(machine, workers, cores):
    requested = (workers, workers) if workers else None
    scaling = plan_scaling(machine, requested, "auto", all_cores=True)
    assert (scaling.num_workers, scaling.resources_per_worker["CPU"]) == (workers or 1, cores)
    assert plan_scaling(machine, requested, "auto").resources_per_worker["CPU"] == 1  # a trial of a search


@pytest.mark.parametrize(
    ("machine", "workers", "at_once", "of_each"),
    [
        (Cluster(cpus=6, gpus=0, nodes=1, cores_per_node=2), None, 1, 1),  # a local Ray on two cores
        (Cluster(cpus=24, gpus=0, nodes=3, cores_per_node=8), None, 3, 1),  # a node for each
        (Cluster(cpus=96, gpus=0, nodes=12, cores_per_node=8), None, 5, 1),  # not more than folds
        (cluster(32, gpus=8), None, 5, 1),  # trainings divide the GPUs
        (cluster(64, gpus=16), None, 5, 3),
        (cluster(8, gpus=4), None, 2, 2),  # two CPUs for the data of each
        (cluster(32, gpus=8), (4, 4), 2, 4),
        (cluster(32, gpus=8), (1, 4), 1, 4),  # an elastic one takes all
    ],
)
def test_folds_train_side_by_side_where_the_cluster_has_workers_and_cpus_for_their_data(
    monkeypatch, machine, workers, at_once, of_each
):
    resources(monkeypatch, machine.cpus, machine.gpus)
    scaling, parallel = plan_side_by_side(machine, workers, "auto", 5)
    assert (parallel, scaling.max_workers) == (at_once, of_each)


class Silence:
    """A queue of these notes that stops its reader after three empty reads."""

    def __init__(self, *notes):
        self.notes, self.silent, self.reader = list(notes), 0, None

    def empty(self):
        return not self.notes

    def get(self, timeout):  # noqa: ARG002
        if self.notes:
            return self.notes.pop(0)
        self.silent += 1
        if self.silent > 3:
            self.reader.stop.set()
        raise progress.Empty


def said(monkeypatch, capsys, *notes, cpus: int) -> str:
    resources(monkeypatch, cpus)
    monkeypatch.setattr(progress, "_WAITING_MESSAGE_AFTER_S", 0.0)
    monkeypatch.setattr(progress, "placement_group_table", dict)
    queue = Silence(*notes)
    queue.reader = Follower(queue, 4, None, 2, TrainMetrics("run", 4, 16))
    queue.reader.run()
    return capsys.readouterr().out


STARTED = {"workers": 2, "after": 0}


def test_waiting_for_resources_is_reported(monkeypatch, capsys):
    output = said(monkeypatch, capsys, STARTED, {"lost": 2}, cpus=6)
    assert "workers failed: 2" in output
    assert "waiting for resources (workers: 2, CPUs for their data: 2); Ray has 6 CPUs" in output
    assert "waiting for resources" in said(monkeypatch, capsys, STARTED, cpus=3)


def test_long_step_is_not_reported_as_waiting(monkeypatch, capsys):
    assert "waiting" not in said(monkeypatch, capsys, STARTED, cpus=6)
