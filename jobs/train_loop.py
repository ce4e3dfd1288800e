"""What each data-parallel worker of `scalp train` does; runs inside Ray Train."""

from __future__ import annotations

import contextlib
import ctypes
import json
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, cast

import ray.train
import ray.train.torch
import safetensors.torch
import torch
import torch.distributed as dist
from ray.train import Checkpoint, CheckpointUploadMode
from ray.util.queue import Queue
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from jobs.ingest import Photographs, quiet_data, training_batches, validation_batches
from scalp_core import metrics, storage
from scalp_core.bundle import WEIGHTS_FILE, serialise_weights
from scalp_core.epochs import Share, photographs_an_epoch
from scalp_core.grades import NUM_GRADES
from scalp_core.losses import make_loss
from scalp_core.model import build_model, classifier_name, normalise
from scalp_core.predictor import has_bf16
from scalp_core.recipe import Recipe

STATE_FILE = "state.pt"
HISTORY_FILE = "history.json"
_SECONDS_BETWEEN_NOTES = 1.0
_POINTS_AN_EPOCH = 200  # of the loss by step; each is the mean of the steps it stands for
_MALLOPT_TRIM_THRESHOLD, _MALLOPT_MMAP_THRESHOLD = -1, -3

Batch = dict[str, torch.Tensor]


def train_worker(config: dict[str, Any]) -> None:
    """The entry point of one worker.

    Args:
        config: `recipe` (as a dict), `train` and `val` (`Photographs`), `grade_counts` of the training part,
            `initial_weights` (uri of safetensors), `notes` (queue to the driver), and `trainings` where
            more than one run at once.
    """
    _Worker(config).run()


