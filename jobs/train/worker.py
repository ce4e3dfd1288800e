"""The data-parallel worker of `scalp train`, which runs inside Ray Train, or its local mode."""

from __future__ import annotations

import gc
import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import ray.train
import ray.train.torch
import safetensors.torch
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointUploadMode
from ray.util import get_current_placement_group
from torch import nn

from jobs.train.ingest import (
    ImageSource,
    silence_ray_data,
    stream_limits,
    training_batches,
    validation_batches,
)
from scalp_core import storage
from scalp_core.bundles.bundle import serialize_weights
from scalp_core.bundles.contract import WEIGHTS_FILE
from scalp_core.datasets.other_symptoms import OTHER_LABELS
from scalp_core.evaluation import metrics
from scalp_core.grades import NUM_GRADES
from scalp_core.inference.predictor import has_bf16
from scalp_core.models.architecture import build_model, normalize, to_channels_last
from scalp_core.models.losses import make_losses
from scalp_core.models.recipe import Recipe
from scalp_core.models.sampler import RankBatch, images_per_epoch
from scalp_core.models.training_step import TrainingStep
from scalp_core.seeds import Purpose, torch_seed

STATE_FILE = "state.pt"
HISTORY_FILE = "history.json"
_SECONDS_BETWEEN_NOTES = 1.0
_CHECKS_PER_EPOCH = 50  # checks of the loss; each makes a GPU wait for the step
_POINTS_PER_EPOCH = 200  # points of the loss per step; each is a mean over its steps

Batch = dict[str, torch.Tensor]


class _Notes(Protocol):
    """The writing end of the queue to the driver."""

    def put_nowait(self, note: dict[str, Any]) -> None: ...


class DivergedError(Exception):
    """The loss is not finite. All workers raise it at the same step; the message names the step."""


def train_worker(config: dict[str, Any]) -> str | None:
    """Run the training in one worker.

    Args:
        config: `recipe` (as a dict), `train` and `val` (`ImageSource`), `grade_counts` of the training split,
            `other_counts` (the same per other symptom that the model grades), `initial_weights` (URI of
            safetensors), `batch_norm` (from `Recipe.resolve_batch_norm` for the
            maximum of workers), `worker_cpus` (CPUs that each worker reserves); optional: `notes` (queue to
            the driver), `after_epoch` (function of a history entry, called on rank 0; True ends the
            training), `trainings` (number of parallel runs), and `device` (default: the one that Ray
            assigns).

    Returns:
        The step at which the loss was not finite, which ends the training; None for a normal end. It is not
        an exception, because Ray would retry and fail in the same way.
    """
    if config["train"].in_ray:
        gc.freeze()  # the end of the process looks at no module again, which takes a second of a core
    try:
        _Worker(config).run()
    except DivergedError as error:
        return str(error)
    return None


