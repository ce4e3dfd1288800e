"""How photographs reach the training workers: Ray Data loads each worker's share, in a settled order.

Decoded once into Ray's object store where it holds them; otherwise decoded again in every epoch. The order
is always that of `scalp_core.models.sampler`. Every worker runs one stream over all remaining epochs, so that
nothing waits between them. Imports nothing that is slow to load: the tasks import it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.data import DataContext, Dataset, ExecutionResources

from cluster.local import Cluster
from jobs.common.images import Columns, LoadForTraining, make_dataset, select_locations, without_nulls
from scalp_core.images import augment
from scalp_core.images.preprocess import Preprocess
from scalp_core.models.sampler import EpochSettings, RankBatch, images_per_epoch, plan_epoch

_ROWS_A_BLOCK = 64
_MAX_BLOCKS = 10_000
_PREFETCH_BATCHES = 2
# Of the smallest node's object store: the rest is for what flows.
_CACHE_SHARE = 0.5


@dataclass(frozen=True)
class ImageSource:
    """The photographs of one part, as tasks on any node read them by their row.

    Args:
        labels: int8 (N,).
        rows: reference to the manifest's `uri, member, label`.
        spec: preprocessing.
        blocks: references to blocks of `_ROWS_A_BLOCK` decoded photographs, in order; None decodes each time.
    """

    labels: np.ndarray
    rows: ray.ObjectRef
    spec: Preprocess
    blocks: list[ray.ObjectRef] | None

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, wanted: np.ndarray) -> np.ndarray:
        """uint8 (N, size, size, 3) of these rows, in their order."""
        if self.blocks is None:
            rows = ray.get(self.rows).take(wanted)
            columns = {name: rows[name].to_numpy(zero_copy_only=False) for name in rows.column_names}
            return LoadForTraining(self.spec)(columns)["image"]
        images = np.empty((len(wanted), self.spec.size, self.spec.size, 3), np.uint8)
        inside = wanted // _ROWS_A_BLOCK
        needed = np.unique(inside)
        for number, block in zip(needed, ray.get([self.blocks[each] for each in needed]), strict=True):
            here = np.flatnonzero(inside == number)
            images[here] = _pixels(block)[wanted[here] % _ROWS_A_BLOCK]
        return images


def _pixels(block: pa.Table) -> np.ndarray:
    """The decoded photographs of a block, in place."""
    return block["image"].chunk(0).to_numpy(zero_copy_only=True)


def cache_images(rows: pa.Table, spec: Preprocess, room: int) -> tuple[ImageSource, Dataset | None]:
    """The photographs of manifest rows, decoded into the object store if they fit into `room` bytes.

    Returns:
        them, and the dataset that must be kept for as long as they are used.
    """
    rows = select_locations(rows, "label")
    labels = np.array(rows["label"].to_pylist(), np.int8)
    table = make_dataset(rows, _ROWS_A_BLOCK)
    reference = ray.put(_combine_chunks(rows))
    if rows.num_rows * spec.size * spec.size * 3 > room:
        return ImageSource(labels, reference, spec, None), None
    decoded = table.map_batches(LoadForTraining(spec), batch_size=_ROWS_A_BLOCK)
    decoded.context.execution_options.preserve_order = True
    decoded = decoded.materialize()
    blocks = [block for bundle in decoded.iter_internal_ref_bundles() for block in bundle.block_refs]
    return ImageSource(labels, reference, spec, blocks), decoded


def _combine_chunks(rows: pa.Table) -> pa.Table:
    """Rows in one chunk, whose strings may be more than 2 GiB."""
    rows = without_nulls(rows)
    for place, field in enumerate(rows.schema):
        if field.type == pa.string():
            rows = rows.set_column(place, field.name, rows[field.name].cast(pa.large_string()))
    return rows.combine_chunks()


def cache_budget() -> int:
    """Bytes of decoded photographs that any node's object store may be asked to keep."""
    stores = [node["Resources"].get("object_store_memory", 0) for node in ray.nodes() if node["Alive"]]
    return int(min(stores) * _CACHE_SHARE)


