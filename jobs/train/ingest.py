"""Data ingest of training: each rank's batches, in the order of the sampler.

Images are decoded once into memory if they fit, otherwise again in each epoch. The order is that of
`scalp_core.models.sampler`. Each worker has one stream over all remaining epochs, without a pause between
epochs. Ray Data loads the batches, from Ray's object store; a training in one process without Ray loads them
in threads, from its memory. Tasks import this module, so its imports are fast.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
from joblib import cpu_count
from ray.data import DataContext, Dataset, ExecutionResources

from cluster.local import object_store_size
from jobs.common.images import Columns, LoadForTraining, select_locations, to_columns, without_nulls
from jobs.common.ray_executor import make_dataset
from scalp_core.datasets import manifest
from scalp_core.datasets.manifest import DataSpec
from scalp_core.datasets.other_symptoms import OTHER_LABELS, add_other_labels
from scalp_core.errors import UserError
from scalp_core.grades import NUM_GRADES
from scalp_core.images import augment
from scalp_core.images.preprocess import Preprocess
from scalp_core.models.sampler import EpochPlan, EpochSettings, RankBatch, images_per_epoch, plan_epoch

if TYPE_CHECKING:
    from scalp_core.models.recipe import Recipe

_ROWS_PER_BLOCK = 64
_MAX_BLOCKS = 10_000
_PREFETCH_BATCHES = 2
# Share of the smallest node's object store for decoded images; the rest is for batches in transit.
_CACHE_SHARE = 0.5


@dataclass(frozen=True)
class ImageSource:
    """The images of one split, which tasks on any node read by row number.

    Args:
        labels: int8 (N,), grades of the images.
        rows: The manifest's `uri, member, label`, or a reference to them in Ray.
        spec: Preprocessing.
        blocks: Blocks of `_ROWS_PER_BLOCK` decoded images, uint8 (N, size, size, 3), or references to tables
            of them in Ray, in order; None: decode at each read.
        soft_labels: float32 (N, 4), distributions over the grades to learn instead of the labels, or None.
        other_labels: int8 (N, 5), from `add_other_labels`; None: the model grades one symptom.
    """

    labels: np.ndarray
    rows: ray.ObjectRef | pa.Table
    spec: Preprocess
    blocks: list[ray.ObjectRef] | list[np.ndarray] | None
    soft_labels: np.ndarray | None = None
    other_labels: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def in_ray(self) -> bool:
        """Whether Ray holds the images, so that its tasks can load them."""
        return isinstance(self.rows, ray.ObjectRef)

    def labels_of(self, wanted: np.ndarray) -> Columns:
        """Columns `label`, and `soft_label` and `other_labels` if there are any, of these rows."""
        columns = {"label": self.labels, "soft_label": self.soft_labels, OTHER_LABELS: self.other_labels}
        return {name: values[wanted] for name, values in columns.items() if values is not None}

    def load(self, wanted: np.ndarray) -> np.ndarray:
        """Load the images of these rows, uint8 (N, size, size, 3), in their order."""
        if self.blocks is None:
            rows = ray.get(self.rows) if self.in_ray else self.rows
            return _decode(rows.take(wanted), self.spec)
        images = np.empty((len(wanted), self.spec.size, self.spec.size, 3), np.uint8)
        block_numbers = wanted // _ROWS_PER_BLOCK
        needed = np.unique(block_numbers)
        blocks = [self.blocks[number] for number in needed]
        for number, block in zip(needed, ray.get(blocks) if self.in_ray else blocks, strict=True):
            places = np.flatnonzero(block_numbers == number)
            images[places] = _pixels(block)[wanted[places] % _ROWS_PER_BLOCK]
        return images


def _decode(rows: pa.Table, spec: Preprocess) -> np.ndarray:
    """Read and decode the images of manifest rows, uint8 (N, size, size, 3)."""
    return LoadForTraining(spec)(to_columns(rows))["image"]


def _pixels(block: pa.Table | np.ndarray) -> np.ndarray:
    """Return the decoded images of a block, without a copy."""
    return block if isinstance(block, np.ndarray) else block["image"].chunk(0).to_numpy(zero_copy_only=True)


def select_splits(table: pa.Table, data_spec: DataSpec, recipe: Recipe) -> dict[str, pa.Table]:
    """Select the rows of a manifest to train and validate on, with the labels that the recipe learns.

    Raises:
        UserError: A split is empty, or the recipe learns other symptoms and no image has a label of them.
    """
    splits = {"train": manifest.select_training(table), "val": manifest.select_split(table, "val")}
    if recipe.symptoms == "one":
        return splits
    splits = {name: add_other_labels(rows, data_spec.symptom) for name, rows in splits.items()}
    if not np.any(np.array(splits["train"][OTHER_LABELS].to_pylist()) >= 0):
        raise UserError(
            "no image of the training split has a label of another symptom; use --symptoms one, or prepare "
            "a source with the label files of AI Hub, or a table with their columns"
        )
    return splits


def cache_images(
    rows: pa.Table, spec: Preprocess, budget: int, in_ray: bool = True
) -> tuple[ImageSource, Dataset | None]:
    """Decode the images of manifest rows into memory, if they fit into `budget` bytes.

    Args:
        rows: Rows of a manifest.
        spec: Preprocessing.
        budget: Bytes.
        in_ray: Decode by Ray into its object store; else in threads into the memory of this process.

    Returns:
        The images, and a dataset of Ray that must stay alive as long as they are used.
    """
    labels = np.array(rows["label"].to_pylist(), np.int8)
    soft_labels, other_labels = _soft_labels(rows, labels), _other_labels(rows)
    rows = select_locations(rows, "label")
    combined = _combine_chunks(rows)
    reference = ray.put(combined) if in_ray else combined
    if rows.num_rows * spec.size * spec.size * 3 > budget:
        return ImageSource(labels, reference, spec, None, soft_labels, other_labels), None
    if not in_ray:
        pieces = [combined.slice(start, _ROWS_PER_BLOCK) for start in range(0, len(labels), _ROWS_PER_BLOCK)]
        with ThreadPoolExecutor(cpu_count(), "decode") as pool:
            arrays = list(pool.map(partial(_decode, spec=spec), pieces))
        return ImageSource(labels, reference, spec, arrays, soft_labels, other_labels), None
    table = make_dataset(rows, _ROWS_PER_BLOCK)
    decoded = table.map_batches(LoadForTraining(spec), batch_size=_ROWS_PER_BLOCK)
    decoded.context.execution_options.preserve_order = True
    decoded = decoded.materialize()
    blocks = [block for bundle in decoded.iter_internal_ref_bundles() for block in bundle.block_refs]
    return ImageSource(labels, reference, spec, blocks, soft_labels, other_labels), decoded


def _other_labels(rows: pa.Table) -> np.ndarray | None:
    """Labels of the other symptoms, int8 (N, 5), if `add_other_labels` added them; else None."""
    if OTHER_LABELS not in rows.column_names:
        return None
    return np.array(rows[OTHER_LABELS].to_pylist(), np.int8)


def _soft_labels(rows: pa.Table, labels: np.ndarray) -> np.ndarray | None:
    """Soft labels of manifest rows, certain for the others, float32 (N, 4); None if no label is soft."""
    if "soft_label" not in rows.column_names or rows["soft_label"].null_count == rows.num_rows:
        return None
    soft_labels = np.eye(NUM_GRADES, dtype=np.float32)[labels]
    for row, soft in enumerate(rows["soft_label"].to_pylist()):
        if soft:
            soft_labels[row] = soft
    return soft_labels


def cache_splits(
    splits: dict[str, pa.Table], spec: Preprocess, budget: int, in_ray: bool = True
) -> tuple[dict[str, ImageSource], list[Dataset | None]]:
    """Cache the images of the training and validation splits, as `cache_images` does."""
    val, val_dataset = cache_images(splits["val"], spec, budget // 4, in_ray)
    train, train_dataset = cache_images(splits["train"], spec, budget * 3 // 4, in_ray)
    return {"train": train, "val": val}, [train_dataset, val_dataset]


def _combine_chunks(rows: pa.Table) -> pa.Table:
    """Combine rows into one chunk, whose strings may exceed 2 GiB."""
    rows = without_nulls(rows)
    for place, field in enumerate(rows.schema):
        if field.type == pa.string():
            rows = rows.set_column(place, field.name, rows[field.name].cast(pa.large_string()))
    return rows.combine_chunks()


def cache_budget(in_ray: bool = True) -> int:
    """Return the bytes of decoded images that the object store of each node, or this process, can hold."""
    if not in_ray:
        return int(object_store_size() * _CACHE_SHARE)
    stores = [node["Resources"].get("object_store_memory", 0) for node in ray.nodes() if node["Alive"]]
    return int(min(stores) * _CACHE_SHARE)


class _LoadRankBatch:
    """Load the images at positions of a rank's stream, augmented according to the epoch's plan."""

    def __init__(
        self, source: ImageSource, settings: EpochSettings, rank_batch: RankBatch, first_epoch: int
    ) -> None:
        self._source = source
        self._settings = settings
        self._rank_batch = rank_batch
        self._first_epoch = first_epoch
        self._steps = images_per_epoch(len(source), settings.augment) // rank_batch.batch_size

    def __call__(self, batch: Columns) -> Columns:
        epochs, places = self._rank_batch.places(batch["id"], self._steps)
        settings = self._settings
        plan = self._plan_batch(epochs, places)
        images = augment.apply_dihedral(self._source.load(plan.rows), plan.symmetry)
        images = augment.crop_squares(images, settings.min_crop, plan.crop)
        images = augment.jitter_color(images, settings.color_jitter, plan.color)
        images = augment.degrade(images, settings.blur, settings.jpeg_quality, plan.quality)
        return {"image": images, **self._source.labels_of(plan.rows)}

    def _plan_batch(self, epochs: np.ndarray, places: np.ndarray) -> EpochPlan:
        """Collect the plan of a batch, whose epochs ascend."""
        parts = [
            [values[places[epochs == epoch]] for values in self._plan_epoch(int(epoch))]
            for epoch in np.unique(epochs)
        ]
        return EpochPlan(*map(np.concatenate, zip(*parts, strict=True)))

    def _plan_epoch(self, epoch: int) -> EpochPlan:
        return plan_epoch(self._source.labels, self._settings, self._first_epoch + epoch)


class _LoadSlice:
    """Load the images of a contiguous slice of a split."""

    def __init__(self, source: ImageSource, start: int) -> None:
        self._source = source
        self._start = start

    def __call__(self, batch: Columns) -> Columns:
        rows = batch["id"] + self._start
        return {"image": self._source.load(rows), **self._source.labels_of(rows)}


def training_batches(
    source: ImageSource,
    settings: EpochSettings,
    rank_batch: RankBatch,
    first_epoch: int,
    limits: ExecutionResources | None = None,
) -> Iterator[dict[str, Any]]:
    """Iterate over a rank's batches from `first_epoch` to the end of the run.

    A batch has the tensors `image` and those of `ImageSource.labels_of`.

    Args:
        source: Training images.
        settings: Settings of the epochs.
        rank_batch: Slice of the global batch.
        first_epoch: Epoch to start with, from 1.
        limits: Limits of the stream from `stream_limits`; None: no limits.
    """
    steps = images_per_epoch(len(source), settings.augment) // rank_batch.batch_size
    count = (settings.epochs - first_epoch + 1) * steps * rank_batch.size
    load = _LoadRankBatch(source, settings, rank_batch, first_epoch)
    return _stream(load, count, rank_batch, limits, source)


def validation_batches(
    source: ImageSource, rank_batch: RankBatch, limits: ExecutionResources | None = None
) -> Iterator[dict[str, Any]]:
    """Iterate over a rank's slice of the validation images; the ranks' slices do not overlap."""
    rank, workers = rank_batch.rank, rank_batch.workers
    start, stop = (len(source) * edge // workers for edge in (rank, rank + 1))
    return _stream(_LoadSlice(source, start), stop - start, rank_batch, limits, source)


def _stream(
    load: Callable[[Columns], Columns],
    count: int,
    rank_batch: RankBatch,
    limits: ExecutionResources | None,
    source: ImageSource,
) -> Iterator[dict[str, Any]]:
    if not count:
        return iter(())
    if not source.in_ray:
        # Decoding needs all cores; a batch of decoded images takes a thread a fraction of a step.
        return _stream_from_threads(load, count, rank_batch.size, 1 if source.blocks else cpu_count())
    blocks = min(_MAX_BLOCKS, -(-count // _ROWS_PER_BLOCK))
    dataset = ray.data.range(count, override_num_blocks=blocks).map_batches(load, batch_size=_ROWS_PER_BLOCK)
    options = dataset.context.execution_options
    options.preserve_order = True
    if limits is not None:
        options.resource_limits = limits
    return iter(
        dataset.iterator().iter_torch_batches(batch_size=rank_batch.size, prefetch_batches=_PREFETCH_BATCHES)
    )


def _stream_from_threads(
    load: Callable[[Columns], Columns], count: int, size: int, threads: int
) -> Iterator[dict[str, Any]]:
    """Load batches of `size` in order, in threads, ahead of the training step."""
    import torch

    ids = np.array_split(np.arange(count), range(size, count, size))
    with ThreadPoolExecutor(threads, "load") as pool:
        ahead = deque(pool.submit(load, {"id": part}) for part in ids[: threads + _PREFETCH_BATCHES])
        for following in [*ids[len(ahead) :], *[None] * len(ahead)]:
            batch = ahead.popleft().result()
            if following is not None:
                ahead.append(pool.submit(load, {"id": following}))
            yield {name: torch.from_numpy(values) for name, values in batch.items()}


def stream_limits(workers: int, worker_cpus: float) -> ExecutionResources:
    """Compute the resource limits of one worker's stream: an equal share of what the workers leave.

    Args:
        workers: Workers of all trainings that run on the cluster in parallel.
        worker_cpus: CPUs that each worker reserves.
    """
    have = ray.cluster_resources()
    return ExecutionResources(
        cpu=max(1.0, have["CPU"] / workers - worker_cpus),
        object_store_memory=have["object_store_memory"] * (1 - _CACHE_SHARE) / 2 / workers,
    )


def silence_ray_data() -> None:
    """Disable Ray Data's progress bars inside a worker."""
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.raise_original_map_exception = True


def describe_cache(train: ImageSource, nodes: int = 1) -> str:
    """Describe whether decoded images are in memory."""
    size = len(train) * train.spec.size**2 * 3 / 2**20
    if train.blocks is not None:
        place = "Ray's object store" if train.in_ray else "memory"
        return f"images are decoded once into {place} ({size:,.0f} MiB)"
    place = f"the object store of each of {nodes} nodes" if train.in_ray else "memory"
    return (
        f"the decoded images ({size:,.0f} MiB) do not fit into the cache in {place}, so they are decoded "
        "again in each epoch"
    )
