"""The training loops that `scalp bench train` compares with: PyTorch alone, and below `torchrun`.

A script of its own, since `torchrun` starts scripts: `… jobs.bench.loops DATA LOOP OUT`.
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
from torch.utils.data import DataLoader, Dataset

from scalp_core.datasets import locations, manifest
from scalp_core.datasets.locations import Location
from scalp_core.images.codecs import MAX_BYTES
from scalp_core.images.preprocess import Preprocess, decode
from scalp_core.inference.predictor import Hardware, has_bf16
from scalp_core.models.architecture import build_model, normalize, preprocess_for

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]


class Loop(BaseModel):
    """One way to train without Ray.

    Args:
        kind: `plain` reads files by Pillow in a `DataLoader` in every epoch and computes in fp32, as
            tutorials do; `tuned` keeps decoded photographs in memory and computes as `scalp train` does.
        device: cpu or cuda.
        architecture: timm name.
        size: side of the input, pixels.
        batch_size: of all processes together.
        epochs: to train.
        threads: of each process; 0 leaves PyTorch's choice.
    """

    kind: Literal["plain", "tuned"]
    device: Hardware
    architecture: str
    size: int
    batch_size: int
    epochs: int
    threads: int = 0


def seconds_of_epochs(data: str, loop: Loop) -> list[float]:
    """Trains on the training part of `data`; how long each epoch took."""
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
    optimiser = create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, fused=tuned)
    if world > 1:
        model = DistributedDataParallel(model, broadcast_buffers=not tuned)  # as in `scalp train`
    model.train()
    autocast = torch.autocast(loop.device, torch.bfloat16, enabled=tuned and has_bf16(loop.device))
    share = loop.batch_size // world
    epochs = (
        _decoded_once(data, spec, rank, world, share, device) if tuned else _read_each_time(data, spec, share)
    )
    taken = []
    for batches in islice(epochs, loop.epochs):
        if world > 1:
            dist.barrier()
        started = time.perf_counter()
        for images, labels in batches:
            images, labels = images.to(device), labels.to(device)
            with autocast:
                logits = model(normalize(images, spec) if tuned else images)
            nn.functional.cross_entropy(logits.float(), labels, label_smoothing=0.05).backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        if loop.device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    if world > 1:
        dist.destroy_process_group()
    return taken


class _Files(Dataset[tuple[torch.Tensor, int]]):
    """Decoded by Pillow whenever one is asked for, and flipped by a coin."""

    def __init__(self, data: str, spec: Preprocess) -> None:
        rows = manifest.select_split(manifest.read_manifest(data), "train")
        self.paths: list[str] = rows["uri"].to_pylist()
        self.labels: list[int] = rows["label"].to_pylist()
        self._size = spec.size
        self._mean, self._std = (torch.tensor(three)[:, None, None] for three in (spec.mean, spec.std))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        picture = Image.open(self.paths[index]).convert("RGB").resize((self._size, self._size))
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255
        if torch.rand(()) < 0.5:
            pixels = pixels.flip(2)
        return (pixels - self._mean) / self._std, self.labels[index]


def _read_each_time(data: str, spec: Preprocess, share: int) -> Iterator[Batches]:
    """Epochs of normalized float32 (share, 3, size, size) and labels."""
    loader = DataLoader(
        _Files(data, spec), share, shuffle=True, num_workers=2, drop_last=True, persistent_workers=True
    )
    while True:
        yield iter(loader)


def _decoded_once(
    data: str, spec: Preprocess, rank: int, world: int, share: int, device: torch.device
) -> Iterator[Batches]:
    """Epochs of this process's uint8 (share, size, size, 3) and labels, from the device's memory.

    A loop's fastest way: nothing is read, decoded or copied while it trains.
    """
    rows = manifest.select_split(manifest.read_manifest(data), "train")
    read = locations.read_images([Location(uri, None) for uri in rows["uri"].to_pylist()], MAX_BYTES)
    pixels = np.stack([decode(cast(bytes, file), spec).pixels for file in read])
    images = torch.from_numpy(pixels).to(device)
    labels = torch.tensor(rows["label"].to_pylist(), device=device)
    for epoch in count():
        yield _epoch(images, labels, epoch, rank, world, share)


def _epoch(
    images: torch.Tensor, labels: torch.Tensor, epoch: int, rank: int, world: int, share: int
) -> Batches:
    draw = torch.Generator().manual_seed(epoch)
    places = torch.randperm(len(images), generator=draw)
    for step in range(len(images) // (share * world)):
        rows = places[(step * world + rank) * share :][:share]
        turns = torch.randint(8, (share,), generator=draw)
        batch = torch.empty((share, *images.shape[1:]), dtype=images.dtype, device=images.device)
        for turn in turns.unique().tolist():
            here = (turns == turn).nonzero()[:, 0]
            batch[here] = _turned(images[rows[here]], turn)
        yield batch, labels[rows]


def _turned(squares: torch.Tensor, turn: int) -> torch.Tensor:
    turned = torch.rot90(squares, turn % 4, (1, 2))
    return turned.flip(2) if turn >= 4 else turned


def main() -> None:
    """Writes the seconds of each epoch, from the first process alone."""
    data, loop, out = sys.argv[1:]
    taken = seconds_of_epochs(data, Loop.model_validate_json(loop))
    if os.environ.get("RANK", "0") == "0":
        Path(out).write_text(json.dumps(taken))


if __name__ == "__main__":
    main()