class _LoadRankBatch:
    """Positions in a worker's stream to its photographs, turned as the epoch's plan says."""

    def __init__(self, source: ImageSource, order: EpochSettings, share: RankBatch, first_epoch: int) -> None:
        self._source = source
        self._order = order
        self._share = share
        self._first_epoch = first_epoch
        self._steps = images_per_epoch(len(source), order.augment) // share.batch_size

    def __call__(self, batch: Columns) -> Columns:
        epochs, places = self._share.places(batch["id"], self._steps)
        rows, symmetry = np.empty(len(places), np.int64), np.empty(len(places), np.int8)
        color = np.empty((len(places), 5), np.float32)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            plan = plan_epoch(self._source.labels, self._order, self._first_epoch + int(epoch))
            rows[here], symmetry[here] = plan.rows[places[here]], plan.symmetry[places[here]]
            color[here] = plan.color[places[here]]
        images = augment.apply_dihedral(self._source.load(rows), symmetry)
        if self._order.color_jitter:
            images = augment.jitter_color(images, self._order.color_jitter, color)
        return {"image": images, "label": self._source.labels[rows]}


class _LoadSlice:
    def __init__(self, source: ImageSource, start: int) -> None:
        self._source = source
        self._start = start

    def __call__(self, batch: Columns) -> Columns:
        rows = batch["id"] + self._start
        return {"image": self._source.load(rows), "label": self._source.labels[rows]}


def training_batches(
    source: ImageSource, order: EpochSettings, share: RankBatch, first_epoch: int, trainings: int = 1
) -> Iterator[dict[str, Any]]:
    """This worker's batches from `first_epoch` to the end of the run: tensors `image` and `label`.

    `trainings` like this one run at once on the cluster, and each takes its part of what there is.
    """
    steps = images_per_epoch(len(source), order.augment) // share.batch_size
    count = (order.epochs - first_epoch + 1) * steps * share.size
    return _stream(_LoadRankBatch(source, order, share, first_epoch), count, share, trainings)


def validation_batches(source: ImageSource, share: RankBatch, trainings: int = 1) -> Iterator[dict[str, Any]]:
    """This worker's part of the validation photographs, each of which one worker has."""
    start, stop = (len(source) * edge // share.workers for edge in (share.rank, share.rank + 1))
    return _stream(_LoadSlice(source, start), stop - start, share, trainings)


def _stream(load: Any, count: int, share: RankBatch, trainings: int) -> Iterator[dict[str, Any]]:
    if not count:
        return iter(())
    blocks = min(_MAX_BLOCKS, -(-count // _ROWS_A_BLOCK))
    dataset = ray.data.range(count, override_num_blocks=blocks).map_batches(load, batch_size=_ROWS_A_BLOCK)
    options = dataset.context.execution_options
    options.preserve_order = True
    options.resource_limits = _resource_limits(share.workers * trainings)
    return iter(
        dataset.iterator().iter_torch_batches(batch_size=share.size, prefetch_batches=_PREFETCH_BATCHES)
    )


def _resource_limits(workers: int) -> ExecutionResources:
    """What one worker's stream may use: its part of what all workers of the cluster leave."""
    have = ray.cluster_resources()
    return ExecutionResources(
        cpu=max(1.0, (have["CPU"] - workers) / workers),
        object_store_memory=have["object_store_memory"] * (1 - _CACHE_SHARE) / 2 / workers,
    )


def silence_ray_data() -> None:
    """No bars of Ray's from inside a worker."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True


def describe_cache(train: ImageSource, cluster: Cluster) -> str:
    """What is said of where the decoded photographs are."""
    size = len(train) * train.spec.size**2 * 3 / 2**20
    if train.blocks is not None:
        return f"photographs decoded once into Ray's object store ({size:,.0f} MiB)"
    return (
        f"the decoded photographs ({size:,.0f} MiB) do not fit beside the rest into the object store of "
        f"each of {cluster.nodes} nodes: they are decoded anew in every epoch"
    )
