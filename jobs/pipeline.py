"""Logits of rows that fit into memory, by Ray Data: fetch and decode in tasks, the model in actors.

Validation, evaluation and the checks of graphs run it. Bulk grading commits shards instead: `grade_run`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import ray
from ray.data import ActorPoolStrategy, Dataset

from cluster.local import Cluster
from jobs.images import Columns, LoadImages
from scalp_core import augment, calibration
from scalp_core.bundle import Bundle
from scalp_core.grades import NUM_GRADES
from scalp_core.predictor import (
    Device,
    Hardware,
    Precision,
    Predictor,
    Runtime,
    needed_part,
    resolve_device,
    resolve_runtime,
)
from scalp_core.preprocess import Preprocess

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


def tta_symmetries(spec: Preprocess) -> np.ndarray:
    """Four flips of images that were squashed to squares, else also the quarter turns; the first is none."""
    return augment.symmetries(turns=spec.resize != "squash")


class AddLogits:
    """Actor: replaces `image` by `logits` float32 (4,); rows that failed to load get zeros.

    With `tta` the logits are those of the mean, `plain_logits` those of the photograph as it is,
    `seconds` and `plain_seconds` each photograph's share of the forward passes.
    """

    def __init__(self, bundle: ray.ObjectRef, options: ModelOptions, threads: int) -> None:
        self._predictor = Predictor(
            ray.get(bundle), options.device, options.precision, threads, options.runtime
        )
        self._predictor.warm_up(options.batch_size)
        self._tta = options.tta

    def __call__(self, batch: Columns) -> Columns:
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
            turned = augment.dihedral(images, np.full(len(images), symmetry))
            started = time.perf_counter()
            passes.append(self._predictor.logits(turned))
            seconds.append(time.perf_counter() - started)
        return {
            "logits": calibration.mean_logits(np.stack(passes), self._predictor.spec.temperature),
            "plain_logits": passes[0],  # symmetry 0 turns nothing
            "seconds": np.array(sum(seconds) / len(images)),
            "plain_seconds": np.array(seconds[0] / len(images)),
        }


def with_logits(rows: Dataset, bundle: Bundle, options: ModelOptions, cluster: Cluster) -> Dataset:
    """Grades the photographs that the rows name.

    Args:
        rows: `uri, member` and whatever else is to be carried through.
        bundle: loaded and checked here, on the driver; every actor gets these weights and no others.

    Returns:
        the rows with `sha256, error_code, error, statistics, logits`, each exactly once, in any order.
    """
    on_gpu = cluster.gpus > 0 and options.device != "cpu"
    if not on_gpu:
        resolve_device(options.device)  # refuses cuda where there is none, before anything starts
    device: Hardware = "cuda" if on_gpu else "cpu"
    bundle.fetch(needed_part(device, options.precision, options.runtime))
    models = cluster.gpus if on_gpu else cluster.nodes
    runtime = resolve_runtime(options.runtime, device, rows.count() / models)
    options = replace(options, device=device, runtime=runtime)
    # The model's own request differs from that of the tasks before it, or Ray would fuse them and the
    # decoding would wait for the model.
    cpus = 1 if on_gpu else cluster.model_cpus
    return rows.map_batches(LoadImages(bundle.spec.preprocess), batch_size=_LOAD_BATCH).map_batches(
        AddLogits,
        fn_constructor_args=(ray.put(bundle), options, cpus),
        batch_size=options.batch_size,
        compute=ActorPoolStrategy(size=models),
        num_gpus=1 if on_gpu else 0,
        num_cpus=cpus,
    )