class _Worker:
    def __init__(self, config: dict[str, Any]) -> None:
        quiet_data()
        _keep_freed_memory()
        self.recipe = recipe = Recipe(**config["recipe"])
        self.train: Photographs = config["train"]
        self.val: Photographs = config["val"]
        self.spec = self.train.spec
        self.notes: Queue = config["notes"]
        self.trainings: int = config.get("trainings", 1)
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        self.share = Share(self.rank, self.world, recipe.batch_size)
        self.steps = photographs_an_epoch(len(self.train), recipe.augment) // recipe.batch_size
        self.device = ray.train.torch.get_device()
        self.loss_of = make_loss(recipe.loss, recipe.label_smoothing, config["grade_counts"], recipe.softness)
        self.model = build_model(recipe.architecture, recipe.head).to(self.device)
        self.model.to(memory_format=torch.channels_last)
        self.optimiser = _optimiser(self.model, recipe)
        self.schedule = LambdaLR(self.optimiser, self._learning_rate)
        self.ema: ModelEmaV3 | None = None
        self.history: list[dict[str, Any]] = []
        self._restore(config["initial_weights"])

    def run(self) -> None:
        first = len(self.history) + 1
        self._note({"workers": self.world, "after": first - 1})
        batches = training_batches(self.train, self.recipe.order, self.share, first, self.trainings)
        for epoch in range(first, self.recipe.epochs + 1):
            started = time.monotonic()
            # By seed, epoch and rank, so that a run that goes on draws what it would have drawn.
            torch.manual_seed(hash((self.recipe.seed, epoch, self.rank)))
            if epoch in (first, self.recipe.frozen_epochs + 1):
                parallel = self._parallel(frozen=epoch <= self.recipe.frozen_epochs)
            entry = {"epoch": epoch, "workers": self.world} | self._train_epoch(parallel, batches, epoch)
            entry |= self._validate()
            entry["seconds"] = round(time.monotonic() - started, 2)
            self.history.append(entry)
            self._report(entry)
            self._note({"epoch_done": entry})

    @property
    def kept(self) -> nn.Module:
        """The model that is validated and kept: the moving average where there is one."""
        return self.ema.module if self.ema else self.model

    def _learning_rate(self, step: int) -> float:
        return self.recipe.rate_at(step, self.steps * self.recipe.epochs)

    def _parallel(self, frozen: bool) -> nn.Module:
        """The model as all workers train it together; wrapping sends the weights of rank 0 to everyone."""
        self.model.requires_grad_(not frozen)
        self.model.train(not frozen)  # what is frozen keeps its statistics too, as in Keras
        if frozen:
            self.model.get_submodule(classifier_name(self.model)).requires_grad_(True).train()
        model = self.model
        if self.recipe.sync_batchnorm and self.world > 1:
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        # Statistics of batch normalisation are sent around once an epoch, by `_validate`.
        apart = {"broadcast_buffers": False}
        return ray.train.torch.prepare_model(model, move_to_device=False, parallel_strategy_kwargs=apart)

    def _train_epoch(self, parallel: nn.Module, batches: Iterator[Batch], epoch: int) -> dict[str, Any]:
        if epoch > self.recipe.frozen_epochs:
            parallel.train()
        # Stays where the model is: a GPU that is asked after every step waits for the next one.
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)  # loss, right answers
        losses: list[torch.Tensor] = []
        noted = waited = 0.0
        started = asked = time.monotonic()
        for step, batch in enumerate(islice(batches, self.steps), 1):
            waited += time.monotonic() - asked
            found = self._step(parallel, batch["image"], batch["label"].long())
            totals += found
            losses.append(found[0])
            asked = time.monotonic()
            if asked - noted > _SECONDS_BETWEEN_NOTES or step == self.steps:
                noted = asked
                self._note(
                    {
                        "epoch": epoch,
                        "step": step,
                        "steps": self.steps,
                        "loss": float(totals[0]) / step,
                        "learning_rate": max(self.schedule.get_last_lr()),
                        "seconds": asked - started,
                        "waited_seconds": waited,
                    }
                )
        right = self._sum(totals[1])
        seconds = time.monotonic() - started
        step_losses = self._sum(torch.stack(losses) * self.share.size) / self.recipe.batch_size
        pieces = step_losses.tensor_split(min(self.steps, _POINTS_AN_EPOCH))
        count = self.steps * self.recipe.batch_size
        return {
            "train_loss": float(step_losses.mean()),
            "train_top1": float(right / count),
            "learning_rate": max(self.schedule.get_last_lr()),
            "steps": self.steps,
            "step_losses": [round(float(piece.mean()), 6) for piece in pieces],
            "data_wait_share": round(waited / seconds, 4),
            "photographs_per_second": round(count / seconds, 1),
        }

    def _step(self, parallel: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """One step of the optimiser; this worker's mean loss and its right answers, float64 (2,)."""
        # DDP takes the mean over workers; a share that is larger by one photograph weighs more by it.
        weight = len(labels) * self.world / self.recipe.batch_size
        pieces = list(
            zip(images.tensor_split(self.recipe.accumulate), labels.tensor_split(self.recipe.accumulate),
                strict=True)
        )  # fmt: skip
        found = torch.zeros(2, dtype=torch.float64, device=self.device)
        for number, (piece, truth) in enumerate(pieces, 1):
            # Workers add up their gradients once a step, at its last piece.
            apart = isinstance(parallel, DistributedDataParallel) and number < len(pieces)
            together = (
                cast(DistributedDataParallel, parallel).no_sync() if apart else contextlib.nullcontext()
            )
            with together:
                with self._autocast():
                    logits = parallel(normalise(piece, self.spec))
                loss = self.loss_of(logits.float(), truth) * (len(truth) / len(labels))
                (loss * weight).backward()
            found += torch.stack([loss.detach().double(), (logits.argmax(1) == truth).sum()])
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.schedule.step()
        if self.ema:
            self.ema.update(self.model, step=self.schedule.last_epoch)
        return found

    def _validate(self) -> dict[str, float]:
        """Every validation photograph exactly once over all workers; metrics of the whole part."""
        # The running statistics of batch normalisation differ between workers; those of rank 0 are kept.
        if self.world > 1:
            for buffer in self.kept.buffers():
                dist.broadcast(buffer, 0)
        self.kept.eval()
        confusion = torch.zeros(NUM_GRADES * NUM_GRADES, dtype=torch.float64, device=self.device)
        loss = torch.zeros(1, dtype=torch.float64, device=self.device)
        with torch.inference_mode(), self._autocast():
            for batch in validation_batches(self.val, self.share, self.trainings):
                labels = batch["label"].long()
                logits = self.kept(normalise(batch["image"], self.spec)).float()
                loss += nn.functional.cross_entropy(logits, labels, reduction="sum")
                confusion += (labels * NUM_GRADES + logits.argmax(1)).bincount(minlength=len(confusion))
        matrix = self._sum(confusion).reshape(NUM_GRADES, NUM_GRADES).numpy()
        count = int(matrix.sum())
        return {
            "val_loss": float(self._sum(loss) / count),
            "val_top1": float(matrix.trace() / count),
            "val_qwk": metrics.quadratic_weighted_kappa(matrix),
            "val_n": count,
        }

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=has_bf16(self.device.type))

    def _sum(self, values: torch.Tensor) -> torch.Tensor:
        """Adds up over the workers, to the CPU."""
        if self.world > 1:
            dist.all_reduce(values)
        return values.cpu()

    def _note(self, note: dict[str, Any]) -> None:
        if self.rank == 0:
            self.notes.put_nowait(note)

    def _report(self, entry: dict[str, Any]) -> None:
        """Model, optimiser, schedule, moving average and the epochs so far, from rank 0 alone.

        Ray writes them to the run's storage while the next epoch runs, and removes the folder.
        """
        if self.rank != 0:
            ray.train.report(entry, checkpoint_upload_mode=CheckpointUploadMode.ASYNC)
            return
        folder = tempfile.mkdtemp(prefix="scalp-checkpoint-")
        Path(folder, WEIGHTS_FILE).write_bytes(serialise_weights(self.kept.state_dict()))
        state = {"optimiser": self.optimiser.state_dict(), "schedule": self.schedule.state_dict()}
        if self.ema:
            state["model"] = self.model.state_dict()
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
        self.model.load_state_dict(weights)
        if self.recipe.ema_decay:
            # Warmed up, or the first weights would be remembered for longer than a short run lasts.
            self.ema = ModelEmaV3(self.model, decay=self.recipe.ema_decay, use_warmup=True)
        if state:
            self.model.load_state_dict(state.get("model", weights))
            self.optimiser.load_state_dict(state["optimiser"])
            self.schedule.load_state_dict(state["schedule"])


def _keep_freed_memory() -> None:
    """Asks glibc to keep what is freed instead of mapping every large activation anew in every step.

    The page faults of that take up to a fifth of the time of training on CPUs. Elsewhere nothing happens, and
    it holds for the one arena that `jobs.trainer` leaves to workers.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(_MALLOPT_MMAP_THRESHOLD, 32 * 2**20)  # the most that glibc takes
        mallopt(_MALLOPT_TRIM_THRESHOLD, 2**31 - 1)


def _optimiser(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """By timm: biases and normalisation do not decay, and each layer may have a rate of its own."""
    optimiser = create_optimizer_v2(
        model,
        opt=recipe.optimiser,
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
        layer_decay=recipe.layer_decay if recipe.layer_decay < 1 else None,
        fused=True,  # one pass over the weights instead of one for each operation
    )
    for group in optimiser.param_groups:  # timm leaves this to schedulers of its own
        group["lr"] *= group.get("lr_scale", 1.0)
    return optimiser
