"""Batch inference on rows that fit into memory: loading tasks fetch and decode, models compute logits.

Validation and evaluation use it. Bulk grading commits shards instead: `jobs.grade.run`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.resources import Cluster, is_joined
from jobs.common.executor import Executor, PipelineSize
from jobs.common.images import Columns, LoadImages, without_nulls
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


@dataclass(frozen=True)
class ModelOptions:
    """Options of inference: device, precision, batch size, runtime, test-time augmentation."""

    device: Device = "auto"
    precision: Precision = "auto"
    batch_size: int = 16
    runtime: Runtime = "auto"
    tta: bool = False
    """Average the calibrated probabilities of several flips and rotations: `tta_symmetries`."""


@dataclass(frozen=True)
class Computation:
    """Device, precision, runtime and versions of all models of a job, the same on each node."""

    device: Hardware
    precision: Precision
    runtime: Runtime
    versions: dict[str, str]

    @property
    def computed_by(self) -> str:
        """One line of text for result rows."""
        return computed_by(self.device, self.precision, self.runtime, self.versions)


def resolve(options: ModelOptions, cluster: Cluster, images: int, executor: Executor) -> Computation:
    """Resolve device, precision and runtime for `images` images on this cluster.

    Raises:
        UserError: The device is missing, or a node does not support the precision.
    """
    device = resolve_hardware(options.device, cluster)
    runtime = resolve_runtime(options.runtime, device, images / _models(device, cluster))
    precision = common_precision(options.precision, device, executor, gpus=1 if device == "cuda" else 0)
    return Computation(device, precision, runtime, deciding_versions(runtime, device))


def resolve_hardware(device: Device, cluster: Cluster) -> Hardware:
    """Resolve `auto` to cuda if the cluster has GPUs, else to cpu.

    Raises:
        UserError: cuda was requested, and no node has a GPU.
    """
    if cluster.gpus and device != "cpu":
        return "cuda"
    if device == "cuda":
        resolve_device(device)  # raises a more specific error on a single machine
        raise UserError(
            "--device cuda: no node of the cluster has a GPU; add one, or use another OUT with cpu"
        )
    return "cpu"


def common_precision(precision: Precision, device: Hardware, executor: Executor, gpus: float) -> Precision:
    """Resolve the precision of all models of a job; `auto` is resolved on a worker with `gpus` GPUs.

    Raises:
        UserError: That node does not support the precision.
    """
    if is_joined():
        return executor.call(_precision_here, precision, device, gpus=gpus)
    return _precision_here(precision, device)


def _precision_here(precision: Precision, device: Hardware) -> Precision:
    """Precision of a model on this machine."""
    resolved = resolve_precision(precision, device)
    check_machine(device, resolved)
    return resolved


def _models(device: Hardware, cluster: Cluster) -> int:
    return cluster.gpus if device == "cuda" else cluster.nodes


def tta_symmetries(spec: Preprocess) -> np.ndarray:
    """Symmetries of test-time augmentation: 4 flips if squashed, else also rotations; identity first."""
    return augment.symmetries(turns=spec.resize != "squash")


class AddLogits:
    """Actor that replaces `image` by `logits` float32 (4,); rows that failed to load get zeros.

    `other_logits` float32 (4 (S - 1),) are those of the other symptoms of a bundle of S symptoms.
    With `tta`, `logits` are of the mean probabilities, `plain_logits` of the image without augmentation.
    `seconds` and `plain_seconds` are the time of the forward passes per image.
    """

    def __init__(
        self, bundle: Callable[[], Bundle], computation: Computation, options: ModelOptions, threads: int
    ) -> None:
        self._tta = options.tta
        self._refused: UserError | None = None
        try:
            check_machine(computation.device, computation.precision, computation.versions)
            self._predictor = Predictor(
                bundle(), computation.device, computation.precision, threads, computation.runtime
            )
            self._predictor.warm_up(options.batch_size, smaller=False)
        except UserError as error:  # raised by the first call: Ray would retry a constructor
            self._refused = error

    def __call__(self, batch: Columns) -> Columns:
        if self._refused:
            raise self._refused
        images = batch.pop("image")
        good = batch["error_code"] == ""
        outputs = NUM_GRADES * self._predictor.spec.symptoms
        answers: Columns = {"logits": np.zeros((len(images), outputs), np.float32)}
        if self._tta:
            answers |= {"plain_logits": answers["logits"].copy()}
            answers |= {name: np.zeros(len(images)) for name in ("seconds", "plain_seconds")}
        if good.any() and not self._tta:
            answers["logits"][good] = self._predictor.logits(images[good])
        elif good.any():
            for name, values in self._turned(images[good]).items():
                answers[name][good] = values
        if outputs > NUM_GRADES:
            answers["other_logits"] = answers["logits"][:, NUM_GRADES:]
        for name in answers.keys() & {"logits", "plain_logits"}:
            answers[name] = answers[name][:, :NUM_GRADES]
        return batch | answers

    def _turned(self, images: np.ndarray) -> Columns:
        passes, seconds = [], []
        for symmetry in tta_symmetries(self._predictor.spec.preprocess):
            turned = augment.apply_dihedral(images, np.full(len(images), symmetry))
            started = time.perf_counter()
            passes.append(self._predictor.logits(turned))
            seconds.append(time.perf_counter() - started)
        return {
            "logits": calibration.mean_logits(np.stack(passes), self._predictor.spec),
            "plain_logits": passes[0],  # symmetry 0 is the identity
            "seconds": np.array(sum(seconds) / len(images)),
            "plain_seconds": np.array(seconds[0] / len(images)),
        }


def with_logits(
    rows: pa.Table,
    bundle: Bundle,
    computation: Computation,
    options: ModelOptions,
    cluster: Cluster,
    executor: Executor,
) -> Iterator[Columns]:
    """Compute logits of the images of `rows`.

    Args:
        rows: Rows of a manifest with `LOCATION_COLUMNS`; other columns are passed through.
        bundle: Bundle, loaded and checked on the driver; each actor gets these weights.
        computation: Resolved device, precision and runtime; an actor on a machine that differs refuses.
        options: Batch size and test-time augmentation.
        cluster: Cluster of the executor.
        executor: Runs the steps.

    Yields:
        Batches of the rows with `sha256, error_code, error, statistics, logits`, each row exactly once, in
        any order.
    """
    device = computation.device
    bundle.fetch(needed_part(device, computation.precision, computation.runtime))
    threads = 1 if device == "cuda" else cluster.model_cpus
    arguments = (executor.share(bundle), computation, options, threads)
    load = LoadImages(bundle.spec.preprocess)
    return infer(rows, load, AddLogits, arguments, device, options.batch_size, cluster, executor)


def infer(
    rows: pa.Table,
    load: Callable[[Columns], Columns],
    model: type,
    arguments: Sequence[Any],
    device: Hardware,
    batch_size: int,
    cluster: Cluster,
    executor: Executor,
) -> Iterator[Columns]:
    """Pass the rows of a manifest through `load`, and through models that add columns to a batch.

    One model, made with `arguments`, runs per GPU or per node. The batches come in any order.
    """
    models, on_gpu = _models(device, cluster), device == "cuda"
    cpus = 1 if on_gpu else cluster.model_cpus
    loaders = max(1, min(cluster.cores, cluster.cpus - models * cpus))
    size = PipelineSize(loaders, (models, models), cpus, gpus_per_model=int(on_gpu))
    batches = without_nulls(rows).to_batches(max_chunksize=batch_size)
    items = ({"shard": f"batch {number}", "rows": batch} for number, batch in enumerate(batches))
    return executor.pipeline(items, partial(_load_batch, load), model, arguments, size)


def _load_batch(load: Callable[[Columns], Columns], item: dict[str, Any], _tries: int) -> Iterator[Columns]:
    rows = item["rows"]
    yield load({name: rows[name].to_numpy(zero_copy_only=False) for name in rows.schema.names})
