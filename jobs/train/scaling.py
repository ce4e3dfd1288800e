"""Scaling of a training: number of workers from the user's range and the resources of the cluster."""

from __future__ import annotations

import time

import ray
from ray.train import ScalingConfig

from cluster.growth import planned_device, wait_for_resources
from cluster.local import connect
from cluster.resources import Cluster
from jobs.common.console import console
from scalp_core.errors import UserError
from scalp_core.inference.predictor import Device
from scalp_core.models.recipe import Recipe

CPUS_FOR_DATA = 2
SECONDS_BETWEEN_RESIZES = 30.0
_RETRY_PAUSE_S = 0.5


class ElasticScaling(ScalingConfig):
    """Elastic scaling between a minimum and a maximum, which reserves CPUs for Ray Data.

    Ray would use all CPUs for workers up to the maximum, and then their data would wait forever for a CPU.
    """

    @property
    def max_workers(self) -> int:
        """Current maximum of workers; Ray reads it before each resize."""
        fewest, most = self.num_workers
        have = ray.cluster_resources()
        cpus, gpus = int(have.get("CPU", 0)) - CPUS_FOR_DATA, int(have.get("GPU", 0))
        if (min(cpus, gpus) if self.use_gpu else cpus) < fewest:
            time.sleep(_RETRY_PAUSE_S)  # Ray retries without a pause until there are resources
        # If GPUs are the scarce resource, request the maximum: an autoscaler may start nodes for it.
        return most if self.use_gpu and gpus <= cpus else min(most, cpus)


def wait_for_workers(cluster: Cluster, workers: tuple[int, int] | None, device: Device) -> Cluster:
    """Wait until an autoscaling cluster has resources for the minimum of workers, and return the cluster.

    Raises:
        ClusterError: No node type can hold the workers, or it is unknown whether the nodes have GPUs.
    """
    if not cluster.grows:
        return cluster
    on_gpu = planned_device(cluster, device) == "cuda"
    fewest = workers[0] if workers else max(1, cluster.gpus) if on_gpu else 2
    worker: dict[str, float] = {"CPU": 1, "GPU": 1} if on_gpu else {"CPU": 1}
    wait_for_resources([worker] * fewest + [{"CPU": 1}] * CPUS_FOR_DATA, f"--workers {fewest}", console.print)
    return connect()


