"""Plan a grading run for the cluster: number and size of models, loading tasks, shards, object store."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cluster.resources import Cluster
from jobs.common.console import console
from jobs.common.executor import Executor, PipelineSize
from jobs.common.inference import ModelOptions, common_precision, resolve_hardware
from scalp_core.bundles.bundle import Bundle
from scalp_core.errors import UserError
from scalp_core.inference.predictor import Hardware, needed_part, resolve_runtime

# Images per commit: a killed run repeats only the shards that its models were grading.
_SHARD: dict[Hardware, int] = {"cpu": 128, "cuda": 512}
# Decoded pixels of a shard travel as one block of Ray's object store.
_MAX_SHARD_BYTES = 256 * 2**20
# Several models per node: threads of one model wait for each other when another process runs. But each takes
# memory, so a large node does not have one per core.
_MODELS_PER_NODE = 8
# GPUs per model: one model computes while the other copies, formats and commits. On an H200, two models
# reached 1.7 times the throughput of one (docs/grading.md).
_GPU_SHARE = 0.5
# Threads per model: one computes while the other commits.
_THREADS = 2
# Maximum number of models in a cluster that autoscales, if --replicas is not given.
_MAX_AUTOSCALED = 64


@dataclass(frozen=True)
class PoolOptions:
    """Options of the plan; None: chosen by `plan_run`.

    Args:
        models: Minimum and maximum number of model actors.
        cpus_per_model: CPU cores per model; with a GPU, those of its actor.
        gpus_per_model: GPUs per model, may be a fraction.
        loaders: Parallel tasks that fetch and decode.
        fetches: Parallel requests per loading task.
        shard_size: Images per shard, which is one commit.
    """

    models: tuple[int, int] | None = None
    cpus_per_model: int | None = None
    gpus_per_model: float | None = None
    loaders: int | None = None
    fetches: int = 16
    shard_size: int | None = None


@dataclass(frozen=True)
class Plan(PipelineSize):
    """Resolved sizes of a run; see `PoolOptions`."""

    device: Hardware
    batch_size: int
    fetches: int
    shard_size: int

    def __str__(self) -> str:
        low, high = self.models
        models = str(high) if low == high else f"{low} to {high}"
        size = f"{self.cpus_per_model} CPU" + (
            f" and {self.gpus_per_model:g} GPU" if self.device == "cuda" else ""
        )
        return (
            f"replicas: {models}, each {size}, batches of {self.batch_size} at most; loading tasks: "
            f"{self.loaders}, each {self.fetches} requests at once; shards of {self.shard_size} images"
        )


def room_for(cluster: Cluster, model: ModelOptions, pool: PoolOptions) -> Cluster:
    """Return the cluster once the minimum number of models fits; an autoscaling one may start nodes first.

    Raises:
        ClusterError: No nodes that it may start can hold them, or --device must state whether they have GPUs.
    """
    if not cluster.grows:
        return cluster
    # Ray, which local runs do not import.
    from cluster.growth import planned_device, wait_for_resources
    from cluster.local import connect

    low = pool.models[0] if pool.models else 1
    bundle: dict[str, float] = {"CPU": (pool.cpus_per_model or 1) + 1}  # one more for a loading task
    if planned_device(cluster, model.device) == "cuda":
        bundle["GPU"] = pool.gpus_per_model or _GPU_SHARE
    wait_for_resources([bundle] * low, f"{low} models", console.print)
    return connect()


def plan_run(cluster: Cluster, bundle: Bundle, model: ModelOptions, pool: PoolOptions) -> Plan:
    """Resolve the sizes for this cluster, and fetch the files of the bundle that the models need.

    Raises:
        UserError: The device is missing, or the cluster is too small for the options.
    """
    device = resolve_hardware(model.device, cluster)
    on_gpu = device == "cuda"
    bundle.fetch(needed_part(device, model.precision, model.runtime))
    cpus = pool.cpus_per_model or (1 if on_gpu else -(-cluster.model_cpus // _MODELS_PER_NODE))
    gpus = _gpus(cluster, pool) if on_gpu else 0
    fit = _fitting(cluster, cpus, gpus)
    # An autoscaling cluster is bounded by its autoscaler.
    default_high = max(1, fit, _MAX_AUTOSCALED if cluster.grows else 0)
    low, high = pool.models or (max(1, fit), default_high)
    if low > fit:
        size = f"{cpus} CPUs" + (f" and {gpus:g} GPUs" if on_gpu else "")
        raise UserError(
            f"the cluster has room for {fit} models of {size} in addition to the loading tasks, not for "
            f"{low}: it has {cluster.cpus} CPUs and {cluster.gpus} GPUs; use --replicas and "
            "--cpus-per-replica, or a larger cluster"
        )
    pixels = 3 * bundle.spec.preprocess.size**2
    shard = pool.shard_size or min(_SHARD[device], max(1, _MAX_SHARD_BYTES // pixels))
    if shard * pixels > _MAX_SHARD_BYTES:
        raise UserError(
            f"--shard-size {shard}: its pixels take {shard * pixels / 2**20:.0f} MiB; "
            f"use {_MAX_SHARD_BYTES // pixels} or fewer"
        )
    loaders = max(1, min(cluster.cores, cluster.cpus - fit * cpus - 1))
    if cluster.grows:
        loaders = -(-loaders * high // max(1, fit))
    loaders = pool.loaders or loaders
    return Plan(
        device=device,
        models=(low, high),
        cpus_per_model=cpus,
        gpus_per_model=gpus,
        threads=_THREADS,
        batch_size=model.batch_size,
        loaders=loaders,
        fetches=pool.fetches,
        shard_size=shard,
    )


def resolve_model(model: ModelOptions, plan: Plan, executor: Executor) -> ModelOptions:
    """Resolve device, precision and runtime of all models of a run, once, on a worker node.

    On GPUs the runtime stays `auto`: it depends on the number of listed images.

    Raises:
        UserError: The node does not support the precision.
    """
    precision = common_precision(model.precision, plan.device, executor, plan.gpus_per_model)
    runtime = model.runtime if plan.device == "cuda" else resolve_runtime(model.runtime, plan.device)
    return replace(model, device=plan.device, precision=precision, runtime=runtime)


def _gpus(cluster: Cluster, pool: PoolOptions) -> float:
    """GPUs per model. At most one model per GPU gets a whole one: Ray would place two halves on the same."""
    if pool.gpus_per_model:
        return pool.gpus_per_model
    return 1 if pool.models and pool.models[1] <= cluster.gpus else _GPU_SHARE


def _fitting(cluster: Cluster, cpus: int, gpus: float) -> int:
    """Number of models that fit the cluster, with one CPU left for a loading task."""
    if not gpus:
        room = cluster.nodes * cluster.models_per_node(cpus)
    elif gpus <= 1:
        room = cluster.gpus * int(1 / gpus + 1e-9)
    else:
        room = int(cluster.gpus // gpus)
    return max(0, min(room, (cluster.cpus - 1) // cpus))
