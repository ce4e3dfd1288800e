"""Training loops for `train` to compare with: PyTorch alone, and with `torchrun`.

A script, as `torchrun` needs: `… tests.benchmarks.loops DATA LOOP OUT`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count, islice
from pathlib import Path
from typing import Literal, cast

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from pydantic import BaseModel
from timm.optim import create_optimizer_v2
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

from scalp_core.datasets import locations, manifest
from scalp_core.datasets.locations import Location
from scalp_core.images import augment
from scalp_core.images.codecs import MAX_BYTES
from scalp_core.images.preprocess import Preprocess, decode
from scalp_core.inference.predictor import Hardware, has_bf16
from scalp_core.models.architecture import build_model, normalize, preprocess_for
from scalp_core.models.recipe import Recipe
from scalp_core.models.sampler import EpochPlan, plan_epoch

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


class Loop(BaseModel):
    """Options of a training loop without Ray.

    Args:
        kind: `plain` reads files by Pillow in a `DataLoader` in each epoch and computes in fp32, as tutorials
            do; `tuned` keeps decoded images in memory, and computes and augments as the recipe says.
        device: cpu or cuda.
        recipe: Recipe of `scalp train`. `plain` uses its architecture, sizes and learning rate alone.
        threads: Threads per process; 0: PyTorch's default, all cores.
    """

    kind: Literal["plain", "tuned"]
    device: Hardware
    recipe: Recipe
    threads: int = 0


def time_epochs(data: str, loop: Loop) -> list[float]:
    """Train on the training split of `data`; return the seconds of each epoch."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if loop.threads:
        torch.set_num_threads(loop.threads)
    device = torch.device(loop.device, rank) if loop.device == "cuda" else torch.device("cpu")
    if world > 1:
        dist.init_process_group("nccl" if loop.device == "cuda" else "gloo")
    torch.manual_seed(0)
    recipe, tuned = loop.recipe, loop.kind == "tuned"
    model: nn.Module = build_model(recipe.architecture, size=recipe.size, keywords=recipe.model).to(device)
    spec = preprocess_for(model, recipe.size, recipe.resize)
    if tuned:
        model = model.to(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(
        model,
        opt=recipe.optimizer,
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        layer_decay=recipe.layer_decay if tuned and recipe.layer_decay < 1 else None,
        fused=tuned,
    )
    ema = None
    if tuned and recipe.ema_decay:
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(recipe.ema_decay), use_buffers=True)
    weights = model
    if world > 1:
        model = DistributedDataParallel(model, broadcast_buffers=not tuned)  # as in `scalp train`
    model.train()
    autocast = torch.autocast(loop.device, torch.bfloat16, enabled=tuned and has_bf16(loop.device))
    epochs = (
        _augment_ahead(data, spec, recipe, rank, world)
        if tuned
        else _read_each_epoch(data, spec, recipe.batch_size // world)
    )
    seconds = []
    for batches in islice(epochs, recipe.epochs):
        if world > 1:
            dist.barrier()
        started = time.perf_counter()
        for images, labels in batches:
            images, labels = images.to(device), labels.to(device)
            with autocast:
                logits = model(normalize(images, spec) if tuned else images)
            smoothing = recipe.label_smoothing
            nn.functional.cross_entropy(logits.float(), labels, label_smoothing=smoothing).backward()
            if tuned and recipe.gradient_clip:
                nn.utils.clip_grad_norm_(weights.parameters(), recipe.gradient_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if ema:
                ema.update_parameters(weights)
        if loop.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    if world > 1:
        dist.destroy_process_group()
    return seconds


class _Files(Dataset[tuple[torch.Tensor, int]]):
    """Dataset that decodes by Pillow in each access, with random flips."""

    def __init__(self, data: str, spec: Preprocess) -> None:
        rows = manifest.select_split(manifest.read_manifest(data), "train")
        self.paths: list[str] = rows["uri"].to_pylist()
        self.labels: list[int] = rows["label"].to_pylist()
        self._size = spec.size
        self._mean, self._std = (torch.tensor(three)[:, None, None] for three in (spec.mean, spec.std))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = Image.open(self.paths[index]).convert("RGB").resize((self._size, self._size))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        if torch.rand(()) < 0.5:
            pixels = pixels.flip(2)
        return (pixels - self._mean) / self._std, self.labels[index]


def _read_each_epoch(data: str, spec: Preprocess, batch_size: int) -> Iterator[Batches]:
    """Epochs of normalized float32 (batch_size, 3, size, size) and labels."""
    loader = DataLoader(
        _Files(data, spec), batch_size, shuffle=True, num_workers=2, drop_last=True, persistent_workers=True
    )
    while True:
        yield iter(loader)


def _augment_ahead(data: str, spec: Preprocess, recipe: Recipe, rank: int, world: int) -> Iterator[Batches]:
    """Epochs of uint8 (N, size, size, 3) and labels of this process.

    Images are decoded once. A thread augments the next batch during the step, by the functions and the plan
    of `scalp train`, without Ray.
    """
    rows = manifest.select_split(manifest.read_manifest(data), "train")
    read = locations.read_images([Location(uri, None) for uri in rows["uri"].to_pylist()], MAX_BYTES)
    images = np.stack([decode(cast(bytes, file), spec).pixels for file in read])
    labels = np.array(rows["label"].to_pylist(), np.int8)
    settings, share = recipe.epoch_settings, recipe.batch_size // world

    def load(plan: EpochPlan, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        start = step * recipe.batch_size + rank * share
        part = EpochPlan(*(values[start : start + share] for values in plan))
        pixels = augment.apply_dihedral(images[part.rows], part.symmetry)
        pixels = augment.crop_squares(pixels, settings.min_crop, part.crop)
        pixels = augment.jitter_color(pixels, settings.color_jitter, part.color)
        pixels = augment.degrade(pixels, settings.blur, settings.jpeg_quality, part.quality)
        return torch.from_numpy(pixels), torch.from_numpy(labels[part.rows]).long()

    def batches(pool: ThreadPoolExecutor, epoch: int) -> Batches:
        plan = plan_epoch(labels, settings, epoch)
        steps = len(plan.rows) // recipe.batch_size
        following = pool.submit(load, plan, 0)
        for step in range(1, steps + 1):
            batch = following.result()
            if step < steps:
                following = pool.submit(load, plan, step)
            yield batch

    with ThreadPoolExecutor(1) as pool:
        for epoch in count(1):
            yield batches(pool, epoch)


def main() -> None:
    """Train, and write the seconds of each epoch, from rank 0 alone."""
    data, loop, out = sys.argv[1:]
    seconds = time_epochs(data, Loop.model_validate_json(loop))
    if os.environ.get("RANK", "0") == "0":
        Path(out).write_text(json.dumps(seconds))


if __name__ == "__main__":
    main()
