"""Features of images: the input of the classifier, the penultimate layer of a network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from cluster.growth import wait_for_node
from jobs.common.console import console
from jobs.common.executor import Executor
from jobs.common.images import Columns, LoadImages, gather_columns, select_locations
from jobs.common.inference import Computation, infer
from scalp_core.bundles.bundle import Bundle


class AddFeatures:
    """Actor that replaces `image` by `features` float32 (D,): the input of the classifier."""

    def __init__(self, bundle: Callable[[], Bundle], computation: Computation, threads: int) -> None:
        import torch  # takes seconds to import

        from scalp_core.models.architecture import load_model, to_channels_last

        torch.set_num_threads(threads)
        shared = bundle()
        model: Any = load_model(shared)
        model.reset_classifier(0)
        self._preprocess = shared.spec.preprocess
        self._device, self._bf16 = computation.device, computation.precision == "bf16"
        self._model = to_channels_last(model.eval()).to(self._device)

    def __call__(self, batch: Columns) -> Columns:
        import torch

        from scalp_core.models.architecture import normalize

        images = torch.from_numpy(batch.pop("image")).to(self._device)
        with torch.inference_mode(), torch.autocast(self._device, torch.bfloat16, enabled=self._bf16):
            features = self._model(normalize(images, self._preprocess))
        return batch | {"features": features.float().cpu().numpy()}


def compute_features(
    bundle: Bundle, rows: pa.Table, computation: Computation, batch_size: int, executor: Executor
) -> np.ndarray:
    """Compute features, float32 (N, D), of the images of a manifest, in the order of its rows.

    Raises:
        UserError: An image cannot be read any more, or has changed.
    """
    batches = iterate_features(bundle, rows, computation, batch_size, executor)
    return gather_columns(batches, rows["image_id"].to_pylist())["features"]


def iterate_features(
    bundle: Bundle, rows: pa.Table, computation: Computation, batch_size: int, executor: Executor
) -> Iterator[Columns]:
    """Yield batches with `image_id`, `features` float32 (N, D) and `error_code`, in any order.

    Args:
        bundle: Bundle whose weights compute the features.
        rows: Images, with `image_id` and the columns that locate them.
        computation: Device and precision.
        batch_size: Images per forward pass.
        executor: Runs the steps.
    """
    cluster = wait_for_node(executor.cluster(), console.print)
    device = computation.device
    arguments = (executor.share(bundle), computation, 1 if device == "cuda" else cluster.model_cpus)
    located, load = select_locations(rows, "image_id"), LoadImages(bundle.spec.preprocess, measured=False)
    yield from infer(located, load, AddFeatures, arguments, device, batch_size, cluster, executor)
