"""Logits of rows that fit into memory, by Ray Data: fetch and decode in tasks, the model in actors.

Validation, evaluation and the checks of graphs run it. Bulk grading commits shards instead: `grade.run`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from ray.data import ActorPoolStrategy, Dataset

from cluster.local import Cluster, is_joined
from jobs.common.executor import Executor
from jobs.common.images import Columns, LoadImages
from scalp_core.bundles.bundle import Bundle
from scalp_core.errors import UserError
from scalp_core.grades import NUM_GRADES
from scalp_core.images import augment
from scalp_core.images.preprocess import Preprocess
from scalp_core.inference import calibration
from scalp_core.inference.predictor import (
    Device,
    Hardware,
    Precision,
    Predictor,
    Runtime,
    check_machine,
    computed_by,
    deciding_versions,
    needed_part,
    resolve_device,
    resolve_precision,
    resolve_runtime,
)

_LOAD_BATCH = 32


@dataclass(frozen=True)
class ModelOptions:
    """How the model runs in a pipeline."""

    device: Device = "auto"
    precision: Precision = "auto"
    batch_size: int = 16
    runtime: Runtime = "auto"
    tta: bool = False
    """Average the calibrated probabilities of several flips and turns: `tta_symmetries`."""


@dataclass(frozen=True)
class Computation:
    """What computes all answers of a job, resolved once: machines that differ do not mix theirs.

    Args:
        device: of all models.
        precision: of all forward passes.
        runtime: of all models.
        versions: of the packages that decide answers.
    """

    device: Hardware
    precision: Precision
    runtime: Runtime
    versions: dict[str, str]

    @property
    def computed_by(self) -> str:
        """All of it in one line, as in result rows."""
        return computed_by(self.device, self.precision, self.runtime, self.versions)


def resolve(options: ModelOptions, cluster: Cluster, images: int, executor: Executor) -> Computation:
    """What computes the answers for so many images on this cluster.

    Raises:
        UserError: the device is not there, or the node that was asked cannot compute as asked for.
    """
    device = resolve_hardware(options.device, cluster)
    runtime = resolve_runtime(options.runtime, device, images / _models(device, cluster))
    precision = common_precision(options.precision, device, executor, gpus=1 if device == "cuda" else 0)
    return Computation(device, precision, runtime, deciding_versions(runtime, device))


def resolve_hardware(device: Device, cluster: Cluster) -> Hardware:
    """`auto` takes GPUs where the cluster has some.

    Raises:
        UserError: cuda was asked for, and no node has a GPU.
    """
    if cluster.gpus and device != "cpu":
        return "cuda"
    if device == "cuda":
        resolve_device(device)  # says so of this machine, where it is the only one
        raise UserError(
            "--device cuda: no node of the cluster has a GPU; add one, or use another OUT with cpu"
        )
    return "cpu"


def common_precision(precision: Precision, device: Hardware, executor: Executor, gpus: float) -> Precision:
    """That of all models of a job; a node that computes resolves `auto`.

    Args:
        precision: as asked for.
        device: of all models.
        executor: asks the node.
        gpus: share of a GPU that a model takes.

    Raises:
        UserError: that node cannot compute as asked for.
    """
    if is_joined():
        return executor.call(_precision_here, precision, device, gpus=gpus)
    return _precision_here(precision, device)


def _precision_here(precision: Precision, device: Hardware) -> Precision:
    """That of a model on this machine."""
    resolved = resolve_precision(precision, device)
    check_machine(device, resolved)
    return resolved


def _models(device: Hardware, cluster: Cluster) -> int:
    return cluster.gpus if device == "cuda" else cluster.nodes


def tta_symmetries(spec: Preprocess) -> np.ndarray:
    """Four flips of images that were squashed to squares, else also the quarter turns; the first is none."""
    return augment.symmetries(turns=spec.resize != "squash")


class AddLogits:
    """Actor: replaces `image` by `logits` float32 (4,); rows that failed to load get zeros.

    With `tta` the logits are those of the mean, `plain_logits` those of the photograph as it is,
    `seconds` and `plain_seconds` each photograph's share of the forward passes.
    """

    def __init__(
        self, bundle: Callable[[], Bundle], computation: Computation, options: ModelOptions, threads: int
    ) -> None:
        self._tta = options.tta
        self._refused: UserError | None = None
        how = computation
        try:
            check_machine(how.device, how.precision, how.versions)
            self._predictor = Predictor(bundle(), how.device, how.precision, threads, how.runtime)
            self._predictor.warm_up(options.batch_size)
        except UserError as error:  # of a call it ends the job in one line; of a constructor Ray tries again
            self._refused = error

    def __call__(self, batch: Columns) -> Columns:
        if self._refused:
            raise self._refused
        images = batch.pop("image")
        good = batch["error_code"] == ""
        batch["logits"] = np.zeros((len(images), NUM_GRADES), np.float32)
        if self._tta:
            batch |= {"plain_logits": batch["logits"].copy()}
            batch |= {name: np.zeros(len(images)) for name in ("seconds", "plain_seconds")}
        if good.any() and not self._tta:
            batch["logits"][good] = self._predictor.logits(images[good])
        elif good.any():
            for name, values in self._turned(images[good]).items():
                batch[name][good] = values
        return batch

    def _turned(self, images: np.ndarray) -> Columns:
        passes, seconds = [], []
        for symmetry in tta_symmetries(self._predictor.spec.preprocess):
            turned = augment.apply_dihedral(images, np.full(len(images), symmetry))
            started = time.perf_counter()
            passes.append(self._predictor.logits(turned))
            seconds.append(time.perf_counter() - started)
        return {
            "logits": calibration.mean_logits(np.stack(passes), self._predictor.spec.temperature),
            "plain_logits": passes[0],  # symmetry 0 turns nothing
            "seconds": np.array(sum(seconds) / len(images)),
            "plain_seconds": np.array(seconds[0] / len(images)),
        }


def with_logits(
    rows: Dataset,
    bundle: Bundle,
    computation: Computation,
    options: ModelOptions,
    cluster: Cluster,
    executor: Executor,
) -> Dataset:
    """Grades the photographs that the rows name.

    Args:
        rows: `uri, member` and whatever else is to be carried through.
        bundle: loaded and checked here, on the driver; every actor gets these weights and no others.
        computation: resolved here; an actor on a machine that would answer otherwise refuses.
        options: batch size and test-time augmentation.
        cluster: that it runs on.
        executor: shares the bundle.

    Returns:
        the rows with `sha256, error_code, error, statistics, logits`, each exactly once, in any order.
    """
    device = computation.device
    bundle.fetch(needed_part(device, computation.precision, computation.runtime))
    # The model's own request differs from that of the tasks before it, or Ray would fuse them and the
    # decoding would wait for the model.
    cpus = 1 if device == "cuda" else cluster.model_cpus
    return rows.map_batches(LoadImages(bundle.spec.preprocess), batch_size=_LOAD_BATCH).map_batches(
        AddLogits,
        fn_constructor_args=(executor.share(bundle), computation, options, cpus),
        batch_size=options.batch_size,
        compute=ActorPoolStrategy(size=_models(device, cluster)),
        num_gpus=1 if device == "cuda" else 0,
        num_cpus=cpus,
    )