def plan_scaling(
    cluster: Cluster, workers: tuple[int, int] | None, device: Device, all_cores: bool = False
) -> ScalingConfig:
    """Plan the workers that the cluster can run in addition to the data pipeline.

    Args:
        cluster: Resources of the cluster.
        workers: Minimum and maximum of workers; None: one per GPU, or one on CPUs.
        device: Device of the workers: auto, cpu or cuda.
        all_cores: A fixed number of workers on CPUs divides the cores of one node, so that all fit on a node
            that is left after losses; otherwise each worker has one core.

    Raises:
        UserError: The cluster cannot run the minimum.
    """
    if device == "cuda" and not cluster.gpus:
        raise UserError(
            "--device cuda: Ray has no GPU; use --device cpu or auto, or join a cluster with GPUs"
        )
    use_gpu = device != "cpu" and cluster.gpus > 0
    fewest, most = workers or ((cluster.gpus if use_gpu else 1),) * 2
    # Each worker reserves at least a CPU, and the data pipeline needs at least two.
    available = min(cluster.gpus, cluster.cpus - CPUS_FOR_DATA) if use_gpu else cluster.cpus - CPUS_FOR_DATA
    if fewest > available:
        resources = "GPUs" if use_gpu else f"CPUs, of which the data pipeline keeps {CPUS_FOR_DATA}"
        have = cluster.gpus if use_gpu else cluster.cpus
        raise UserError(
            f"--workers {fewest}: Ray has {have} {resources}; "
            f"use --workers {max(1, available)} or a larger cluster"
        )
    divides = all_cores and not use_gpu and fewest == most
    cpus = max(1, cluster.model_cpus // most) if divides else 1  # Ray makes them the threads of a worker
    settings = {"use_gpu": use_gpu, "resources_per_worker": {"CPU": cpus, "GPU": int(use_gpu)}}
    if fewest == most:
        return ScalingConfig(num_workers=fewest, **settings)
    return ElasticScaling(
        num_workers=(fewest, most), elastic_resize_monitor_interval_s=SECONDS_BETWEEN_RESIZES, **settings
    )


def plan_side_by_side(
    cluster: Cluster, workers: tuple[int, int] | None, device: Device, count: int
) -> tuple[ScalingConfig, int]:
    """Plan several equal trainings: the workers of each, and the number of trainings that run in parallel.

    With None, trainings divide the GPUs. On CPUs, a training takes the cores of one node. Elastic trainings
    run one after another, because each of them takes all resources of the cluster.

    Args:
        cluster: Resources of the cluster.
        workers: As in `plan_scaling`.
        device: Device of the workers: auto, cpu or cuda.
        count: Number of trainings.

    Raises:
        UserError: The cluster cannot run one of the trainings.
    """
    if workers is None and device != "cpu" and cluster.gpus:
        at_once = max(1, min(count, cluster.gpus, cluster.cpus // (1 + CPUS_FOR_DATA)))
        workers = (max(1, min(cluster.gpus // at_once, cluster.cpus // at_once - CPUS_FOR_DATA)),) * 2
    scaling = plan_scaling(cluster, workers, device, all_cores=True)
    is_elastic = isinstance(scaling, ElasticScaling)
    return scaling, 1 if is_elastic else min(count, count_parallel(cluster, scaling))


def count_parallel(cluster: Cluster, scaling: ScalingConfig) -> int:
    """Count the trainings that fit on the cluster in parallel, each with its workers and CPUs for data."""
    workers = worker_range(scaling)[1]
    cpus = workers * int((scaling.resources_per_worker or {}).get("CPU", 1))
    by_cpus = cluster.cpus // (cpus + CPUS_FOR_DATA)
    by_gpus = cluster.gpus // workers if scaling.use_gpu else by_cpus
    return max(1, min(by_cpus, by_gpus))


def worker_range(scaling: ScalingConfig) -> tuple[int, int]:
    """Return the requested minimum and maximum of workers."""
    workers = scaling.num_workers
    return (workers, workers) if isinstance(workers, int) else workers


def check_batches(recipe: Recipe, rows: int, scaling: ScalingConfig) -> None:
    """Check that the batch is large enough for the workers, and small enough for the data.

    Raises:
        UserError: The batch size does not fit.
    """
    workers = worker_range(scaling)[1]
    # Batch normalization needs two images per micro-batch.
    if recipe.batch_size // workers // recipe.accumulate < 2:
        raise UserError(
            f"batch_size {recipe.batch_size} is less than 2 images for each of {workers} workers and "
            f"{recipe.accumulate} micro-batches; use at least --set "
            f"batch_size={2 * workers * recipe.accumulate}"
        )
    if rows < recipe.batch_size:
        raise UserError(
            f"{rows} training images do not fill one batch of {recipe.batch_size}; "
            "use a smaller --set batch_size=…, or more images"
        )


def batch_norm_line(recipe: Recipe, scaling: ScalingConfig) -> str:
    """Describe the images over which batch normalization computes its statistics."""
    fewest, most = worker_range(scaling)
    norm = recipe.resolve_batch_norm(most)
    if norm == "frozen":
        return "batch normalization: frozen at the statistics of the initial weights"
    micro_batch = recipe.batch_size // recipe.accumulate  # of all workers
    if norm == "sync":
        return (
            f"batch normalization: over the {micro_batch} images of all workers per micro-batch, about "
            f"{micro_batch // most} per worker"
        )
    images = sorted({micro_batch // most, micro_batch // fewest})
    return f"batch normalization: over each worker's {' to '.join(map(str, images))} images per micro-batch"
