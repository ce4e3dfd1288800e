"""How a grading run uses the cluster: how many models, how large, how many loading tasks, how much ahead."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cluster.growth import planned_device, wait_for_resources
from cluster.local import Cluster, connect
from jobs.common.console import console
from jobs.common.executor import Executor
from jobs.common.inference import ModelOptions, common_precision, resolve_hardware
from scalp_core.bundles.bundle import Bundle
from scalp_core.errors import UserError
from scalp_core.inference.predictor import Hardware, needed_part, resolve_runtime

# Photographs that are committed together: a run that is killed does again what its models had, no more.
_SHARD: dict[Hardware, int] = {"cpu": 128, "cuda": 512}
# Decoded pixels of a shard travel as one block of Ray's object store.
_MAX_SHARD_BYTES = 256 * 2**20
# Threads of one model wait for each other whenever something else runs, and models do not. But each takes
# memory, so a large node has not one for every core.
_MODELS_A_NODE = 8
# Of a GPU, for each model: one computes while the other copies, words answers and commits them. On an H200
# two graded 1.7 times what one did (docs/grading.md).
_GPU_SHARE = 0.5
# Shards decoded ahead of each model: enough that it never waits, few enough that memory is bounded.
_AHEAD = 6
# Models at most, where a cluster grows for them and nobody says how many.
_MOST_GROWN = 64


@dataclass(frozen=True)
class PoolOptions:
    """What a user may set of it; None leaves the choice to the program.

    Args:
        models: fewest and most model actors at once.
        cpus_per_model: cores of each model's forward pass; of its actor beside a GPU.
        gpus_per_model: share of a GPU.
        loaders: tasks that fetch and decode at once.
        fetches: requests at once of each of these.
        shard_size: photographs that are committed together.
    """

    models: tuple[int, int] | None = None
    cpus_per_model: int | None = None
    gpus_per_model: float | None = None
    loaders: int | None = None
    fetches: int = 16
    shard_size: int | None = None


@dataclass(frozen=True)
class Plan:
    """What was chosen; `PoolOptions` has the fields' meanings."""

    device: Hardware
    models: tuple[int, int]
    cpus_per_model: int
    gpus_per_model: float
    batch_size: int
    loaders: int
    fetches: int
    shard_size: int
    store_bytes: int

    def __str__(self) -> str:
        low, high = self.models
        models = str(high) if low == high else f"{low} to {high}"
        each = f"{self.cpus_per_model} CPU" + (
            f" and {self.gpus_per_model:g} GPU" if self.device == "cuda" else ""
        )
        return (
            f"models: {models}, each {each}, batches of {self.batch_size} at most; loading tasks: "
            f"{self.loaders}, each {self.fetches} requests at once; shards of {self.shard_size} photographs"
        )


def room_for(cluster: Cluster, model: ModelOptions, pool: PoolOptions) -> Cluster:
    """The cluster when it has room for the fewest models, for which one that grows may have to start nodes.

    Raises:
        ClusterError: no nodes that it may start can hold them, or it is not said whether they have GPUs.
    """
    if not cluster.grows:
        return cluster
    low = pool.models[0] if pool.models else 1
    bundle: dict[str, float] = {"CPU": (pool.cpus_per_model or 1) + 1}  # and one to feed it
    if planned_device(cluster, model.device) == "cuda":
        bundle["GPU"] = pool.gpus_per_model or _GPU_SHARE
    wait_for_resources([bundle] * low, f"{low} models", console.print)
    return connect()


def plan_run(cluster: Cluster, bundle: Bundle, model: ModelOptions, pool: PoolOptions) -> Plan:
    """Sizes for this cluster, and fetches what the models need of the bundle.

    Raises:
        UserError: the device is not there, or the cluster can never hold what was asked for.
    """
    device = resolve_hardware(model.device, cluster)
    on_gpu = device == "cuda"
    bundle.fetch(needed_part(device, model.precision, model.runtime))
    cpus = pool.cpus_per_model or (1 if on_gpu else -(-cluster.model_cpus // _MODELS_A_NODE))
    gpus = _gpus(cluster, pool) if on_gpu else 0
    fit = _fitting(cluster, cpus, gpus)
    # One that grows has the autoscaler's own bound.
    most = max(1, fit, _MOST_GROWN if cluster.grows else 0)
    low, high = pool.models or (max(1, fit), most)
    if low > fit:
        size = f"{cpus} CPUs" + (f" and {gpus:g} GPUs" if on_gpu else "")
        raise UserError(
            f"the cluster has room for {fit} models of {size} beside the tasks that load for them, not for "
            f"{low}: it has {cluster.cpus} CPUs and {cluster.gpus} GPUs; use --models and --cpus-per-model, "
            "or a larger cluster"
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
        batch_size=model.batch_size,
        loaders=loaders,
        fetches=pool.fetches,
        shard_size=shard,
        store_bytes=shard * pixels * (_AHEAD * high + loaders),
    )


def resolve_model(model: ModelOptions, plan: Plan, executor: Executor) -> ModelOptions:
    """Device, precision and runtime that all models of a run have, resolved once, on a node that computes.

    On GPUs the runtime stays `auto`: it depends on how many images are listed.

    Args:
        model: as asked for.
        plan: of the run.
        executor: asks one of its nodes.

    Raises:
        UserError: that node cannot compute as asked.
    """
    precision = common_precision(model.precision, plan.device, executor, plan.gpus_per_model)
    runtime = model.runtime if plan.device == "cuda" else resolve_runtime(model.runtime, plan.device)
    return replace(model, device=plan.device, precision=precision, runtime=runtime)


def _gpus(cluster: Cluster, pool: PoolOptions) -> float:
    """Of each model. Fewer models than GPUs get one each: Ray would put two of a half on the same."""
    if pool.gpus_per_model:
        return pool.gpus_per_model
    return 1 if pool.models and pool.models[1] <= cluster.gpus else _GPU_SHARE


def _fitting(cluster: Cluster, cpus: int, gpus: float) -> int:
    """Models that the cluster holds at once, with a CPU left for a task that feeds them."""
    if not gpus:
        room = cluster.nodes * cluster.models_per_node(cpus)
    elif gpus <= 1:
        room = cluster.gpus * int(1 / gpus + 1e-9)
    else:
        room = int(cluster.gpus // gpus)
    return max(0, min(room, (cluster.cpus - 1) // cpus))
