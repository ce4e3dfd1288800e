"""What each data-parallel worker of `scalp train` does; runs inside Ray Train."""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import safetensors.torch
import torch
import torch.distributed as dist
from ray.train import Checkpoint
from ray.util.queue import Queue
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from scalp_core import metrics, storage
from scalp_core.bundle import WEIGHTS_FILE, serialise_weights
from scalp_core.grades import NUM_GRADES
from scalp_core.model import build_model, normalise
from scalp_core.predictor import has_bf16
from scalp_core.preprocess import Preprocess
from scalp_core.recipe import Recipe

STATE_FILE = "state.pt"
HISTORY_FILE = "history.json"
_PREFETCH_BATCHES = 2
_SECONDS_BETWEEN_NOTES = 0.5


def train_worker(config: dict[str, Any]) -> None:
    """The entry point of one worker.

    Args:
        config: `recipe`, `preprocess` (both as dicts), `initial_weights` (uri of safetensors),
            `train_rows` (photographs in the training part) and `notes` (queue to the driver).
    """
    _Worker(config).run()


class _Worker:
    def __init__(self, config: dict[str, Any]) -> None:
        self.recipe = Recipe(**config["recipe"])
        self.spec = Preprocess(**config["preprocess"])
        self.notes: Queue = config["notes"]
        context = ray.train.get_context()
        self.rank, world = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        self.batch_size = self.recipe.batch_size // world
        self.steps = config["train_rows"] // world // self.batch_size
        torch.manual_seed(self.recipe.seed + self.rank)

        self.model = build_model(self.recipe.architecture).to(self.device)
        self.model.to(memory_format=torch.channels_last)
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(),
            lr=self.recipe.learning_rate,
            weight_decay=self.recipe.weight_decay,
            fused=True,  # one pass over the weights instead of one for each operation
        )
        self.schedule = LambdaLR(self.optimiser, self._learning_rate)
        self.history: list[dict[str, Any]] = []
        self._restore(config["initial_weights"])
        # After the weights are in place: wrapping sends those of rank 0 to everyone.
        self.parallel = ray.train.torch.prepare_model(self.model, move_to_device=False)

    def run(self) -> None:
        train, val = ray.train.get_dataset_shard("train"), ray.train.get_dataset_shard("val")
        for epoch in range(len(self.history) + 1, self.recipe.epochs + 1):
            started = time.monotonic()
            entry = {"epoch": epoch} | self._train_epoch(train, epoch) | self._validate(val)
            entry["seconds"] = round(time.monotonic() - started, 2)
            self.history.append(entry)
            with self._checkpoint() as checkpoint:
                ray.train.report(entry, checkpoint=checkpoint)
            self._note({"epoch_done": entry})

    def _learning_rate(self, step: int) -> float:
        """Linear warm-up, then half a cosine to zero; a factor of the recipe's learning rate."""
        total = self.steps * self.recipe.epochs
        warm = int(total * self.recipe.warmup_share)
        if step < warm:
            return (step + 1) / warm
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warm) / max(1, total - warm))))

    def _train_epoch(self, shard: ray.data.DataIterator, epoch: int) -> dict[str, float]:
        self.parallel.train()
        loss_of = nn.CrossEntropyLoss(label_smoothing=self.recipe.label_smoothing)
        totals = torch.zeros(3, dtype=torch.float64)  # loss, right answers, photographs
        noted = waited = 0.0
        started = asked = time.monotonic()
        for step, (images, labels) in enumerate(self._batches(shard, drop_last=True), 1):
            waited += time.monotonic() - asked
            with self._autocast():
                logits = self.parallel(normalise(images, self.spec))
                loss = loss_of(logits, labels)
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            self.optimiser.step()
            self.schedule.step()
            right = int((logits.argmax(1) == labels).sum())
            totals += torch.tensor([float(loss.detach()) * len(labels), right, len(labels)])
            if time.monotonic() - noted > _SECONDS_BETWEEN_NOTES:
                noted = time.monotonic()
                self._note(
                    {"epoch": epoch, "step": step, "steps": self.steps, "loss": float(totals[0] / totals[2])}
                )
            asked = time.monotonic()
        share = waited / (time.monotonic() - started)
        loss_sum, right_sum, count = self._sum(totals).tolist()
        return {
            "train_loss": loss_sum / count,
            "train_top1": right_sum / count,
            "data_wait_share": round(share, 4),
        }

    def _validate(self, shard: ray.data.DataIterator) -> dict[str, float]:
        """Every validation photograph exactly once over all workers; metrics of the whole part."""
        # The running statistics of batch normalisation differ between workers; those of rank 0 are kept.
        if dist.is_initialized() and dist.get_world_size() > 1:
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
        self.model.eval()
        confusion = torch.zeros(NUM_GRADES, NUM_GRADES, dtype=torch.float64)
        loss = torch.zeros(1, dtype=torch.float64)
        with torch.inference_mode(), self._autocast():
            for images, labels in self._batches(shard, drop_last=False):
                logits = self.model(normalise(images, self.spec)).float()
                loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
                for label, grade in zip(labels.tolist(), logits.argmax(1).tolist(), strict=True):
                    confusion[label, grade] += 1
        matrix = self._sum(confusion).numpy()
        count = int(matrix.sum())
        return {
            "val_loss": float(self._sum(loss) / count),
            "val_top1": float(matrix.trace() / count),
            "val_qwk": metrics.quadratic_weighted_kappa(matrix),
            "val_n": count,
        }

    def _batches(
        self, shard: ray.data.DataIterator, drop_last: bool
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        batches = shard.iter_torch_batches(
            batch_size=self.batch_size, drop_last=drop_last, prefetch_batches=_PREFETCH_BATCHES
        )
        for batch in batches:
            yield batch["image"], batch["label"].long()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=has_bf16(self.device.type))

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        """Adds up over the workers."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return values
        there = values.to(self.device)
        dist.all_reduce(there)
        return there.cpu()

    def _note(self, note: dict[str, Any]) -> None:
        if self.rank == 0:
            self.notes.put_nowait(note)

    @contextmanager
    def _checkpoint(self) -> Iterator[Checkpoint | None]:
        """Model, optimiser, schedule and the epochs so far; from rank 0 alone, the others hold the same."""
        if self.rank != 0:
            yield None
            return
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, WEIGHTS_FILE).write_bytes(serialise_weights(self.model.state_dict()))
            state = {"optimiser": self.optimiser.state_dict(), "schedule": self.schedule.state_dict()}
            torch.save(state, Path(folder, STATE_FILE))
            Path(folder, HISTORY_FILE).write_text(json.dumps(self.history))
            yield Checkpoint.from_directory(folder)

    def _restore(self, initial_weights: str) -> None:
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None:
            self.model.load_state_dict(safetensors.torch.load(storage.read(initial_weights)))
            return
        with checkpoint.as_directory() as folder:
            self.model.load_state_dict(safetensors.torch.load_file(Path(folder, WEIGHTS_FILE)))
            state = torch.load(Path(folder, STATE_FILE), weights_only=True, map_location="cpu")
            self.history = json.loads(Path(folder, HISTORY_FILE).read_text())
        self.optimiser.load_state_dict(state["optimiser"])
        self.schedule.load_state_dict(state["schedule"])
        self._note({"restored": len(self.history)})