class _Worker:
    def __init__(self, config: dict[str, Any]) -> None:
        silence_ray_data()
        self.recipe = recipe = Recipe(**config["recipe"])
        self.train: ImageSource = config["train"]
        self.val: ImageSource = config["val"]
        self.spec = self.train.spec
        self.notes: _Notes | None = config.get("notes")
        self.after_epoch: Callable[[dict[str, Any]], bool] | None = config.get("after_epoch")
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.rank_batch = RankBatch(self.rank, self.world, recipe.batch_size)
        self.limits = None
        if self.train.in_ray:
            self.limits = stream_limits(self.world * config.get("trainings", 1), config["worker_cpus"])
        self.steps = images_per_epoch(len(self.train), recipe.augment) // recipe.batch_size
        self.device = torch.device(config["device"]) if "device" in config else ray.train.torch.get_device()
        model = build_model(recipe.architecture, recipe.head, recipe.size, recipe.model, recipe.heads)
        self.step = TrainingStep(
            to_channels_last(model.to(self.device)),
            recipe,
            make_losses(
                recipe.loss,
                recipe.label_smoothing,
                config["grade_counts"],
                recipe.softness,
                config["other_counts"],
            ),
            self.spec,
            self.steps * recipe.epochs,
            config["batch_norm"],
            has_bf16("cuda" if self.device.type == "cuda" else "cpu"),
        )
        self.history: list[dict[str, Any]] = []
        self._restore(config["initial_weights"])

    def run(self) -> None:
        first = len(self.history) + 1
        group = get_current_placement_group() if ray.is_initialized() else None
        self._note({"workers": self.world, "after": first - 1, "group": group})
        settings = self.recipe.epoch_settings
        batches = training_batches(self.train, settings, self.rank_batch, first, self.limits)
        for epoch in range(first, self.recipe.epochs + 1):
            started = time.monotonic()
            # Derived from seed, epoch and rank, so that a resumed run draws the same numbers.
            torch.manual_seed(torch_seed(self.recipe.seed, Purpose.DROPOUT, epoch, self.rank))
            if epoch in (first, self.recipe.frozen_epochs + 1):
                self.step.wrap(frozen=epoch <= self.recipe.frozen_epochs)
            entry = {"epoch": epoch, "workers": self.world} | self._train_epoch(batches, epoch)
            entry |= self._validate()
            if not math.isfinite(entry["val_loss"]):
                raise DivergedError(f"the validation of epoch {epoch}")
            entry["seconds"] = round(time.monotonic() - started, 2)
            self.history.append(entry)
            self._report(entry)
            self._note({"epoch_done": entry})
            if self.after_epoch and self._is_ended(entry):
                return

    def _train_epoch(self, batches: Iterator[Batch], epoch: int) -> dict[str, Any]:
        self.step.train_mode()
        # On the device of the model: reading it after each step would stall a GPU.
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)  # loss, correct predictions
        check_every = max(1, self.steps // _CHECKS_PER_EPOCH)
        losses: list[torch.Tensor] = []
        noted = waited = 0.0
        started = requested = time.monotonic()
        for step, batch in enumerate(islice(batches, self.steps), 1):
            waited += time.monotonic() - requested
            others = batch.get(OTHER_LABELS)
            others = None if others is None else others.long()
            sums = self.step(batch["image"], batch["label"].long(), batch.get("soft_label"), others)
            totals += sums
            losses.append(sums[0])
            if step % check_every == 0 or step == self.steps:
                self._check_finite(totals[0], f"step {step} of {self.steps} in epoch {epoch}")
            requested = time.monotonic()
            if requested - noted > _SECONDS_BETWEEN_NOTES or step == self.steps:
                noted = requested
                self._note(
                    {
                        "epoch": epoch,
                        "step": step,
                        "steps": self.steps,
                        "loss": float(totals[0]) * self.world / step,  # of this worker's images
                        "learning_rate": max(self.step.schedule.get_last_lr()),
                        "seconds": requested - started,
                        "waited_seconds": waited,
                    }
                )
        correct = self._sum(totals[1])
        seconds = time.monotonic() - started
        step_losses = self._sum(torch.stack(losses))
        pieces = step_losses.tensor_split(min(self.steps, _POINTS_PER_EPOCH))
        count = self.steps * self.recipe.batch_size
        return {
            "train_loss": float(step_losses.mean()),
            "train_top1": float(correct / count),
            "learning_rate": max(self.step.schedule.get_last_lr()),
            "steps": self.steps,
            "step_losses": [round(float(piece.mean()), 6) for piece in pieces],
            "data_wait_share": round(waited / seconds, 4),
            "photographs_per_second": round(count / seconds, 2),
        }

    def _validate(self) -> dict[str, Any]:
        """Compute the metrics of the validation split, each image of which one worker evaluates."""
        # The running statistics of batch normalization differ between workers; those of rank 0 count.
        model = self.step.evaluated_model
        if self.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)
        model.eval()
        confusion = torch.zeros(
            self.recipe.heads, NUM_GRADES * NUM_GRADES, dtype=torch.float64, device=self.device
        )
        loss = torch.zeros(1, dtype=torch.float64, device=self.device)
        with torch.inference_mode(), self.step.autocast():
            for batch in validation_batches(self.val, self.rank_batch, self.limits):
                labels = batch["label"].long()
                logits = model(normalize(batch["image"], self.spec)).float()
                loss += nn.functional.cross_entropy(logits[:, :NUM_GRADES], labels, reduction="sum")
                by_symptom = labels[:, None]
                if OTHER_LABELS in batch:
                    by_symptom = torch.cat([by_symptom, batch[OTHER_LABELS].long()], dim=1)
                answers = logits.unflatten(1, (-1, NUM_GRADES)).argmax(2)
                for counts, truth, answer in zip(confusion, by_symptom.T, answers.T, strict=True):
                    known = truth >= 0
                    cells = truth[known] * NUM_GRADES + answer[known]
                    counts += cells.bincount(minlength=len(counts))
        matrix, *others = self._sum(confusion).reshape(-1, NUM_GRADES, NUM_GRADES).numpy()
        count = int(matrix.sum())
        values: dict[str, Any] = {
            "val_loss": float(self._sum(loss) / count),
            "val_top1": float(matrix.trace() / count),
            "val_qwk": metrics.quadratic_weighted_kappa(matrix),
            "val_n": count,
        }
        if others:
            values["val_qwk_of_others"] = [
                metrics.quadratic_weighted_kappa(other) if other.any() else None for other in others
            ]
        return values

    def _is_ended(self, entry: dict[str, Any]) -> bool:
        """Ask `after_epoch` on rank 0, for all workers."""
        ended = torch.zeros(1, device=self.device)
        if self.rank == 0 and self.after_epoch:
            ended += self.after_epoch(entry)
        return bool(self._sum(ended))

    def _check_finite(self, loss: torch.Tensor, position: str) -> None:
        """End the training on all workers if the sum of their losses is not finite.

        All workers call it at the same steps.
        """
        if not self._sum(loss.clone()).isfinite():
            raise DivergedError(position)

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over the workers, and move it to the CPU."""
        if self.world > 1:
            dist.all_reduce(values)
        return values.cpu()

    def _note(self, note: dict[str, Any]) -> None:
        if self.rank == 0 and self.notes is not None:  # an empty queue is false
            self.notes.put_nowait(note)

    def _report(self, entry: dict[str, Any]) -> None:
        """Report an epoch, on rank 0 with a checkpoint: model, optimizer, schedule, average and history.

        Ray uploads the checkpoint during the next epoch, and then removes the folder.
        """
        if self.rank != 0:
            ray.train.report(entry, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)
            return
        folder = tempfile.mkdtemp(prefix="scalp-checkpoint-")
        Path(folder, WEIGHTS_FILE).write_bytes(serialize_weights(self.step.evaluated_model.state_dict()))
        state = {
            # The keys of checkpoints keep their old spelling, so that older runs can resume.
            "optimiser": self.step.optimizer.state_dict(),
            "schedule": self.step.schedule.state_dict(),
        }
        if self.step.ema:
            state["model"] = self.step.model.state_dict()
        torch.save(state, Path(folder, STATE_FILE))
        Path(folder, HISTORY_FILE).write_text(json.dumps(self.history))
        ray.train.report(
            entry,
            checkpoint=Checkpoint.from_directory(folder),
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            delete_local_checkpoint_after_upload=True,
        )

    def _restore(self, initial_weights: str) -> None:
        checkpoint = ray.train.get_checkpoint()
        state: dict[str, Any] = {}
        if checkpoint is None:
            weights = safetensors.torch.load(storage.read(initial_weights))
        else:
            with checkpoint.as_directory() as folder:
                weights = safetensors.torch.load_file(Path(folder, WEIGHTS_FILE))
                state = torch.load(Path(folder, STATE_FILE), weights_only=True, map_location="cpu")
                self.history = json.loads(Path(folder, HISTORY_FILE).read_text())
        self.step.model.load_state_dict(weights)
        self.step.start_average()
        if state:
            self.step.model.load_state_dict(state.get("model", weights))
            self.step.optimizer.load_state_dict(state["optimiser"])
            self.step.schedule.load_state_dict(state["schedule"])
