"""How many workers a training has: what the user asks for, and what the cluster can hold beside Ray Data."""

from __future__ import annotations

import time

import ray
from ray.train import ScalingConfig

from cluster.growth import planned_device, wait_for_resources
from cluster.local import Cluster, connect
from jobs.common.console import console
from scalp_core.errors import UserError
from scalp_core.inference.predictor import Device

CPUS_FOR_DATA = 2
SECONDS_BETWEEN_RESIZES = 30.0
_SECONDS_BETWEEN_QUESTIONS = 0.5


class ElasticScaling(ScalingConfig):
    """Fewest to most workers, as the cluster has them, less the CPUs that Ray Data needs.

    Ray itself takes every CPU for workers up to the most: their data would wait for a CPU for ever.
    """

    @property
    def max_workers(self) -> int:
        """The most that the cluster may hold at this moment; Ray asks again before every resize."""
        fewest, most = self.num_workers
        have = ray.cluster_resources()
        room, gpus = int(have.get("CPU", 0)) - CPUS_FOR_DATA, int(have.get("GPU", 0))
        if (min(room, gpus) if self.use_gpu else room) < fewest:
            time.sleep(_SECONDS_BETWEEN_QUESTIONS)  # Ray asks again at once, for as long as there is no room
        # Where the GPUs are what is scarce, all that is wanted is asked for: nodes may be started for it.
        return most if self.use_gpu and gpus <= room else min(most, room)


def parse_range(option: str, text: str | None) -> tuple[int, int] | None:
    """`4` as (4, 4) and `2:8` as (2, 8), the fewest and the most; None stays None.

    Raises:
        UserError: neither of these.
    """
    if text is None:
        return None
    words = text.split(":")
    if not all(word.isdigit() and int(word) for word in words) or len(words) > 2:
        raise UserError(f"{option} {text}: write a number, or MIN:MAX such as 2:8")
    fewest, most = int(words[0]), int(words[-1])
    if fewest > most:
        raise UserError(f"{option} {text}: MIN is more than MAX; write {option} {most}:{fewest}")
    return fewest, most


def wait_for_workers(cluster: Cluster, workers: tuple[int, int] | None, device: Device) -> Cluster:
    """The cluster when it has room for the fewest workers, for which one that grows may have to start nodes.

    Raises:
        ClusterError: no nodes that it may start can hold them, or it is not said whether they have GPUs.
    """
    if not cluster.grows:
        return cluster
    on_gpu = planned_device(cluster, device) == "cuda"
    fewest = workers[0] if workers else max(1, cluster.gpus) if on_gpu else 2
    worker: dict[str, float] = {"CPU": 1, "GPU": 1} if on_gpu else {"CPU": 1}
    wait_for_resources([worker] * fewest + [{"CPU": 1}] * CPUS_FOR_DATA, f"--workers {fewest}", console.print)
    return connect()


def plan_scaling(cluster: Cluster, workers: tuple[int, int] | None, device: Device) -> ScalingConfig:
    """Workers that this cluster can hold beside the data pipeline.

    Args:
        workers: the fewest and the most; None takes one for each GPU, else two.

    Raises:
        UserError: it cannot hold the fewest.
    """
    if device == "cuda" and not cluster.gpus:
        raise UserError(
            "--device cuda: Ray sees no GPU; use --device cpu or auto, or join a cluster that has one"
        )
    use_gpu = device != "cpu" and cluster.gpus > 0
    fewest, most = workers or ((cluster.gpus if use_gpu else 2),) * 2
    # Each worker holds a CPU, and the data pipeline needs at least two to make progress.
    room = min(cluster.gpus, cluster.cpus - CPUS_FOR_DATA) if use_gpu else cluster.cpus - CPUS_FOR_DATA
    if fewest > room:
        what = "GPUs" if use_gpu else f"CPUs, of which the data pipeline keeps {CPUS_FOR_DATA}"
        have = cluster.gpus if use_gpu else cluster.cpus
        raise UserError(
            f"--workers {fewest}: Ray has {have} {what}; use --workers {max(1, room)} or a larger cluster"
        )
    settings = {"use_gpu": use_gpu, "resources_per_worker": {"CPU": 1, "GPU": int(use_gpu)}}
    if fewest == most:
        return ScalingConfig(num_workers=fewest, **settings)
    return ElasticScaling(
        num_workers=(fewest, most), elastic_resize_monitor_interval_s=SECONDS_BETWEEN_RESIZES, **settings
    )


def worker_range(scaling: ScalingConfig) -> tuple[int, int]:
    """What was asked for, whatever the cluster holds at this moment."""
    workers = scaling.num_workers
    return (workers, workers) if isinstance(workers, int) else workers
