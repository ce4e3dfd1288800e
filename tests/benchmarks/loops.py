"""Training loops for `train` to compare with: PyTorch alone, and with `torchrun`.

A script, as `torchrun` needs: `… tests.benchmarks.loops DATA LOOP OUT`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
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
from scalp_core.images.codecs import MAX_BYTES
from scalp_core.images.preprocess import Preprocess, decode
from scalp_core.inference.predictor import Hardware, has_bf16
from scalp_core.models.architecture import build_model, normalize, preprocess_for

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


class Loop(BaseModel):
    """Options of a training loop without Ray.

    Args:
        kind: `plain` reads files by Pillow in a `DataLoader` in each epoch and computes in fp32, as tutorials
            do; `tuned` keeps decoded images in memory, computes as `scalp train` does, and has the recipe's
            clipping, color jitter and moving average.
        device: cpu or cuda.
        architecture: timm name.
        size: Input size, pixels.
        batch_size: Batch size, summed over the processes.
        epochs: Epochs to train.
        threads: Threads per process; 0: PyTorch's default, all cores.
        gradient_clip: As in the recipe; so for `color_jitter` and `ema_decay`.
    """

    kind: Literal["plain", "tuned"]
    device: Hardware
    architecture: str
    size: int
    batch_size: int
    epochs: int
    threads: int = 0
    gradient_clip: float = 0.0
    color_jitter: float = 0.0
    ema_decay: float = 0.0


def time_epochs(data: str, loop: Loop) -> list[float]:
    """Train on the training split of `data`; return the seconds of each epoch."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if loop.threads:
        torch.set_num_threads(loop.threads)
    device = torch.device(loop.device, rank) if loop.device == "cuda" else torch.device("cpu")
    if world > 1:
        dist.init_process_group("nccl" if loop.device == "cuda" else "gloo")
    torch.manual_seed(0)
    model: nn.Module = build_model(loop.architecture).to(device)
    spec = preprocess_for(model, loop.size)
    tuned = loop.kind == "tuned"
    if tuned:
        model = model.to(memory_format=torch.channels_last)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, fused=tuned)
    ema = None
    if tuned and loop.ema_decay:
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(loop.ema_decay), use_buffers=True)
    weights = model
    if world > 1:
        model = DistributedDataParallel(model, broadcast_buffers=not tuned)  # as in `scalp train`
    model.train()
    autocast = torch.autocast(loop.device, torch.bfloat16, enabled=tuned and has_bf16(loop.device))
    batch_size = loop.batch_size // world
    epochs = (
        _decode_once(data, spec, rank, world, batch_size, device)
        if tuned
        else _read_each_epoch(data, spec, batch_size)
    )
    seconds = []
    for batches in islice(epochs, loop.epochs):
        if world > 1:
            dist.barrier()
        started = time.perf_counter()
        for images, labels in batches:
            images, labels = images.to(device), labels.to(device)
            if tuned and loop.color_jitter:
                images = _jitter_color(images, loop.color_jitter)
            with autocast:
                logits = model(normalize(images, spec) if tuned else images)
            nn.functional.cross_entropy(logits.float(), labels, label_smoothing=0.05).backward()
            if tuned and loop.gradient_clip:
                nn.utils.clip_grad_norm_(weights.parameters(), loop.gradient_clip)
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


def _decode_once(
    data: str, spec: Preprocess, rank: int, world: int, batch_size: int, device: torch.device
) -> Iterator[Batches]:
    """Epochs of uint8 (batch_size, size, size, 3) and labels of this process, from the device's memory.

    The fastest possible input: no reading, decoding or copying during training.
    """
    rows = manifest.select_split(manifest.read_manifest(data), "train")
    read = locations.read_images([Location(uri, None) for uri in rows["uri"].to_pylist()], MAX_BYTES)
    pixels = np.stack([decode(cast(bytes, file), spec).pixels for file in read])
    images = torch.from_numpy(pixels).to(device)
    labels = torch.tensor(rows["label"].to_pylist(), device=device)
    for epoch in count():
        yield _epoch(images, labels, epoch, rank, world, batch_size)


def _epoch(
    images: torch.Tensor, labels: torch.Tensor, epoch: int, rank: int, world: int, batch_size: int
) -> Batches:
    generator = torch.Generator().manual_seed(epoch)
    order = torch.randperm(len(images), generator=generator)
    for step in range(len(images) // (batch_size * world)):
        rows = order[(step * world + rank) * batch_size :][:batch_size]
        symmetries = torch.randint(8, (batch_size,), generator=generator)
        batch = torch.empty((batch_size, *images.shape[1:]), dtype=images.dtype, device=images.device)
        for symmetry in symmetries.unique().tolist():
            places = (symmetries == symmetry).nonzero()[:, 0]
            batch[places] = _apply_symmetry(images[rows[places]], symmetry)
        yield batch, labels[rows]


def _jitter_color(images: torch.Tensor, strength: float) -> torch.Tensor:
    """Change brightness, contrast and white balance of each image, as `augment.jitter_color` does."""
    change = strength * (2 * torch.rand(5, len(images), 1, 1, 1, device=images.device) - 1)
    gain = (1 + change[0]) * (1 + torch.cat(change[2:].unbind(), 3) / 2)
    pixels = images.float()
    center = pixels.mean((1, 2), keepdim=True)
    return torch.lerp(center, pixels, 1 + change[1]).mul_(gain).clamp_(0, 255)


def _apply_symmetry(squares: torch.Tensor, symmetry: int) -> torch.Tensor:
    rotated = torch.rot90(squares, symmetry % 4, (1, 2))
    return rotated.flip(2) if symmetry >= 4 else rotated


def main() -> None:
    """Train, and write the seconds of each epoch, from rank 0 alone."""
    data, loop, out = sys.argv[1:]
    seconds = time_epochs(data, Loop.model_validate_json(loop))
    if os.environ.get("RANK", "0") == "0":
        Path(out).write_text(json.dumps(seconds))


if __name__ == "__main__":
    main()
